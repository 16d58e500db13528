"""Folders in an object store, by URI: ``s3://bucket/prefix``, ``gs://…``, ``file://…``.

Any file system of fsspec works. An object store has no rename, so a folder is *committed* when its
manifest exists. The manifest is written last and removed first. A folder without a manifest is the
leftover of an interrupted upload and is ignored.

    put_directory("runs/a/checkpoints/step-00000500", "s3://bucket/runs/a/checkpoints/step-…")
    is_committed("s3://bucket/runs/a/checkpoints/step-00000500")
    get_directory("s3://bucket/…", "elsewhere/step-00000500", check=checkpoints.verify_checkpoint)

Every function repeats transient failures: see :func:`retry_transient`.

A :class:`SyncedFolder` is a folder on this machine and its copy in an object store.

Runs, sweeps, studies and corpora declare which of their files are stored, in the order of commit:

    RUN = ("model/", "config.yaml", "result.json")
    folder = SyncedFolder("s3://bucket/runs/a", Path("runs/a"))
    folder.upload(*RUN)

A reader that finds a name in the store also finds the names before it. A name that ends in "/" is
a folder, which its manifest commits.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from skillnet_platform.errors import UserError
from skillnet_platform.storage import local as local_storage
from skillnet_platform.storage.objects import (
    ObjectEntry,
    copy_file,
    get_file,
    info_of,
    is_local_uri,
    is_uri,
    join_uri,
    last_name,
    list_files,
    list_folders,
    md5_of,
    object_exists,
    open_file,
    put_file,
    read_bytes,
    remove_file,
    write_bytes,
)
from skillnet_platform.storage.retry import StoreUnavailableError

__all__ = [
    "ObjectEntry",
    "StoreUnavailableError",
    "copy_files",
    "get_directory",
    "get_file",
    "is_committed",
    "is_uri",
    "join_uri",
    "last_name",
    "list_files",
    "list_folders",
    "object_exists",
    "open_file",
    "put_directory",
    "put_file",
    "read_bytes",
    "remove_directory",
    "remove_file",
    "write_bytes",
]

MANIFEST = "manifest.json"
#: Concurrent transfers of one folder. The transfer of a large file uses several connections.
STREAMS = 4


def is_committed(uri: str) -> bool:
    """Whether the folder's manifest is there, so that all of it is."""
    return object_exists(join_uri(uri, MANIFEST))


def remove_directory(uri: str) -> None:
    """Remove a folder, its manifest first: what is left of a removal cut short counts as nothing.

    Raises:
        UserError: the URI names a bucket rather than a folder in it.
    """
    # A mistyped URI must not delete a complete bucket.
    if not urlsplit(uri).path.strip("/") and not is_local_uri(uri):
        raise UserError(f"{uri}: a whole bucket is not removed")
    remove_file(join_uri(uri, MANIFEST))
    _each(lambda entry: remove_file(join_uri(uri, entry.name)), list_files(uri))
    if is_local_uri(uri):
        shutil.rmtree(urlsplit(uri).path, ignore_errors=True)


def put_directory(local: str | os.PathLike[str], uri: str) -> bool:
    """Upload a folder and commit it by its manifest, which is written last.

    A folder with the same manifest and files of the same size is not changed. A folder with another
    manifest is replaced: between the removal of its manifest and the write of the new manifest the
    folder does not exist. Files with known content are not sent again, so an interrupted upload
    resumes.

    Args:
        local: folder with a manifest.
        uri: address of the new folder.

    Returns:
        Whether anything had to be sent.

    Raises:
        UserError: the local folder has no manifest; see also :func:`retry_transient`.
        FileNotFoundError: a local file went away meanwhile.
        StoreUnavailableError: the folder is not committed; do it again later.
    """
    folder = Path(local)
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} has no {MANIFEST}, so it is not whole and is not uploaded")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST
    )
    there = {entry.name: entry.bytes for entry in list_files(uri)}
    # Read once, so that the manifest that is committed is the one that was compared.
    mine = (folder / MANIFEST).read_bytes()
    if MANIFEST in there:
        sizes = {name: (folder / name).stat().st_size for name in names}
        same = there == sizes | {MANIFEST: len(mine)}
        if same and read_bytes(join_uri(uri, MANIFEST)) == mine:
            return False
        # Readers must never see the old manifest together with new files.
        remove_file(join_uri(uri, MANIFEST))

    def send(name: str) -> None:
        path, target = folder / name, join_uri(uri, name)
        if there.get(name) != path.stat().st_size or not _is_there(target, path):
            put_file(path, target)

    _each(send, names)
    # Leftovers of another upload would become part of the committed folder.
    _each(lambda name: remove_file(join_uri(uri, name)), there.keys() - {*names, MANIFEST})
    # Last: from here on readers accept the folder.
    write_bytes(join_uri(uri, MANIFEST), mine)
    return True


def get_directory(
    uri: str, local: str | os.PathLike[str], check: Callable[[Path], Any] | None = None
) -> Path:
    """Download a committed folder atomically.

    Args:
        uri: address of the folder.
        local: path of the new folder; an existing folder is replaced.
        check: called with the downloaded folder before the rename; raises if it is invalid.

    Raises:
        UserError: the folder is not committed; the disk is full; what ``check`` raises; see also
            :func:`retry_transient`.
    """
    entries = list_files(uri)
    if MANIFEST not in {entry.name for entry in entries}:
        what = f"has no {MANIFEST}: its upload is incomplete" if entries else "does not exist"
        raise UserError(f"{uri} {what}")
    target = Path(local)
    total = sum(entry.bytes for entry in entries)
    # A full disk is reported before the transfer, not near its end.
    local_storage.require_space(target, total)
    with local_storage.staging_directory(target) as aside:

        def fetch(entry: ObjectEntry) -> None:
            # The names come from the store, and their author may be hostile.
            place = (aside / entry.name).resolve()
            if not place.is_relative_to(aside.resolve()):
                raise UserError(f"{uri}: the name {entry.name!r} leads out of the folder")
            try:
                get_file(join_uri(uri, entry.name), place)
            except FileNotFoundError:
                raise UserError(f"{uri}: {entry.name} was removed while it was read") from None

        _each(fetch, entries)
        if check is not None:
            # Before the rename: an invalid folder never appears under its final name.
            check(aside)
    return target


def copy_files(
    source: str,
    target: str,
    names: Iterable[str],
    on_file: Callable[[str], None] | None = None,
) -> None:
    """Copy files of one folder to another folder of the same store.

    Args:
        source: URI of the folder with the files.
        target: URI of the other folder.
        names: file names, relative to their folder.
        on_file: called with the name of each copied file.

    Raises:
        FileNotFoundError: one of them is not there.
        UserError, StoreUnavailableError: see :func:`retry_transient`.
    """

    def copy(name: str) -> None:
        copy_file(join_uri(source, name), join_uri(target, name))
        if on_file is not None:
            on_file(name)

    _each(copy, names)


def _each(action: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Run an action for all items concurrently; the first error ends it."""
    waiting = list(items)
    if len(waiting) < 2:
        for item in waiting:
            action(item)
        return
    with ThreadPoolExecutor(min(STREAMS, len(waiting)), "transfer") as pool:
        tasks = [pool.submit(action, item) for item in waiting]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            # Otherwise the executor starts all waiting transfers before it shows the error.
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _is_there(uri: str, local: Path) -> bool:
    """Return whether an object has the bytes of a local file, by the MD5 of the store.

    Without an MD5 (multipart upload, encryption) the result is False.
    """
    digest = md5_of(info_of(uri) or {})
    if digest is None:
        return False
    with local.open("rb") as stream:
        # Stores report MD5. Here it only saves a transfer and protects against nobody.
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    return found.digest() == digest


class SyncedFolder:
    """Folder on this machine and its copy in an object store.

    Every method raises ``UserError`` if the store rejects a request, and
    ``StoreUnavailableError`` if it does not answer.

    Args:
        uri: URI of the copy.
        local: path on this machine.
        check: raises if a downloaded folder is invalid; it then gets no name on the disk.
    """

    def __init__(self, uri: str, local: Path, check: Callable[[Path], Any] | None = None) -> None:
        self.uri, self.local, self._check = uri, local, check

    def uri_of(self, *names: str) -> str:
        """Return the URI of a path in the folder."""
        return join_uri(self.uri, *names)

    def has(self, name: str) -> bool:
        """Return whether the store has a file, or a complete folder."""
        uri = self.uri_of(name)
        return is_committed(uri) if _is_folder(name) else object_exists(uri)

    def upload(self, *names: str, move: bool = False) -> None:
        """Upload those of the names that exist on this machine, one after the other.

        Args:
            names: in the order of commit. A folder without its manifest counts as missing.
            move: remove each file here once the store has it.
        """
        for name in names:
            path = self.local / name
            if _is_folder(name):
                if (path / MANIFEST).is_file():
                    put_directory(path, self.uri_of(name))
            elif path.is_file():
                put_file(path, self.uri_of(name))
                if move:
                    path.unlink()

    def download(self, *names: str, missing_only: bool = False) -> None:
        """Download those of the names that the store has, one after the other.

        Args:
            names: in the order in which they appear on this machine.
            missing_only: leave what this machine has: its copy may be newer.
        """
        for name in names:
            path = self.local / name
            if missing_only and path.exists():
                continue
            if not _is_folder(name):
                with contextlib.suppress(FileNotFoundError):
                    get_file(self.uri_of(name), path)
            elif self.has(name):
                get_directory(self.uri_of(name), path, check=self._check)

    def publish(
        self,
        target: str,
        stored: Sequence[str],
        local: Sequence[str],
        on_file: Callable[[str], None] | None = None,
    ) -> None:
        """Replace a folder of the store by files of this one, then remove this one everywhere.

        Args:
            target: URI of the folder to replace; it does not exist for readers meanwhile.
            stored: names of uploaded files, which are copied within the store.
            local: names of files on this machine; the last one commits the target.
            on_file: called with the name of each copied file.
        """
        final = SyncedFolder(target, self.local)
        old = {entry.name for entry in list_files(target)}
        # Readers must never see the old commit together with new files.
        remove_file(final.uri_of(local[-1]))
        copy_files(self.uri, target, stored, on_file)
        final.upload(*local[:-1])
        for name in old - {*stored, *local}:
            remove_file(final.uri_of(name))
        final.upload(local[-1])
        remove_directory(self.uri)
        shutil.rmtree(self.local)


def _is_folder(name: str) -> bool:
    return name.endswith("/")
