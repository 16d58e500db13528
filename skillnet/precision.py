"""Number formats: bf16 autocast, and the type of the weights."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    @property
    def products(self) -> torch.dtype:
        """Type of matrix products."""
        return torch.bfloat16 if self.name == "bf16" else self.weights

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the forward pass of the model runs."""
        # Autocast rounds only products; weights and the optimizer stay in float32.
        if self.products != self.weights:
            return torch.autocast(self.device.type, dtype=self.products)
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


_is_assumed = False


def uses_gpu_kernels(x: Tensor) -> bool:
    """Return whether an operation on a tensor uses the kernels of GPUs."""
    return x.is_cuda or _is_assumed


@contextlib.contextmanager
def assume_gpu() -> Iterator[None]:
    """Compute CPU tensors inside the block as GPUs do: torch's fused attention and products."""
    global _is_assumed
    before, _is_assumed = _is_assumed, True
    try:
        yield
    finally:
        _is_assumed = before


#: Environment of a process that is not yet started, such as ``worker_runtime_env`` of Ray Train.
#: This is more reliable than :func:`keep_freed_memory`, because a thread keeps its first arena.
KEEP_FREED_MEMORY: dict[str, str] = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
}

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> bool:
    """Apply the settings to this process; call it before threads start.

    Returns:
        Whether the settings were applied. Without glibc (macOS, Windows, musl) nothing happens.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    # One arena: memory that one thread freed serves the next operation of any thread.
    options = {_M_ARENA_MAX: 1, _M_TRIM_THRESHOLD: 2**31 - 1, _M_MMAP_THRESHOLD: 2**30}
    return all(mallopt(option, value) == 1 for option, value in options.items())


def give_back_freed_memory() -> bool:
    """Return free memory to the system, for a process that runs several trainings in sequence.

    Kept memory stays in the arena of the thread that freed it. The next run has other threads and
    arenas, so the process grew by half a gigabyte per run (measured).

    Returns:
        Whether memory was returned.
    """
    # Cycles of the finished run would otherwise keep its tensors.
    gc.collect()
    trim = _of_glibc("malloc_trim")
    return trim is not None and trim(0) == 1


def _of_glibc(name: str) -> Any:
    """Return a function of this process' C library, or None if the library is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
