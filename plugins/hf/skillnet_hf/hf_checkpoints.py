"""Checkpoints of transformers and timm on this machine: location and configuration.

Only safetensors files are read, because other formats can run code.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skillnet.serialization import read_tensor_shapes
from skillnet_platform.errors import list_hub_errors

#: Bytes of a configuration. That of a model with 21,000 named classes takes 1 MB.
MAX_JSON_BYTES = 16 * 2**20


def find_checkpoint(given: str, download: bool) -> Path:
    """Return the directory of a checkpoint.

    Args:
        given: a directory, or ``owner/name`` of a model of the Hugging Face hub.
        download: download a model that the local cache lacks.

    Raises:
        ValueError: the checkpoint is not available, or has no safetensors file.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        kinds = ["*.json", "*.safetensors"]
        try:
            found = snapshot_download(given, allow_patterns=kinds, local_files_only=not download)
        except list_hub_errors() as error:
            remedy = "" if download else "; options.download true fetches it"
            raise ValueError(
                f"the checkpoint {given!r} is neither a folder nor in the cache of the Hugging "
                f"Face hub{remedy} ({type(error).__name__})"
            ) from None
        folder = Path(found)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no *.safetensors file; save the model with safe serialization. Pickled "
            "weights (.bin, .pt, .pth) are not read: they can run code"
        )
    for file in files:
        read_tensor_shapes(file)  # raises for a file of another format
    return folder


def require_finite(model: Any, folder: Path) -> None:
    """Raise ValueError if a loaded checkpoint has infinities or NaNs.

    Args:
        model: with the loaded weights.
        folder: directory of the checkpoint, for the message.
    """
    import torch

    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{folder}: {name} holds infinities or not-a-number")


def read_library_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint. Raise ValueError if it is missing or invalid."""
    return read_library_json(folder / "config.json")


def read_library_json(path: Path) -> dict[str, Any]:
    """Read a file of keys and values that a library wrote.

    Args:
        path: file to read.

    Raises:
        ValueError: it is missing, empty, too large, nested too deeply or no JSON; names the file.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Download the file again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no keys and values. Download the file again")
    return values


def require_equal(theirs: str, found: Any, ours: str, wanted: Any) -> None:
    """Raise ValueError unless a checkpoint's value equals the study's.

    Args:
        theirs: key of the checkpoint.
        found: its value.
        ours: key of the study's model section.
        wanted: its value.
    """
    if found != wanted:
        raise ValueError(f"the checkpoint has {theirs} {found}, the study model.{ours} {wanted}")


def require_at_least(theirs: str, found: int, ours: str, wanted: int) -> None:
    """Raise ValueError unless a checkpoint's value is at least the study's.

    Args:
        theirs: key of the checkpoint.
        found: its value.
        ours: key of the study's model section.
        wanted: its value.
    """
    if found < wanted:
        raise ValueError(
            f"the checkpoint has {theirs} {found}, the study needs model.{ours} {wanted}"
        )


@contextlib.contextmanager
def silence_library_logs() -> Iterator[None]:
    """Suppress transformers' report about unused weights within the context."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
