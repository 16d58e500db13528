"""Selection of the tokenizer for external corpora: the existing one, a given one, or a new one.

A directory of prepared corpora has one tokenizer, because one model reads them all. An existing
tokenizer therefore stays: later corpora are tokenized with it, and text that its vocabulary lacks
is encoded as bytes.

The model knows four ids by number (0 padding, 1 unknown, 2 mask, 3 class), and no text may contain
unknown tokens. A converted tokenizer keeps its tokens and their merges or scores, but its ids are
remapped: those four first, then the 256 bytes, then its own tokens in order. Text that it cannot
represent is encoded as bytes (:func:`pipelines.data.transforms.text.encode_texts`).
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipelines.data.shards.format import MANIFEST
from pipelines.data.tokenizer.guarded_loader import (
    UNUSED_PARTS,
    parse_tokenizer,
    read_tokenizer_tree,
)
from pipelines.data.tokenizer.training import PAD, SPECIAL, TOKENIZER_MANIFEST, UNKNOWN
from pipelines.data.transforms.text import encode_texts
from skillnet_files.commit import lock_file
from skillnet_platform import config, storage
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.location import Location, join_location, read_if_exists

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
#: Names that tokenizers use for the first four ids.
ALIASES = (
    ("[PAD]", "<pad>", "<|pad|>"),
    ("[UNK]", "<unk>", "<|unk|>"),
    ("[MASK]", "<mask>", "<|mask|>"),
    ("[CLS]", "<s>", "<cls>", "<|startoftext|>"),
)
#: Score of tokens that a Unigram model must never select.
UNUSED_TOKEN_SCORE = -1e4


def convert_tokenizer(path: str | Path) -> str:
    """Return the JSON of an existing tokenizer with remapped ids.

    Args:
        path: a ``tokenizer.json``, or the directory of a saved ``transformers`` tokenizer. It is
            read from the disk only, and none of its code is run.

    Raises:
        UserError: there is no tokenizer.json, it is rejected, or its ids cannot be remapped.
    """
    tree = _read_tree(Path(path))
    if list(_read_vocabulary(tree))[: len(SPECIAL)] == list(SPECIAL) and _has_bytes(tree):
        return json.dumps(tree, ensure_ascii=False, indent=1)  # trained by this project
    model = tree["model"]
    if model["type"] not in ("BPE", "WordPiece", "Unigram", "WordLevel"):
        raise UserError(f"{path}: a tokenizer of type {model['type']}; expected BPE, WordPiece, "
                        "Unigram or WordLevel")  # fmt: skip
    own = _read_vocabulary(tree)
    renamed = {
        alias: SPECIAL[index]
        for index, aliases in enumerate(ALIASES)
        if (alias := next((a for a in aliases if a in own), None)) is not None
    }
    first = dict.fromkeys((*SPECIAL, *BYTE_TOKENS))
    order = [*first, *(token for token in own if token not in first and token not in renamed)]
    id_of = {token: index for index, token in enumerate(order)}
    _remap_ids(model, order, renamed, own)
    kept = [t for t in tree.get("added_tokens") or [] if t["content"] not in renamed]
    tree["added_tokens"] = [
        {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for number, name in enumerate(SPECIAL)
    ] + [
        token | {"id": id_of[token["content"]]}
        for token in kept
        if token["content"] not in SPECIAL
    ]  # fmt: skip
    text = json.dumps(tree, ensure_ascii=False, indent=1)
    _check_converted(path, tree)
    return text


def map_token_ids(path: str | Path) -> tuple[str, list[int | None]]:
    """Return the JSON of a converted tokenizer, and for each of its ids the id before.

    Args:
        path: see :func:`convert_tokenizer`.

    Returns:
        The JSON; ids in the order of the converted ones, None for a token that is new.

    Raises:
        UserError: see :func:`convert_tokenizer`.
    """
    text = convert_tokenizer(path)
    own = _read_vocabulary(_read_tree(Path(path)))
    before = {
        SPECIAL[index]: alias
        for index, aliases in enumerate(ALIASES)
        if (alias := next((a for a in aliases if a in own), None)) is not None
    }
    converted = _read_vocabulary(json.loads(text))
    return text, [own.get(before.get(token, token)) for token in converted]


def _read_tree(path: Path) -> dict[str, Any]:
    """Return the JSON of a tokenizer file or directory, after its checks.

    Without padding, truncation and post-processing: the transforms do these.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        # transformers would build one from other files without the checks of this project.
        raise UserError(
            f"{path}: it has no tokenizer.json; write one with transformers: "
            f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained(…), or give another "
            "directory"
        )
    if not file.is_file():
        raise UserError(f"{path}: no tokenizer there; expected a tokenizer.json, or its directory")
    try:
        tree = read_tokenizer_tree(file) | dict.fromkeys(UNUSED_PARTS)
        parse_tokenizer(tree)
    except ValueError as error:
        raise UserError(f"{file}: not a tokenizer ({error})") from None
    return tree


def _read_vocabulary(tree: dict[str, Any]) -> dict[str, int]:
    """Return token -> id in the order of ids, with added tokens."""
    vocab = tree["model"].get("vocab") or {}
    if isinstance(vocab, list):
        ids = {entry[0]: number for number, entry in enumerate(vocab)}
    else:
        ids = dict(vocab)
    ids |= {token["content"]: token["id"] for token in tree.get("added_tokens") or []}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _has_bytes(tree: dict[str, Any]) -> bool:
    return set(BYTE_TOKENS) <= set(_read_vocabulary(tree))


def _remap_ids(
    model: dict[str, Any], order: list[str], renamed: dict[str, str], own: dict[str, int]
) -> None:
    """Replace the ids of the model's tokens in place."""
    if model["type"] == "Unigram":
        scores = dict(model["vocab"])
        model["vocab"] = [[token, scores.get(token, UNUSED_TOKEN_SCORE)] for token in order]
        model["unk_id"] = UNKNOWN
        return
    model["vocab"] = {token: number for number, token in enumerate(order)}
    before = model.get("unk_token")
    # A byte-level BPE has no unknown token and needs none.
    if before is not None or model["type"] != "BPE":
        model["unk_token"] = SPECIAL[UNKNOWN]


def _check_converted(path: str | Path, tree: dict[str, Any]) -> None:
    """Check a converted tokenizer: fixed ids, and no padding tokens in ordinary text.

    Raises:
        UserError: the tokenizer cannot be used.
    """
    try:
        converted = parse_tokenizer(tree)
    except ValueError as error:
        raise UserError(f"{path}: token ids cannot be remapped ({error})") from None
    for number, name in enumerate((*SPECIAL, *BYTE_TOKENS)):
        if converted.token_to_id(name) != number:
            raise UserError(f"{path}: {name} did not get the id {number}")
    if PAD in encode_texts(converted, ["一 a"], 16).to_pylist()[0]:
        raise UserError(f"{path}: the tokenizer produces the padding token for ordinary text")


#: Value of ``--tokenizer``: train a new tokenizer on these corpora, even if one exists.
LEARN = "learn"
#: Key of the tokenizer's manifest: names of its training corpora, or of the file it was copied
#: from. The tokenizer of the built-in corpora has no such key.
TRAINED_ON = "trained_on"
#: Key of the tokenizer's manifest: digest of all that decides a trained tokenizer.
FINGERPRINT = "fingerprint"
LOCK = ".tokenizer.lock"


class TokenizerLock:
    """Lock on a directory's tokenizer: shared while tokenizing, exclusive while replacing it.

    It ensures that all corpora in the directory use one tokenizer.
    """

    def __init__(self, data: Path, lock: IO[bytes] | None) -> None:
        self._data, self._lock = data, lock

    def exclusive(self) -> None:
        """Make the lock exclusive, so that this process may replace the tokenizer.

        Raises:
            UserError: another process prepares corpora with the tokenizer.
        """
        self._acquire(
            False,
            "prepares corpora with the tokenizer of this directory, which this one would replace",
        )

    def _acquire(self, shared: bool, reason: str) -> None:
        if self._lock is not None and not lock_file(self._lock, shared=shared):
            raise UserError(
                f"{self._data}: another process {reason}. Wait for it, or give --data another "
                "directory."
            )


@contextlib.contextmanager
def lock_tokenizer(data: Path) -> Iterator[TokenizerLock]:
    """Hold a shared lock on a directory's tokenizer while the block runs.

    Args:
        data: directory of prepared corpora; created if it is missing.

    Raises:
        UserError: another process replaces the tokenizer.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = (data / LOCK).open("ab")
    except OSError:  # a read-only directory is reported by the code that writes to it
        yield TokenizerLock(data, None)
        return
    with lock:
        held = TokenizerLock(data, lock)
        held._acquire(True, "replaces the tokenizer of this directory now")
        yield held


def install_tokenizer(
    path: str, tokenizer: Path, manifest: Path, replaced: set[str], data: Location
) -> None:
    """Convert a given tokenizer and write it to a directory of prepared corpora.

    Args:
        path: a ``tokenizer.json``, or the directory of a saved transformers tokenizer.
        tokenizer: file to write.
        manifest: manifest of the tokenizer to write.
        replaced: names of corpora that are prepared again in this run.
        data: directory or URI of the prepared corpora.

    Raises:
        UserError: the tokenizer cannot be used, or other corpora depend on the existing one.
    """
    text = convert_tokenizer(path)
    sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if not tokenizer.is_file() or storage.sha256_file(tokenizer) != sha256:
        check_replaceable(tokenizer, replaced, data)
        with storage.atomic_write(tokenizer, "w") as stream:
            stream.write(text)
    storage.write_json(manifest, {TRAINED_ON: [Path(path).name], "sha256": sha256})


def check_replaceable(tokenizer: Path, replaced: set[str], data: Location) -> None:
    """Check that no other corpus depends on the existing tokenizer.

    Args:
        tokenizer: existing tokenizer; for an object store, its local copy.
        replaced: names of corpora that are prepared again in this run.
        data: directory or URI of the prepared corpora.

    Raises:
        UserError: names the corpora that depend on it.
    """
    if others := _corpora_using(tokenizer, replaced, data):
        raise UserError(
            f"{join_location(data, tokenizer.name)}: {', '.join(others)} there are prepared with "
            "it; a model reads corpora of one tokenizer. Give another --data, or prepare them "
            "again in the same call"
        )


def is_leftover_tokenizer(tokenizer: Path, data: Location) -> bool:
    """Return whether an interrupted run left this tokenizer.

    Such a tokenizer was trained on external corpora, and no prepared corpus uses it.

    Args:
        tokenizer: existing tokenizer; for an object store, its local copy.
        data: directory or URI of the prepared corpora.
    """
    try:
        manifest = storage.read_json(tokenizer.with_name(TOKENIZER_MANIFEST))
    except UserError:
        return False
    trained = isinstance(manifest, dict) and {TRAINED_ON, FINGERPRINT} <= manifest.keys()
    return trained and not _corpora_using(tokenizer, set(), data)


def _corpora_using(tokenizer: Path, excluded: set[str], data: Location) -> list[str]:
    """Return the names of prepared corpora that use a tokenizer, without excluded ones."""
    if not tokenizer.is_file():
        return []
    sha256 = storage.sha256_file(tokenizer)
    return [
        name
        for name in _list_folders(data)
        if name not in excluded and _tokenizer_of(join_location(data, name, MANIFEST)) == sha256
    ]


def _list_folders(data: Location) -> list[str]:
    if isinstance(data, str):
        return directories.list_folders(data)
    return sorted(entry.name for entry in data.iterdir() if entry.is_dir())


def _tokenizer_of(manifest: Location) -> str | None:
    """Return the SHA-256 of a corpus' tokenizer; ``None`` if the folder is not a corpus."""
    try:
        recorded = json.loads(read_if_exists(manifest) or b"{}")
        return str(recorded["tokenizer"]["sha256"])
    except (ValueError, KeyError, TypeError):
        return None


def is_custom_tokenizer(manifest: Path) -> bool:
    """Return whether the existing tokenizer is not that of the built-in corpora.

    Args:
        manifest: manifest of the tokenizer.
    """
    try:
        return TRAINED_ON in storage.read_json(manifest)
    except UserError:
        return False


def matches_fingerprint(tokenizer: Path, fingerprint: dict[str, Any]) -> bool:
    """Return whether the existing tokenizer was trained on exactly these inputs.

    Args:
        tokenizer: existing tokenizer.
        fingerprint: all that decides a trained tokenizer.
    """
    try:
        entry = storage.read_json(tokenizer.with_name(TOKENIZER_MANIFEST))
        same = entry[FINGERPRINT] == config.digest_config(fingerprint)
        return bool(same and entry["sha256"] == storage.sha256_file(tokenizer))
    except (UserError, OSError, KeyError, TypeError):
        return False
