"""Files of a Debian package (deb(5)): an ar archive whose member ``data.tar.xz`` is a tar.

Nothing is extracted to the disk, and the scripts of the package are never read.
"""

import io
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipelines.data.io.archive import (
    ArchiveLimits,
    ByteBudget,
    MemberFilter,
    UnsafeArchiveError,
    iter_tar_stream,
)

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
        UnsafeArchiveError: the content exceeds a limit, or has links or devices.
        ValueError: the file has no ``data.tar.xz``.
    """
    with path.open("rb") as file:
        packed = io.BytesIO(_read_data(path, file, limits))
        size = len(packed.getbuffer())
        allowed = max(limits.ratio_free_bytes, size * limits.max_ratio)
        budget = ByteBudget(path, _XzStream(packed), min(limits.max_total_bytes, allowed))
        yield from iter_tar_stream(path, budget, wanted, limits)


def _read_data(path: Path, file: IO[bytes], limits: ArchiveLimits) -> bytes:
    """Return the member with the files, still compressed."""
    file.seek(len(_MAGIC))
    for _ in range(_MAX_MEMBERS):
        header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES:
            break
        name, size = header[:16].rstrip(b" /"), int(header[48:58])
        if size < 0 or size > limits.max_member_bytes:
            raise UnsafeArchiveError(path, f"{size} bytes in {name.decode('ascii', 'replace')!r}")
        if name == _DATA:
            data = file.read(size)
            if len(data) < size:
                raise EOFError(f"{_DATA.decode()} ends after {len(data)} of {size} bytes")
            return data
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError(f"it has no {_DATA.decode()}")


class _XzStream(io.RawIOBase):
    """Uncompressed bytes of an xz stream, with a limit of memory that ``lzma.open`` lacks."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES)

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes; b"" at the end."""
        while not self._xz.eof:
            more = self._packed.read(_CHUNK) if self._xz.needs_input else b""
            if self._xz.needs_input and not more:
                raise EOFError("the compressed data end too early")
            try:
                if data := self._xz.decompress(more, size):
                    return data
            except lzma.LZMAError as error:
                raise ValueError(f"not xz ({error})") from None
        return b""
