"""A folder on this machine and its copy in an object store.

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

from skillnet_platform.storage import directories


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
