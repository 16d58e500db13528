"""Initial weights from a checkpoint of transformers or timm.

:func:`import_weights` is called by :mod:`skillnet_hf.dense_start`, which ``--from`` asks.
"""

import hashlib
import re
from pathlib import Path

from pipelines.data.tokenizer.selection import map_token_ids
from skillnet.vocabulary import ModelVocabulary
from skillnet_hf.hf_checkpoints import find_checkpoint
from skillnet_hf.library_checkpoint import convert_checkpoint, is_library_checkpoint
from skillnet_platform import storage
from skillnet_platform.errors import UserError

#: ``owner/name`` of a model of the Hugging Face hub.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def import_weights(address: str, run_dir: str) -> tuple[Path, Path] | None:
    """Convert the checkpoint that ``--from`` names; return None if it names no checkpoint.

    Args:
        address: as the user gave it.
        run_dir: directory of runs.

    Returns:
        Folder of the saved dense model, and folder of the checkpoint.

    Raises:
        UserError: the checkpoint is missing, or does not fit SkillNet's layers.
    """
    checkpoint = find_library_checkpoint(address)
    return None if checkpoint is None else (import_checkpoint(checkpoint, run_dir), checkpoint)


def find_library_checkpoint(address: str) -> Path | None:
    """Return the folder of a library's checkpoint that ``--from`` names; None if it names none.

    Args:
        address: a folder, or ``owner/name`` of a model of the Hugging Face hub, which is
            downloaded if the local cache lacks it.

    Raises:
        UserError: the hub has no such model, or it has no safetensors file.
    """
    path = Path(address).expanduser()
    if path.is_dir():
        try:
            return find_checkpoint(address, False) if is_library_checkpoint(path) else None
        except ValueError as error:
            raise UserError(f"--from {address}: {error}") from None
    is_known = path.exists() or (storage.run_root() / address).exists()
    if is_known or not _HUB_ID.fullmatch(address):
        return None
    try:
        return find_checkpoint(address, True)
    except ValueError as error:
        raise UserError(
            f"--from {address}: no folder and no run in {storage.run_root()} has this name; {error}"
        ) from None


def import_checkpoint(folder: Path, run_dir: str) -> Path:
    """Convert a library's checkpoint to a saved dense model below ``run_dir``.

    The ids of a tokenizer in the folder are mapped as ``skillnet prepare --tokenizer`` maps them.

    Args:
        folder: directory of the checkpoint.
        run_dir: directory of runs.

    Returns:
        Folder of the saved model.

    Raises:
        UserError: the checkpoint does not fit SkillNet's layers.
    """
    found = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.json"))]
    names = [path for path in found if path.is_file()]
    digest = hashlib.sha256("".join(map(storage.sha256_file, names)).encode()).hexdigest()
    target = Path(run_dir) / ".starts" / f"{folder.name}-{digest[:16]}"
    if (target / "manifest.json").is_file():
        return target
    tokenizer, rows = None, None
    if (folder / "tokenizer.json").is_file():
        text, rows = map_token_ids(folder)
        tokenizer = hashlib.sha256(text.encode("utf-8")).hexdigest()
    try:
        model = convert_checkpoint(folder, rows)
    except ValueError as error:
        raise UserError(str(error)) from None
    model.vocabulary = ModelVocabulary(tokenizer if "token" in model.stems else None)
    target.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    return target
