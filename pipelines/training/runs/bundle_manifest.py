"""Entry ``serving`` of a saved model's manifest, which makes its folder a bundle.

``manifest.json`` lists the files of the weights. Its entry ``serving`` lists the other files of a
bundle, and has what predictions need: names, limits and settings of each task. Every command reads
it with :func:`read_bundle_manifest`.

The digest in the entry protects against damage. The author of a bundle also writes its digest, so
each value is checked as well: a wrong one is named here, not by an exception of a later step.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    with_config,
)

from pipelines.data.transforms.text import check_unicode
from skillnet.serialization import check_inside, commit_manifest, describe_files, read_manifest
from skillnet_platform.errors import UserError
from skillnet_platform.terminal_text import shorten_text

MANIFEST, SERVING = "manifest.json", "serving"
BUNDLE_FORMAT = 4
#: Largest accepted limit of tokens or frames, and number of seconds.
MAX_LIMIT = 10**6
REMEDY = "register the model again"
#: File of a tokenizer, beside prepared corpora and in a bundle.
TOKENIZER_FILE = "tokenizer.json"


def _check_text(text: str) -> str:
    check_unicode(text)
    return text


def _check_channels(count: int) -> int:
    if count not in (1, 3):
        raise ValueError("it should be 1 or 3")
    return count


Text = Annotated[StrictStr, AfterValidator(_check_text)]
Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
Limit = Annotated[StrictInt, Field(ge=1, le=MAX_LIMIT)] | None
#: Types of pydantic's errors with a sentence of our own.
_PROBLEMS = {"missing": "is missing", "unexpected_keyword_argument": "is no known key"}
_CLOSED = ConfigDict(allow_inf_nan=False, extra="forbid")


@with_config(_CLOSED)
@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of a file."""

    bytes: Count
    sha256: Text


@with_config(_CLOSED)
@dataclass(frozen=True)
class FigureEntry:
    """Evaluation row; None for an absent number."""

    task: Text
    split: Text
    metric: Text
    value: StrictFloat | None
    low: StrictFloat | None
    high: StrictFloat | None


@with_config(ConfigDict(allow_inf_nan=False, extra="allow"))
@dataclass(frozen=True)
class PreprocessingEntry:
    """Settings that predictions use; a corpus may have others."""

    fit: Literal["pad", "crop"] = "pad"
    trim: StrictBool = False
    keywords: StrictBool = False
    video_channels: Annotated[StrictInt, AfterValidator(_check_channels)] = 1
    max_seconds: Annotated[StrictFloat, Field(gt=0, le=MAX_LIMIT)] | None = None
    max_tokens: Limit = None
    tokens: Limit = None
    max_code_tokens: Limit = None
    code_tokens: Limit = None
    max_caption_tokens: Limit = None
    caption_tokens: Limit = None


@with_config(_CLOSED)
@dataclass(frozen=True)
class TaskEntry:
    """What predictions of a task need, and the corpus that it was trained on."""

    corpus: Text
    corpus_digest: Text
    licences: list[Text]
    names: list[Text]
    limit: Limit
    preprocessing: PreprocessingEntry


@with_config(_CLOSED)
@dataclass(frozen=True)
class ServingEntry:
    """Entry ``serving`` of a manifest; ``files`` are those beside the weights."""

    format: Count
    package: Text
    weights_digest: Text
    run_id: Text | None
    steps: Count | None
    settings: dict[Text, Any]
    evaluation: list[FigureEntry]
    tasks: dict[Text, TaskEntry]
    files: dict[Text, FileEntry]
    digest: Text


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
    try:
        _make_adapter().validate_python(manifest)
    except ValidationError as error:
        raise UserError(f"{path}: {_describe_wrong_value(error)}; {REMEDY}") from None
    for name in manifest["files"]:
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


@functools.cache
def _make_adapter() -> TypeAdapter[ServingEntry]:
    return TypeAdapter(ServingEntry)


def _describe_wrong_value(error: ValidationError) -> str:
    """Return key and value of the first problem."""
    found = error.errors(include_url=False)[0]
    key = ".".join(map(str, found["loc"])).encode("utf-8", "backslashreplace").decode()[:120]
    problem = _PROBLEMS.get(found["type"])
    wanted = re.sub(" or an instance of .*|Value error, ", "", found["msg"])
    wanted = wanted.replace("Input should", "it should")
    return f"{key} {problem}" if problem else f"{key} is {_short(found['input'])}; {wanted}"


def _short(value: Any) -> str:
    return shorten_text(ascii(value), 60)
