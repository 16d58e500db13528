"""Entry ``serving`` of a saved model's manifest, which makes its folder a bundle.

``manifest.json`` lists the files of the weights. Its entry ``serving`` lists the other files of a
bundle, and has what predictions need: names, limits and settings of each task. Every command reads
it with :func:`read_bundle_manifest`.

The digest in the entry protects against damage. The author of a bundle also writes its digest, so
each value is checked as well: a wrong one is named here, not by an exception of a later step.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.data.transforms.text import is_unicode
from skillnet.serialization import check_inside, commit_manifest, describe_files, read_manifest
from skillnet_platform.errors import UserError

MANIFEST, SERVING = "manifest.json", "serving"
BUNDLE_FORMAT = 4
#: Largest accepted limit of tokens or frames, and number of seconds.
MAX_LIMIT = 10**6
REMEDY = "register the model again"
#: File of a tokenizer, beside prepared corpora and in a bundle.
TOKENIZER_FILE = "tokenizer.json"

ValueCheck = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_unicode(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_limit(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_LIMIT


def _is_duration(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 < value <= MAX_LIMIT


def _is_tree(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(key) for key in value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(_is_text(name) for name in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_figures(value: Any) -> bool:
    texts, numbers = ("task", "split", "metric"), ("value", "low", "high")
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and row.keys() == {*texts, *numbers}
        and all(_is_text(row[key]) for key in texts)
        and all(row[key] is None or _is_number(row[key]) for key in numbers)
        for row in value
    )


def _is_file(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"bytes", "sha256"}
        and _is_count(value["bytes"])
        and _is_text(value["sha256"])
    )


def _or_none(check: ValueCheck) -> ValueCheck:
    return lambda value: value is None or check(value)


def _is_flag(value: Any) -> bool:
    return type(value) is bool


#: Key -> (check, what is expected).
MANIFEST_KEYS: Mapping[str, tuple[ValueCheck, str]] = {
    "format": (_is_count, "a number"),
    "package": (_is_text, "a text"),
    "weights_digest": (_is_text, "a text"),
    "run_id": (_or_none(_is_text), "a text or null"),
    "steps": (_or_none(_is_count), "a number of steps or null"),
    "settings": (_is_tree, "keys and values"),
    "evaluation": (_is_figures, "evaluation rows"),
    "tasks": (_is_tree, "an entry per task"),
    "files": (_is_tree, "size and hash per file"),
    "digest": (_is_text, "a text"),
}
TASK_KEYS: Mapping[str, tuple[ValueCheck, str]] = {
    "corpus": (_is_text, "a text"),
    "corpus_digest": (_is_text, "a text"),
    "licences": (_is_names, "a list of texts"),
    "names": (_is_names, "a list of texts"),
    "limit": (_or_none(_is_limit), f"a number from 1 to {MAX_LIMIT} or null"),
    "preprocessing": (_is_tree, "keys and values"),
}
#: Settings that predictions use; a corpus may have others.
PREPROCESSING_KEYS: Mapping[str, tuple[ValueCheck, str]] = {
    "fit": (lambda value: value in ("pad", "crop"), "pad or crop"),
    "trim": (_is_flag, "true or false"),
    "keywords": (_is_flag, "true or false"),
    "video_channels": (lambda value: type(value) is int and value in (1, 3), "1 or 3"),
    "max_seconds": (_or_none(_is_duration), "a number of seconds or null"),
    **{
        key: (_or_none(_is_limit), f"a number from 1 to {MAX_LIMIT} or null")
        for key in (
            "max_tokens",
            "tokens",
            "max_code_tokens",
            "code_tokens",
            "max_caption_tokens",
            "caption_tokens",
        )
    },
}


def is_bundle(folder: Path) -> bool:
    """Return whether a folder holds a saved model with all that predictions need.

    Args:
        folder: any directory.
    """
    # A damaged manifest is reported where the model is read.
    with contextlib.suppress(ValueError):
        return SERVING in read_manifest(folder)
    return False


def read_bundle_manifest(folder: Path) -> dict[str, Any]:
    """Read the entry ``serving`` of a bundle's manifest, and check every key and value.

    Args:
        folder: directory of the bundle.

    Raises:
        UserError: the manifest is missing or damaged, or of another format; names the key.
    """
    path = folder / MANIFEST
    try:
        whole = read_manifest(folder)
    except ValueError as error:
        raise UserError(str(error)) from None
    document = whole.get(SERVING)
    manifest = document if isinstance(document, dict) else {}
    if manifest.get("format") != BUNDLE_FORMAT:
        raise UserError(
            f"{path}: format {_short(manifest.get('format'))}, this program reads {BUNDLE_FORMAT}; "
            f"it was written by skillnet-platform {_short(manifest.get('package'))}"
        )
    _check_entries(path, "", manifest, MANIFEST_KEYS)
    for task, entry in manifest["tasks"].items():
        if not isinstance(entry, dict):
            raise UserError(f"{path}: tasks.{task} is no entry of a task; {REMEDY}")
        _check_entries(path, f"tasks.{task}.", entry, TASK_KEYS)
        settings = entry["preprocessing"]
        known = {key: rule for key, rule in PREPROCESSING_KEYS.items() if key in settings}
        used = {key: settings[key] for key in known}
        _check_entries(path, f"tasks.{task}.preprocessing.", used, known)
    for name, file in manifest["files"].items():
        if not _is_file(file):
            raise UserError(f"{path}: files.{name} is no size and hash; {REMEDY}")
        check_inside(path, name)
    if TOKENIZER_FILE not in manifest["files"]:
        raise UserError(f"{path} does not list {TOKENIZER_FILE}")
    if manifest["digest"] != compute_bundle_digest(whole):
        raise UserError(f"{path} was altered: it does not fit its digest; {REMEDY}")
    return manifest


def add_bundle_manifest(folder: Path, about: Mapping[str, Any], files: Iterable[str]) -> None:
    """Add the entry ``serving`` to the manifest of a saved model that nobody reads yet.

    Args:
        folder: directory of the model.
        about: the entry without its format, files and digest.
        files: names of the files beside the weights.
    """
    content = {"format": BUNDLE_FORMAT, **about, "files": describe_files(folder, files)}
    write_sealed(folder, read_manifest(folder) | {SERVING: content})


def write_sealed(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a bundle with the digest that fits it.

    Args:
        folder: directory of the bundle.
        manifest: content of the file.
    """
    digest = compute_bundle_digest(manifest)
    commit_manifest(folder, {**manifest, SERVING: manifest[SERVING] | {"digest": digest}})


def compute_bundle_digest(manifest: Mapping[str, Any]) -> str:
    """Return the digest of a manifest without its own entry ``serving.digest``."""
    serving = {key: value for key, value in manifest[SERVING].items() if key != "digest"}
    # ASCII: the settings of a damaged file may hold texts that no encoding represents.
    content = {**manifest, SERVING: serving}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_entries(
    path: Path, prefix: str, values: Mapping[str, Any], keys: Mapping[str, tuple[ValueCheck, str]]
) -> None:
    for key in sorted(keys.keys() | values.keys()):
        if key not in keys:
            raise UserError(f"{path}: {prefix}{key[:40]} is no known key; {REMEDY}")
        if key not in values:
            raise UserError(f"{path}: {prefix}{key} is missing; {REMEDY}")
        check, expected = keys[key]
        if not check(values[key]):
            raise UserError(
                f"{path}: {prefix}{key} is {_short(values[key])}, expected {expected}; {REMEDY}"
            )


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:59] + "…"
