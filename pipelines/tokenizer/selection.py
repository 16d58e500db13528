"""Which tokenizer the user's corpora get: the one that is there, one of their own, or a learnt one.

One directory of prepared corpora has one tokenizer, since one model reads them all. So a tokenizer
that is there stays: corpora that come later are spelt with it, and what it lacks is spelt in bytes.
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipelines.shards.format import MANIFEST
from pipelines.tokenizer import training as tokenizers
from pipelines.tokenizer.conversion import adopt
from pipelines.tokenizer.training import TOKENIZER_MANIFEST
from skillnet_platform import config, storage
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.location import Place, below, content

#: ``--tokenizer learn``: learn one from these corpora, whatever is there.
LEARN = "learn"
#: Key of the tokenizer's manifest that says whose it is; the built-in lesson has none.
OF = "of"
#: Key of the digest of what it was learnt from.
LESSON = "lesson"
LOCK = ".tokenizer.lock"


@dataclass(frozen=True)
class Lesson:
    """How the user's corpora get a tokenizer.

    Args:
        anew: learn one from them whatever is there.
        vocabulary: its number of tokens.
        claim: on the tokenizer of the folder; none if no other process can be there.
    """

    anew: bool = False
    vocabulary: int = tokenizers.VOCABULARY
    claim: "Claim | None" = None


class Claim:
    """A prepare's hold on the tokenizer of a folder. Many may spell with it at once; one that
    replaces it has it alone, or corpora of one folder would be spelt with two."""

    def __init__(self, data: Path, lock: IO[bytes] | None) -> None:
        self._data, self._lock = data, lock

    def alone(self) -> None:
        """From here on the tokenizer may be replaced.

        Raises:
            UserError: another process prepares corpora that are spelt with it.
        """
        self._take(
            fcntl.LOCK_EX,
            "prepares corpora with the tokenizer of this folder, and this one would replace it",
        )

    def _take(self, kind: int, what: str) -> None:
        if self._lock is None:
            return
        try:
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self._data}: another process {what}. Wait for it, or give --data another "
                "directory."
            ) from None


@contextlib.contextmanager
def claimed(data: Path) -> Iterator[Claim]:
    """The tokenizer of a folder stays as it is while the block runs, unless this process itself
    replaces it.

    Raises:
        UserError: another process is about to put one there.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = (data / LOCK).open("ab")
    except OSError:  # what cannot be written is told by what wants to write
        yield Claim(data, None)
        return
    with lock:
        claim = Claim(data, lock)
        claim._take(fcntl.LOCK_SH, "puts a tokenizer into this folder now")
        yield claim


def take(path: str, tokenizer: Path, manifest: Path, replaced: set[str], data: Place) -> None:
    """Put a tokenizer of the user's in place.

    Args:
        path: what the user named.
        tokenizer: where it goes.
        manifest: where it is said whose it is.
        replaced: names of corpora that are prepared anew now.
        data: folder of the prepared corpora, or its URI.

    Raises:
        UserError: there is no usable tokenizer, or other corpora are spelt with another one.
    """
    text = adopt(path)
    now = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if not tokenizer.is_file() or storage.sha256_file(tokenizer) != now:
        keep_spelling(tokenizer, replaced, data)
        with storage.atomic_write(tokenizer, "w") as stream:
            stream.write(text)
    storage.write_json(manifest, {OF: [Path(path).name], "sha256": now})


def keep_spelling(tokenizer: Path, replaced: set[str], data: Place) -> None:
    """Refuse to replace a tokenizer that other corpora are spelt with.

    Args:
        tokenizer: the one that is there; of a store, the copy here.
        replaced: names of corpora that are prepared anew now.
        data: folder of the prepared corpora, or its URI: what is here may be its tokenizer alone.

    Raises:
        UserError: naming them.
    """
    if others := _spelt_with(tokenizer, replaced, data):
        raise UserError(
            f"{below(data, tokenizer.name)}: {', '.join(others)} there are prepared with it; a "
            "model reads corpora of one tokenizer. Give another --data, or prepare them again in "
            "the same call"
        )


def is_left_over(tokenizer: Path, data: Place) -> bool:
    """Whether a prepare that did not end learnt the tokenizer that is there: from the user's
    corpora, and none is spelt with it."""
    try:
        told = storage.read_json(tokenizer.with_name(TOKENIZER_MANIFEST))
    except UserError:
        return False
    learnt = isinstance(told, dict) and {OF, LESSON} <= told.keys()
    return learnt and not _spelt_with(tokenizer, set(), data)


def _spelt_with(tokenizer: Path, but: set[str], data: Place) -> list[str]:
    """Names of corpora that are spelt with a tokenizer, but for some."""
    if not tokenizer.is_file():
        return []
    spelt = storage.sha256_file(tokenizer)
    return [
        name
        for name in _folders(data)
        if name not in but and _words_of(below(data, name, MANIFEST)) == spelt
    ]


def _folders(data: Place) -> list[str]:
    if isinstance(data, str):
        return directories.list_folders(data)
    return sorted(entry.name for entry in data.iterdir() if entry.is_dir())


def _words_of(manifest: Place) -> str | None:
    """SHA-256 of the tokenizer that a corpus is spelt with; none for what is no corpus."""
    try:
        told = json.loads(content(manifest) or b"{}")
        return str(told["tokenizer"]["sha256"])
    except (ValueError, KeyError, TypeError):
        return None


def is_the_users(manifest: Path) -> bool:
    """Whether the tokenizer that is there is the user's, and not that of the built-in lesson."""
    try:
        return OF in storage.read_json(manifest)
    except UserError:
        return False


def is_learnt(tokenizer: Path, lesson: dict[str, Any]) -> bool:
    """Whether the tokenizer that is there was learnt from just that."""
    try:
        entry = storage.read_json(tokenizer.with_name(TOKENIZER_MANIFEST))
        same = entry[LESSON] == config.digest(lesson)
        return bool(same and entry["sha256"] == storage.sha256_file(tokenizer))
    except (UserError, OSError, KeyError, TypeError):
        return False
