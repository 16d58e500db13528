"""Paths, digests, and writing so that nothing half-written is ever taken for whole."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from skillnet_platform.errors import UserError

HOME_VARIABLE = "SKILLNET_HOME"


def run_root() -> Path:
    """Where everything that runs make is kept: ``$SKILLNET_HOME``, or ``runs`` in the working
    directory. Always absolute, so that a worker started elsewhere finds the same place."""
    return Path(os.environ.get(HOME_VARIABLE) or "runs").expanduser().absolute()


def data_root() -> Path:
    """Where prepared corpora are kept by default: ``<run root>/corpora``."""
    return run_root() / "corpora"


def archive_root() -> Path:
    """Where downloads are kept by default: ``<run root>/archives``."""
    return run_root() / "archives"


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Reads in blocks; memory stays small."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file beside ``path`` and put it in its place when the block ends without error.

    Readers see the old file or the whole new one. ``mode`` is "wb" or "w" (UTF-8).

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    final = Path(path)
    aside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    with _making(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        opened = aside.open(mode, encoding=None if "b" in mode else "utf-8")
    try:
        with disk_guard(final):
            with opened as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(final)
            _sync_directory(final.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as readable JSON, atomically."""
    with atomic_write(path, "w") as stream:
        json.dump(obj, stream, ensure_ascii=False, indent=2)
        stream.write("\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: not a JSON file ({problem})") from None


def read_record(
    path: str | os.PathLike[str], kinds: Mapping[str, type | tuple[type, ...]], remedy: str
) -> dict[str, Any]:
    """Read a JSON object that has some keys at least.

    Args:
        path: of the file.
        kinds: key -> what its value must be.
        remedy: what to do where the file is damaged.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    told = read_json(path)
    if not isinstance(told, dict):
        raise UserError(f"{path} is damaged: it holds no object; {remedy}")
    for key, kind in kinds.items():
        if not isinstance(told.get(key), kind):
            raise UserError(f"{path} is damaged: no {key}, or one of another kind; {remedy}")
    return told


@contextlib.contextmanager
def staging_directory(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty directory to fill; it becomes ``final`` when the block ends without error.

    After an error it is removed. What killed processes left beside ``final`` is removed first.

    Raises:
        UserError: the disk is full.
    """
    with scratch_directory(final) as aside, disk_guard(Path(final)):
        yield aside
        commit_directory(aside, final)


@contextlib.contextmanager
def scratch_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty directory beside ``path``; it is removed when the block ends, however.

    What killed processes left of theirs is removed first.

    Raises:
        UserError: it cannot be made there.
    """
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _making(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def commit_directory(tmp: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Put the finished directory ``tmp`` in place as ``final``, replacing one that is there.

    Its files are on the disk before the name changes. Both must be on one file system.
    """
    source, target = Path(tmp), Path(final)
    for folder, _, names in os.walk(source):
        for name in names:
            _sync_file(Path(folder) / name)
        _sync_directory(Path(folder))
    _remove_leftovers(target, "old.tmp")
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        source.rename(target)
    _sync_directory(target.parent)


@contextlib.contextmanager
def _making(path: Path) -> Iterator[None]:
    """Say in one message why a file or folder cannot be made at all."""
    try:
        with disk_guard(path):
            yield
    except OSError as problem:
        # "File exists" is what is said of a file where a folder should be.
        is_file = isinstance(problem, FileExistsError)
        why = os.strerror(errno.ENOTDIR) if is_file else problem.strerror or str(problem)
        raise UserError(f"{path}: cannot be written ({why}); give a folder that can") from problem


@contextlib.contextmanager
def disk_guard(path: str | os.PathLike[str], needed: int | None = None) -> Iterator[None]:
    """Turn "no space left", from whichever library, into one message.

    Args:
        path: what is being written.
        needed: bytes that it takes in all, if known.

    Raises:
        UserError: naming the path, the bytes free and the bytes needed.
    """
    try:
        yield
    except Exception as problem:
        full = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and "No space left on device" not in str(problem):
            raise
        raise UserError(_full_message(Path(path), needed)) from problem


def require_space(path: str | os.PathLike[str], needed: int) -> None:
    """Check, before a long write, that ``needed`` bytes are free where ``path`` will be.

    Raises:
        UserError: naming the path, the bytes free and the bytes needed.
    """
    if free_bytes(Path(path)) < needed:
        raise UserError(_full_message(Path(path), needed))


def human_bytes(count: float) -> str:
    """``1536 -> "1.5 KiB"``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _full_message(path: Path, needed: int | None) -> str:
    free = human_bytes(free_bytes(path))
    takes = f"; it takes {human_bytes(needed)} ({needed} bytes)" if needed is not None else ""
    return (
        f"{path}: the disk is full ({free} free){takes}. Free some space, or set "
        f"{HOME_VARIABLE} to a directory on a larger disk, and run the same command again."
    )


def free_bytes(path: Path) -> int:
    """Bytes free where ``path`` is, or would be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _remove_leftovers(final: Path, kind: str = "tmp") -> None:
    for left in final.parent.glob(f".{final.name}.*.{kind}"):
        pid = left.name.removeprefix(f".{final.name}.").split(".")[0]
        if pid.isdigit() and int(pid) != os.getpid() and process_is_alive(int(pid)):
            continue
        if left.name.endswith(".old.tmp") and not final.exists():
            left.rename(final)  # killed between the two renames: the old one is still whole
        else:
            shutil.rmtree(left, ignore_errors=True)


def process_is_alive(pid: int) -> bool:
    """Whether a process of this machine with that id runs, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
