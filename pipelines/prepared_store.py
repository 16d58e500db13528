"""Corpora prepared into a store: made in a folder here, then sent, each manifest last."""

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipelines.shards import MANIFEST
from skillnet_platform import console, remote, storage
from skillnet_platform.places import Place

#: What corpora share; sent before them, since their manifests name its hash.
SHARED = ("tokenizer.json", "tokenizer.manifest.json")


@contextlib.contextmanager
def staged(data: Place) -> Iterator[Path]:
    """The folder to prepare into. What is whole in it at the end of the block is in ``data`` then.

    For a path it is that path. For a URI it is a folder below the run root, which stays: so
    corpora that did not change are neither prepared nor sent again. It may be removed at any
    time, which costs preparing them again.

    Raises:
        UserError: the store refuses; found before the block starts.
        StoreUnavailable: it does not answer. What was prepared stays: the same command sends it.
    """
    if isinstance(data, Path):
        yield data
        return
    folder = staging_folder(data)
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        there = remote.join(data, name)
        # Corpora that others have put there were prepared with this tokenizer.
        if not (folder / name).is_file() and remote.exists(there):
            remote.get_file(there, folder / name)
    yield folder
    send_corpora(folder, data)


def staging_folder(uri: str) -> Path:
    """Where corpora are prepared on their way to a URI."""
    key = hashlib.sha256(uri.encode()).hexdigest()[:12]
    return storage.run_root() / "staging" / f"{remote.name_of(uri)}-{key}"


def send_corpora(folder: Path, uri: str) -> None:
    """Send the whole corpora of a folder, and what they share; leave out what is there already.

    Raises:
        UserError, StoreUnavailable: see :func:`remote.put_directory`.
    """
    for name in SHARED:
        if (folder / name).is_file():
            remote.put_file(folder / name, remote.join(uri, name))
    for corpus in sorted(path.parent for path in folder.glob(f"*/{MANIFEST}")):
        if corpus.name.startswith("."):
            continue
        files = [path for path in corpus.rglob("*") if path.is_file()]
        size = storage.human_bytes(sum(path.stat().st_size for path in files))
        place = remote.join(uri, corpus.name)
        with console.progress(f"sending {corpus.name}", len(files) - 1, "files") as bar:
            sent = remote.put_directory(corpus, place, on_file=partial(_advance, bar))
        console.note(f"{place}: {'sent' if sent else 'unchanged'}, {size}")


def _advance(bar: console.Progress, name: str, _: int) -> None:
    bar.advance(1, name)
