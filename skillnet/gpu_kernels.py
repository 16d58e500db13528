"""Choice between the computations of CPUs and of GPUs, for plans that run on CPU tensors.

Attention and experts are computed differently on CPUs. :func:`uses_gpu_kernels` is asked by the
layers, and :func:`assume_gpu` is used by a plan of a training on GPUs.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor

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
