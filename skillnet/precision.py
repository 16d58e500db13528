"""Number formats: bf16 autocast, and the type of the weights."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class ComputePrecision:
    """Type of the weights and autocast of a run.

    Args:
        name: ``bf16``, ``fp32`` or ``fp64``.
        device: where the run computes.
    """

    name: str
    device: torch.device

    @property
    def weights(self) -> torch.dtype:
        """Type of weights, gradients and optimizer state."""
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the forward pass of the model runs."""
        # Autocast rounds only products; weights and the optimizer stay in float32.
        if self.name == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def choose_precision(requested: str, device: torch.device) -> ComputePrecision:
    """Return the requested precision; ``auto`` is bf16 where the device supports it, else fp32.

    Args:
        requested: ``auto``, ``bf16``, ``fp32`` or ``fp64``.
        device: where the run computes.
    """
    if requested == "auto":
        requested = "bf16" if native_bf16(device) else "fp32"
    return ComputePrecision(requested, device)


def native_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        # Ampere (compute capability 8) is the first generation with bf16 products.
        return torch.cuda.get_device_capability(device)[0] >= 8
    # torch has no query for this, and emulated bf16 is slower than fp32.
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def find_device(weights: Iterable[Tensor]) -> torch.device:
    """Return where a model computes: the GPU that has some of its weights, else the CPU.

    Args:
        weights: parameters of the model. Training may keep those of other tasks in the host's
            memory.
    """
    devices = (weight.device for weight in weights)
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def best_device() -> torch.device:
    """Return the first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_wide_float(x: Tensor) -> Tensor:
    """Return float32 for 16-bit types, which lose the digits that sums and ranks depend on.

    Args:
        x: any type of floating point.
    """
    return x if x.dtype == torch.float64 else x.float()
