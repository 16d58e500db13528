"""Weights from a file that anyone may have written: safetensors or refused, never unpickled."""

import json
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Bytes of a header; the longest of ours, of thousands of tensors, take a hundredth of it.
LONGEST_HEADER = 32 * 2**20


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        ValueError: naming the file: it is no safetensors file (a pickle with that name, say), or
            it holds numbers that are no weights: whole numbers, infinities, not-a-number.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path, device=device)
    except (SafetensorError, ValueError) as problem:
        raise ValueError(
            f"{path} is no safetensors file ({problem}); no other format is read, since it could "
            "run code"
        ) from None
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is of type {tensor.dtype}, expected floating point")
        # The sum of finite numbers may overflow: only then is it worth a look at each.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds infinities or not-a-number, so it is no weight")
    return tensors


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a safetensors file, from its header alone.

    Raises:
        ValueError: naming the file: its header is none.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LONGEST_HEADER, path.stat().st_size):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
    except (
        struct.error,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ) as problem:
        raise ValueError(
            f"{path} is no safetensors file ({problem}); no other format is read, since it could "
            "run code"
        ) from None
