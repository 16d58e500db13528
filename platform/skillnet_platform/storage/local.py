"""Local files: paths of the run root, hashes, and atomic writes of files and directories."""

import contextlib
import errno
import getpass
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from skillnet_files.commit import (
    commit_directory,
    make_scratch_directory,
    sync_directory,
    temporary_file,
)
from skillnet_platform.errors import UserError

HOME_VARIABLE = "SKILLNET_HOME"

#: Errors of a disk that takes no more, and of one that takes nothing.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Errors of a file system that has no hard links.
_WITHOUT_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
#: Texts of libraries that keep no error number, such as sqlite. Rust writes "(os error 28)".
_TEXTS = {
    "No space left on device": errno.ENOSPC,
    "database or disk is full": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "attempt to write a readonly database": errno.EROFS,
}
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")


def run_root() -> Path:
    """Return the run root: ``$SKILLNET_HOME``, or ``runs`` in the working directory.

    The path is absolute, so that a worker with another working directory finds the same folder.
    """
    return Path(os.environ.get(HOME_VARIABLE) or "runs").expanduser().absolute()


def data_root() -> Path:
    """Return the default folder of prepared corpora: ``<run root>/corpora``."""
    return run_root() / "corpora"


def archive_root() -> Path:
    """Return the default folder of downloads: ``<run root>/archives``."""
    return run_root() / "archives"


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in blocks."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces ``path`` when the block ends without error.

    Readers see the old file or the complete new file.

    Args:
        path: location of the file on the disk.
        mode: "wb", or "w" for UTF-8 text.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    final = Path(path)
    with contextlib.ExitStack() as stack:
        with _making(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            aside = stack.enter_context(temporary_file(final))
            opened = aside.open(mode, encoding=None if "b" in mode else "utf-8")
        with disk_guard(final):
            with opened as stream:
                yield stream
                stream.flush()
                # Before the rename: after a power loss the name must not lead to an empty file.
                os.fsync(stream.fileno())
            aside.replace(final)
            # A rename is durable only when its directory is synced.
            sync_directory(final.parent)


def create_file(path: str | os.PathLike[str], data: bytes) -> bool:
    """Write a complete file unless it exists; return whether this call wrote it.

    A link has one winner on every host that sees the disk, also on NFS.

    Args:
        path: place of the file.
        data: content that no other writer has.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    final = Path(path)
    with _making(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(final) as aside:
            aside.write_bytes(data)
            try:
                final.hardlink_to(aside)
            except FileExistsError:
                # NFS may repeat a request whose answer was lost.
                return final.read_bytes() == data
            except OSError as error:
                if error.errno not in _WITHOUT_LINKS:
                    raise
                with contextlib.suppress(FileExistsError), final.open("xb") as stream:
                    stream.write(data)
                    return True
                return False
            return True


@contextlib.contextmanager
def open_output(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that the user named, for example with ``--output``.

    A new file and a regular file are written atomically. A link, a pipe and a device, such as
    ``/dev/null``, are written through: a rename would replace them. Files of our own names use
    :func:`atomic_write`, because a link among received files must not lead out of their folder.

    Args:
        path: file to read.
        mode: "wb", or "w" for UTF-8 text.

    Raises:
        UserError: the disk is full, or the path cannot be written.
    """
    output = Path(path)
    try:
        found = output.lstat()
    except OSError:
        found = None  # a new file, or a path whose error the write reports
    if found is None or stat.S_ISREG(found.st_mode):
        with atomic_write(output, mode) as stream:
            if found is not None:
                # The new file must not be open to more users than the old one.
                os.fchmod(stream.fileno(), stat.S_IMODE(found.st_mode))
            yield stream
        return
    with _making(output):
        through = output.open(mode, encoding=None if "b" in mode else "utf-8")
    with disk_guard(output), through as stream:
        yield stream


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as indented JSON, atomically."""
    with atomic_write(path, "w") as stream:
        json.dump(obj, stream, ensure_ascii=False, indent=2)
        stream.write("\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        # A hostile file can nest deeper than Python's recursion limit.
        raise UserError(f"{path}: not a JSON file ({error})") from None


def read_record(
    path: str | os.PathLike[str], kinds: Mapping[str, type | tuple[type, ...]], remedy: str
) -> dict[str, Any]:
    """Read a JSON object and check some of its keys.

    Args:
        path: file to read.
        kinds: key -> type of its value.
        remedy: advice at the end of the error about a damaged file.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged: expected an object; {remedy}")
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind):
            raise UserError(f"{path} is damaged: {key} is missing or of another type; {remedy}")
    return record


@contextlib.contextmanager
def staging_directory(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Provide an empty directory that becomes ``final`` when the block ends without error.

    After an error the directory is removed. Leftovers of killed processes are removed first.

    Raises:
        UserError: the disk is full.
    """
    with scratch_directory(final) as aside, disk_guard(Path(final)):
        yield aside
        commit_directory(aside, final)


@contextlib.contextmanager
def scratch_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Provide an empty directory beside ``path`` that is removed when the block ends.

    Leftovers of killed processes are removed first.

    Raises:
        UserError: the directory cannot be created.
    """
    with contextlib.ExitStack() as stack:
        with _making(Path(path)):
            aside = stack.enter_context(make_scratch_directory(path))
        yield aside


@contextlib.contextmanager
def _making(path: Path) -> Iterator[None]:
    """Turn an OSError about a new file or folder into one message."""
    try:
        with disk_guard(path):
            yield
    except OSError as error:
        # "File exists" means a file at the path of a folder.
        is_file = isinstance(error, FileExistsError)
        why = os.strerror(errno.ENOTDIR) if is_file else error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({why}); give a writable folder") from error


@contextlib.contextmanager
def disk_guard(path: str | os.PathLike[str], needed: int | None = None) -> Iterator[None]:
    """Turn "no space left" of any library into one message about a path.

    Args:
        path: that is being written.
        needed: total bytes, if known.

    Raises:
        UserError: naming the path, the bytes free and the bytes needed.
    """
    try:
        yield
    except Exception as error:
        number = _find_number(error)
        if number not in FULL:
            raise
        raise UserError(_full_message(Path(path), needed, number)) from error


def explain_disk_error(error: BaseException) -> str | None:
    """Return the message about a disk that is full or cannot be written; None for another error.

    Args:
        error: exception of the system, or of a library that keeps the number or the text.
    """
    number = _find_number(error)
    # A copy that fails names its source first.
    named = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    path = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else None
    if number in FULL:
        return _full_message(path or run_root(), None, number)
    # Without a path it is about a socket or a process.
    if number not in CLOSED or (path is None and number != errno.EROFS):
        return None
    return (
        f"{path or run_root()}: cannot be used ({os.strerror(number)}). Change its permissions, or "
        f"give another folder; {HOME_VARIABLE} is the folder of all runs."
    )


def _find_number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    text = str(error)
    if found := _RUST_NUMBER.search(text):
        return int(found[1])
    return next((number for known, number in _TEXTS.items() if known in text), None)


def require_space(path: str | os.PathLike[str], needed: int) -> None:
    """Check before a long write that the disk has enough free bytes.

    Args:
        path: that will be written.
        needed: bytes.

    Raises:
        UserError: too few bytes are free; names path, free and needed bytes.
    """
    if free_bytes(Path(path)) < needed:
        raise UserError(_full_message(Path(path), needed))


def human_bytes(count: float) -> str:
    """Return a number of bytes with its unit: ``1536 -> "1.5 KiB"``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _full_message(path: Path, needed: int | None, number: int | None = errno.ENOSPC) -> str:
    free = f"{human_bytes(free_bytes(path))} free"
    if number not in (None, errno.ENOSPC):
        free = f"{os.strerror(number)}; {free}"  # a limit of the user
    takes = f"; it takes {human_bytes(needed)} ({needed} bytes)" if needed is not None else ""
    return (
        f"{path}: the disk is full ({free}){takes}. Free some space, or set "
        f"{HOME_VARIABLE} to a directory on a larger disk, and run the same command again."
    )


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds ``path`` or its nearest existing parent."""
    place = path.absolute()
    # `disk_usage` needs an existing path, and a new run has no directory yet.
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def process_is_alive(pid: int) -> bool:
    """Return whether a process of this machine has that id, of any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # The process exists, but belongs to another user.
        return True
    return True


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


@contextlib.contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables during a block, for its processes and libraries.

    Args:
        values: variable -> value.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def prepare_user_environment() -> None:
    """Set LOGNAME and HOME if this process has no user name or no home directory.

    Child processes, such as Ray's, inherit both.

    Raises:
        UserError: no private directory can be created.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        # Libraries read credentials in the home directory, so nobody else may write to it.
        temporary = Path(tempfile.gettempdir()) / name_user_directory()
        home = private_directory(temporary, "Set HOME to a directory of your own") / "home"
        home.mkdir(exist_ok=True)
        os.environ["HOME"] = str(home)
