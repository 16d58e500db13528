"""Atomic replacement of a saved model, and removal of leftovers of killed processes.

The names and the locks are those of ``skillnet_platform.storage.temporary``: a directory without a
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
        final: path that :func:`replace_folder` renames the directory to.
    """
    _restore_replaced(final)
    path, descriptor = _create(final)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def replace_folder(staging: Path, final: Path) -> None:
    """Rename a finished directory to ``final``.

    An older directory steps aside until the end, because a rename cannot replace it. After a kill
    between the two renames, the next :func:`staging_folder` restores it.

    Args:
        staging: from :func:`staging_folder`.
        final: a directory, or a path that does not exist.
    """
    if not final.exists():
        staging.rename(final)
        return
    old = _new_path(final, "old.tmp")
    # The lock stays with the directory under its new name.
    descriptor = _lock_shared(final)
    try:
        final.rename(old)
        try:
            staging.rename(final)
        except BaseException:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(descriptor)


def _new_path(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}.sn-{secrets.token_hex(8)}.{suffix}")


def _create(final: Path) -> tuple[Path, int]:
    while True:
        path = _new_path(final, "tmp")
        path.mkdir()
        # Another process may remove the directory until it is locked: then the next one is tried.
        with contextlib.suppress(FileNotFoundError):
            descriptor = _lock_shared(path)
            if path.exists():
                return path, descriptor
            os.close(descriptor)


def _restore_replaced(final: Path) -> None:
    """Remove what killed processes left, and restore a directory that none has replaced."""
    name = re.compile(rf"\.{re.escape(final.name)}\.sn-[0-9a-f]{{16}}(\.old)?\.tmp")
    for path in final.parent.iterdir():
        match = name.fullmatch(path.name)
        if match is None:
            continue
        # The directory of a living writer is locked, and that of another user is left alone.
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if match[1] and not final.exists():
                    path.rename(final)
                else:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _lock_shared(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    # A file system without locks keeps the leftovers of a kill.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor
