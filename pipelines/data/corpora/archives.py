"""Access to pinned zip, tar and Debian archives: members are read in place, with limits.

``skillnet fetch`` downloads the archives, and :func:`check_archive` compares them with their pins.
Nothing is extracted to the disk, and the scripts of a Debian package are never read.
"""

import errno
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipelines.data.io.archive import (
    ArchiveLimits,
    ByteBudget,
    MemberFilter,
    UnsafeArchiveError,
    iter_tar_members,
    iter_tar_stream,
    iter_zip_members,
)
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import sha256_file

_MAGIC = b"!<arch>\n"
#: Bytes of the header of a member: name, time, owner, group, mode, size, and two at the end.
_HEADER_BYTES = 60
_DATA = b"data.tar.xz"
#: Members of the ar that are searched: version, control, data and possibly a signature.
_MAX_MEMBERS = 8
#: Bytes that decompression may use; ``xz -9`` needs 65 MiB.
_MEMORY_BYTES = 128 * 2**20
_CHUNK = 2**16


def is_debian_package(path: Path) -> bool:
    """Return whether a file starts as an ar archive."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def iter_debian_members(
    path: Path, wanted: MemberFilter, limits: ArchiveLimits
) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of the wanted files that a package would install.

    Args:
        path: package.
        wanted: returns whether the member of a name, such as ``./usr/share/a``, is read.
        limits: limits of the content.

    Raises:
        UnsafeArchiveError: the content exceeds a limit, or has hard links or devices.
        ValueError: the file has no ``data.tar.xz``.
    """
    with path.open("rb") as file:
        size = _find_data(path, file, limits)
        allowed = max(limits.ratio_free_bytes, size * limits.max_ratio)
        budget = ByteBudget(path, _XzStream(file, size), min(limits.max_total_bytes, allowed))
        yield from iter_tar_stream(path, budget, wanted, limits, skip_symlinks=True)


def _find_data(path: Path, file: IO[bytes], limits: ArchiveLimits) -> int:
    """Move to the compressed member with the files, and return its size in bytes."""
    file.seek(len(_MAGIC))
    for _ in range(_MAX_MEMBERS):
        header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES:
            break
        name, size = header[:16].rstrip(b" /"), int(header[48:58])
        if size < 0 or size > limits.max_total_bytes:
            raise UnsafeArchiveError(path, f"{size} bytes in {name.decode('ascii', 'replace')!r}")
        if name == _DATA:
            return size
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError(f"it has no {_DATA.decode()}")


class _XzStream(io.RawIOBase):
    """Uncompressed bytes of an xz stream, with a limit of memory that ``lzma.open`` lacks.

    Args:
        packed: file at the start of the stream.
        size: compressed bytes.
    """

    def __init__(self, packed: IO[bytes], size: int) -> None:
        self._packed, self._size, self._left = packed, size, size
        self._xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES)

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes; b"" at the end."""
        while not self._xz.eof:
            more = b""
            if self._xz.needs_input:
                more = self._packed.read(min(_CHUNK, self._left))
                self._left -= len(more)
                if not more:
                    read = self._size - self._left
                    raise EOFError(f"{_DATA.decode()} ends after {read} of {self._size} bytes")
            try:
                if data := self._xz.decompress(more, size):
                    return data
            except lzma.LZMAError as error:
                raise ValueError(f"not xz ({error})") from None
        return b""


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
        source: source package of a Debian package, if its name is another one.
    """

    file: str
    bytes: int
    sha256: str
    registry: str
    requirement: str
    licence: str
    source: str = ""

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
