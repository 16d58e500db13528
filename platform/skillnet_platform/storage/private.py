"""Directories that no other user of the machine can enter."""

import os
import stat
from pathlib import Path

from skillnet_platform.errors import UserError

_OTHERS_ACCESS = 0o077
_OTHERS_ENTER = 0o011


def name_user_directory() -> str:
    """Return the name of this user's directory below a temporary directory that users share."""
    return f"skillnet-{os.geteuid()}"


def private_directory(path: str | os.PathLike[str], remedy: str) -> Path:
    """Create a directory of mode 0700, or check that an existing one is as private.

    Args:
        path: location of the directory. Its parent exists; other users may write to the parent if
            the parent is sticky, as ``/tmp`` is.
        remedy: what to do about a path that cannot be used, for the message.

    Raises:
        UserError: another user owns the path, may access it or can replace it; or it is a symbolic
            link or a file.
    """
    private = Path(path)
    try:
        private.mkdir(mode=0o700)
    except FileExistsError:
        pass  # possibly planted by another user: checked below
    except OSError as error:
        raise UserError(f"{private}: cannot be created ({error.strerror}). {remedy}.") from error
    # Not the target of a link: the owner of a link can exchange the target later.
    found = private.lstat()
    problem = ""
    if stat.S_ISLNK(found.st_mode):
        problem = "is a symbolic link"
    elif not stat.S_ISDIR(found.st_mode):
        problem = "is not a directory"
    elif found.st_uid != os.geteuid():
        problem = f"belongs to another user (uid {found.st_uid})"
    elif found.st_mode & _OTHERS_ACCESS:
        # Not repaired: others may have left files there.
        problem = f"is open to other users (mode {stat.S_IMODE(found.st_mode):04o})"
    elif replaceable := _find_replaceable(private.parent):
        problem = f"can be replaced by other users, who may write to {replaceable}"
    if problem:
        raise UserError(f"{private}: {problem}. {remedy}.")
    return private


def is_private(path: str | os.PathLike[str]) -> bool:
    """Return whether no other user can reach the entries of a directory."""
    resolved = Path(path).resolve()
    return any(not each.stat().st_mode & _OTHERS_ENTER for each in (resolved, *resolved.parents))


def _find_replaceable(parent: Path) -> Path | None:
    """Return the first directory above a path where any user can rename the entries of others."""
    resolved = parent.resolve()
    for each in (resolved, *resolved.parents):
        mode = each.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return each
    return None
