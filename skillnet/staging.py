"""Temporary directory of a model that is being saved, and removal of those that a kill left.

The names and the lock are those of ``skillnet_platform.storage.temporary``: a directory without a
lock has no living writer. This package imports no other, so it has its own short version.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staging_folder(final: Path) -> Iterator[Path]:
    """Create an empty directory beside ``final``, and remove it at the end unless it was renamed.

    Args:
        final: path that the caller renames the directory to.
    """
    _remove_dead(final)
    path, descriptor = _create(final)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _create(final: Path) -> tuple[Path, int]:
    while True:
        path = final.with_name(f".{final.name}.sn-{secrets.token_hex(8)}.tmp")
        path.mkdir()
        # Another process may remove the directory until it is locked: then the next one is tried.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            # A file system without locks keeps the leftovers of a kill.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if path.exists():
                return path, descriptor
            os.close(descriptor)


def _remove_dead(final: Path) -> None:
    name = re.compile(rf"\.{re.escape(final.name)}\.sn-[0-9a-f]{{16}}\.tmp")
    for path in final.parent.iterdir():
        if name.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                # A living writer holds the lock.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A kill between the two renames of a replacement left the old model in here.
                if (path / final.name).is_dir() and not final.exists():
                    (path / final.name).rename(final)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
