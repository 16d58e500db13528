"""Number formats: where to compute in bf16, and in what the weights live."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Precision:
    """Weights' type and autocast of a run; ``name`` is bf16, fp32 or fp64."""

    name: str
    device: torch.device

    @property
    def weights(self) -> torch.dtype:
        """Type of weights, gradients and optimiser state."""
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self) -> AbstractContextManager:
        """Context in which the model's forward pass runs."""
        if self.name == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def choose(requested: str, device: torch.device) -> Precision:
    """The precision asked for; ``auto`` is bf16 where it is native, fp32 elsewhere."""
    if requested == "auto":
        requested = "bf16" if native_bf16(device) else "fp32"
    return Precision(requested, device)


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def best_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
