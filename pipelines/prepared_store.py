"""Corpora prepared into a store: the folder here, and what corpora share."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from pipelines.delivery import TOKENIZER, TOKENIZER_MANIFEST
from pipelines.lessons import claimed
from skillnet_platform import storage
from skillnet_platform.storage import directories
from skillnet_platform.storage.location import Place, content

#: What corpora share; sent before them, since their manifests name its hash.
SHARED = (TOKENIZER, TOKENIZER_MANIFEST)


@contextlib.contextmanager
def staged(data: Place) -> Iterator[Path]:
    """The folder to prepare in.

    For a path it is that path. For a URI it is a folder below the run root, for the tokenizer and
    what is in the making: shards leave it one by one (``pipelines/delivery.py``). It may be removed
    at any time.

    Raises:
        UserError: the store refuses, or another process of this machine puts a tokenizer there;
            found before the block starts.
        StoreUnavailable: it does not answer.
    """
    if isinstance(data, Path):
        yield data
        return
    folder = staging_folder(data)
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder):  # what another prepare of this machine has not sent yet is its own
        for name in SHARED:
            # As the store has it, whatever an earlier prepare left here: its corpora are spelt so,
            # and other hosts may have put it there since.
            there = directories.join(data, name)
            if directories.exists(there):
                directories.get_file(there, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    yield folder


def staging_folder(uri: str) -> Path:
    """Where corpora are prepared on their way to a URI."""
    key = hashlib.sha256(uri.encode()).hexdigest()[:12]
    return storage.run_root() / "staging" / f"{directories.name_of(uri)}-{key}"


def send_shared(folder: Path, uri: str) -> None:
    """Send what the corpora of a folder share, where the store has it otherwise."""
    for name in SHARED:
        there = directories.join(uri, name)
        if (folder / name).is_file() and content(there) != (folder / name).read_bytes():
            directories.put_file(folder / name, there)
