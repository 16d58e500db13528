"""Checkpoints of other libraries on this machine: where they are, what they say about themselves.

Only safetensors are read: nothing that could run code.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skillnet.serialization import shapes


def find_checkpoint(given: str, download: bool) -> Path:
    """Folder of a checkpoint: a path, or a model of the Hugging Face hub (from its cache).

    Args:
        given: folder, or ``owner/name``.
        download: fetch what the cache lacks.

    Raises:
        ValueError: it is not there, or holds no safetensors.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        kinds = ["*.json", "*.safetensors"]
        try:
            found = snapshot_download(given, allow_patterns=kinds, local_files_only=not download)
        except (HFValidationError, HfHubHTTPError, OSError) as problem:
            remedy = "" if download else "; options.download true fetches it"
            raise ValueError(
                f"the checkpoint {given!r} is neither a folder nor in the cache of the Hugging "
                f"Face hub{remedy} ({type(problem).__name__})"
            ) from None
        folder = Path(found)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no *.safetensors file; save the model with safe serialization. Pickled "
            "weights (.bin, .pt, .pth) are not read: they can run code"
        )
    for file in files:
        shapes(file)  # says so if it only has the name
    return folder


def require_finite(model: Any, folder: Path) -> None:
    """ValueError if a checkpoint that was read holds infinities or not-a-number."""
    import torch

    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{folder}: {name} holds infinities or not-a-number")


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint. ValueError if there is none that can be read."""
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as problem:
        raise ValueError(f"{folder}/config.json cannot be read: {problem}") from None
    if not isinstance(told, dict):
        raise ValueError(f"{folder}/config.json is no configuration")
    return told


def equal(theirs: str, found: Any, ours: str, wanted: Any) -> None:
    """ValueError unless a checkpoint's figure is the study's."""
    if found != wanted:
        raise ValueError(f"the checkpoint has {theirs} {found}, the study model.{ours} {wanted}")


def at_least(theirs: str, found: int, ours: str, wanted: int) -> None:
    """ValueError unless a checkpoint's figure is enough for the study."""
    if found < wanted:
        raise ValueError(
            f"the checkpoint has {theirs} {found}, the study needs model.{ours} {wanted}"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report about weights that nobody reads here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
