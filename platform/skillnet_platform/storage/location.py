"""Locations given by users: a path, or the URI of a folder in an object store.

A :class:`SyncedFolder` is a folder on this machine and its copy in an object store.

Runs, sweeps, studies and corpora declare which of their files are stored, in the order of commit:

    RUN = ("model/", "config.yaml", "result.json")
    folder = SyncedFolder("s3://bucket/runs/a", Path("runs/a"))
    folder.upload(*RUN)

A reader that finds a name in the store also finds the names before it. A name that ends in "/" is
a folder, which its manifest commits.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories, local
from skillnet_platform.storage.directories import is_uri, join_uri, require_no_secret

#: An absolute path, or a URI as plain text. ``file://`` URIs are paths.
Location = Path | str


def parse_location(given: str | Path | None, default: Path) -> Location:
    """Return the location of a user's text, or the default.

    ``pathlib`` turns ``s3://bucket`` into ``s3:/bucket``, so every user input passes through here.

    Args:
        given: path or URI. Empty takes the default.
        default: path to use without ``given``.

    Raises:
        UserError: a ``file://`` URI of another node.
    """
    if not given:
        return default
    text = str(given)
    if text.startswith(("file://", "local://")):
        host, _, path = text.partition("://")[2].partition("/")
        # `file://server/path` must not silently mean `/path` of this node.
        if host not in ("", "localhost"):
            raise UserError(f"{text}: a file on another host; write file:///{path} for this one")
        return Path("/", path)
    if is_uri(text):
        require_no_secret(text)
        return text.rstrip("/")
    return Path(text).expanduser().absolute()


def join_location(where: Location, *names: str) -> Location:
    """Return the location of ``names`` below ``where``."""
    return where.joinpath(*names) if isinstance(where, Path) else join_uri(where, *names)


def read_if_exists(where: Location) -> bytes | None:
    """Return the bytes of a small file, or ``None`` if the file does not exist."""
    try:
        if isinstance(where, Path):
            return where.read_bytes()
        return directories.read_bytes(where)
    except FileNotFoundError:
        return None


def write_if_absent(where: Location, data: bytes) -> bool:
    """Write a small file unless it exists; of several writers at most one succeeds.

    Args:
        where: path or URI of the file.
        data: content that no other writer has.

    Returns:
        Whether the file is that of this call.
    """
    if isinstance(where, Path):
        return local.create_file(where, data)
    return directories.create_bytes(where, data)


def write_location(where: Location, data: bytes) -> None:
    """Write a small file; readers see the old or the complete new one."""
    if isinstance(where, Path):
        with local.atomic_write(where) as stream:
            stream.write(data)
    else:
        directories.write_bytes(where, data)


def list_location(where: Location) -> list[str]:
    """Return the sorted names of the files in a folder; none if it is missing."""
    if isinstance(where, Path):
        return sorted(path.name for path in where.iterdir()) if where.is_dir() else []
    return [entry.name for entry in directories.list_files(where)]


def remove_location(where: Location) -> None:
    """Remove a file, if it exists."""
    if isinstance(where, Path):
        where.unlink(missing_ok=True)
    else:
        directories.remove_file(where)


def require_local_folder(given: str | Path | None, default: Path, key: str) -> Path:
    """Return a local folder given by the user, or the default.

    Args:
        given: path. Empty takes the default.
        default: path to use without ``given``.
        key: option, for the message.

    Raises:
        UserError: ``given`` is the URI of an object store.
    """
    found = parse_location(given, default)
    if isinstance(found, str):
        raise UserError(f"{key} takes a folder on this machine, not {found}")
    return found


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
        return directories.join_uri(self.uri, *names)

    def has(self, name: str) -> bool:
        """Return whether the store has a file, or a complete folder."""
        uri = self.uri_of(name)
        return directories.is_committed(uri) if _is_folder(name) else directories.object_exists(uri)

    def upload(self, *names: str, move: bool = False) -> None:
        """Upload those of the names that exist on this machine, one after the other.

        Args:
            names: in the order of commit. A folder without its manifest counts as missing.
            move: remove each file here once the store has it.
        """
        for name in names:
            path = self.local / name
            if _is_folder(name):
                if (path / directories.MANIFEST).is_file():
                    directories.put_directory(path, self.uri_of(name))
            elif path.is_file():
                directories.put_file(path, self.uri_of(name))
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
                    directories.get_file(self.uri_of(name), path)
            elif self.has(name):
                directories.get_directory(self.uri_of(name), path, check=self._check)

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
        old = {entry.name for entry in directories.list_files(target)}
        # Readers must never see the old commit together with new files.
        directories.remove_file(final.uri_of(local[-1]))
        directories.copy_files(self.uri, target, stored, on_file)
        final.upload(*local[:-1])
        for name in old - {*stored, *local}:
            directories.remove_file(final.uri_of(name))
        final.upload(local[-1])
        directories.remove_directory(self.uri)
        shutil.rmtree(self.local)


def _is_folder(name: str) -> bool:
    return name.endswith("/")
