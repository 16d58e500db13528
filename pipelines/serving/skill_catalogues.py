"""Catalogues of packages of skills: a folder, a prefix of an object store, a repository of the Hub.

    FOLDER                       files NAME.skill
    s3://bucket/skills           objects NAME.skill
    hf:owner/name@REVISION       files NAME.skill of this revision

:func:`list_catalogue` reads the ends of each package, where its directory and ``skill.json`` lie.
A catalogue needs no index: an index would save two requests a package, and could be out of date.
``skillnet skills`` and ``skillnet add`` call this module.
"""

import contextlib
import difflib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast
from urllib.parse import quote

from skillnet.bounds import MAX_ABOUT_BYTES, PACKAGE_SUFFIX
from skillnet_files.commit import make_scratch_directory
from skillnet_platform.errors import UserError
from skillnet_platform.storage.directories import get_file, list_files, read_range
from skillnet_platform.storage.location import Location, parse_location

if TYPE_CHECKING:
    from skillnet.skill_packages import SkillPackage

HUB = "hf:"
#: Bytes of one request. The directory of a package and most ``skill.json`` are shorter.
BLOCK = 32 * 2**10
#: Bytes that the header of a package may take; a directory of MAX_FILES files has half a megabyte.
MAX_HEADER_BYTES = MAX_ABOUT_BYTES + 2**20
#: Packages whose headers are read at once.
STREAMS = 8
#: Names of a catalogue that a message lists.
SHOWN_NAMES = 20


@dataclass(frozen=True)
class CatalogueEntry:
    """A package of a catalogue.

    Args:
        name: to give to ``skillnet add NAME@PLACE``.
        tasks: that it adds.
        skills: that it adds; those of low rank with their rank.
        bytes: size of the file.
        base: SHA-256 of the weights of the base that all its tasks read.
        licences: names, of the corpora that its tasks were trained on.
        problem: why it is no package, or does not fit the given model; None otherwise.
    """

    name: str
    tasks: list[str]
    skills: list[str]
    bytes: int
    base: str | None
    licences: list[str]
    problem: str | None


def locate_catalogue(place: str) -> Location:
    """Return the location of a catalogue.

    Args:
        place: folder, URI, or ``hf:OWNER/NAME@REVISION``.

    Raises:
        UserError: a repository without a revision, or the URI may hold a secret.
    """
    if not place.startswith(HUB):
        return parse_location(place, Path())
    if place.startswith(f"{HUB}//"):
        raise UserError(f"{place}: write {HUB}OWNER/NAME@REVISION")
    repository, _, revision = place.removeprefix(HUB).partition("@")
    if not revision:
        raise UserError(
            f"{place}: name the revision, so that the package cannot change: {place}@COMMIT"
        )
    return f"hf://{repository}@{quote(revision, safe='')}"


def find_packages(place: str) -> dict[str, int]:
    """Return name -> size in bytes of the packages of a catalogue.

    Args:
        place: see :func:`locate_catalogue`.

    Raises:
        UserError: the place cannot be listed.
    """
    where = locate_catalogue(place)
    if isinstance(where, Path):
        paths = where.iterdir() if where.is_dir() else ()
        found = {path.name: path.stat().st_size for path in paths if path.is_file()}
    else:
        with _hub_errors(place):
            found = {entry.name: entry.bytes for entry in list_files(where)}
    return {
        name.removesuffix(PACKAGE_SUFFIX): size
        for name, size in sorted(found.items())
        if name.endswith(PACKAGE_SUFFIX) and "/" not in name
    }


def list_catalogue(place: str, model: Path | None = None) -> list[CatalogueEntry]:
    """Return the packages of a catalogue by name; damaged ones with the reason.

    Args:
        place: see :func:`locate_catalogue`.
        model: folder of a saved model that each package is compared with.

    Raises:
        UserError: the place has no packages, or cannot be listed.
    """
    sizes = find_packages(place)
    if not sizes:
        raise UserError(
            f"{place}: no saved model, and no packages (*{PACKAGE_SUFFIX}). Check the place"
        )
    where = locate_catalogue(place)
    # torch loads here: a place without packages does not need it.
    from skillnet.package_joins import explain_misfits

    def read(name: str) -> "SkillPackage | str":
        try:
            return _read_header(where, place, name, sizes[name])
        except UserError:
            raise
        # One package that is damaged or gone hides no other.
        except (ValueError, OSError) as error:
            return " ".join(str(error).split())

    # Requests to a store wait for each other's answers; a disk gains nothing.
    with ThreadPoolExecutor(STREAMS) as pool, _hub_errors(place):
        found = dict(zip(sizes, pool.map(read, sizes), strict=True))
    packages = {name: each for name, each in found.items() if not isinstance(each, str)}
    problems: dict[str, str | None] = {k: v for k, v in found.items() if isinstance(v, str)}
    if model is not None:
        problems |= dict(
            zip(packages, explain_misfits(model, list(packages.values())), strict=True)
        )
    return [_describe(name, sizes[name], packages.get(name), problems.get(name)) for name in sizes]


def _describe(
    name: str, size: int, package: "SkillPackage | None", problem: str | None
) -> CatalogueEntry:
    if package is None:
        return CatalogueEntry(name, [], [], size, None, [], problem)
    content = package.content
    skills = [
        f"{skill} (rank {content.low_rank[skill].rank})" if skill in content.low_rank else skill
        for skill in content.skills
    ]
    listed = [(task.serving or {}).get("licences") for task in content.tasks.values()]
    licences = {str(each) for found in listed if isinstance(found, list) for each in found}
    # Every task reads this file of the base.
    base = content.base.get("shared.safetensors")
    return CatalogueEntry(name, list(content.tasks), skills, size, base, sorted(licences), problem)


def _read_header(where: Location, place: str, name: str, size: int) -> "SkillPackage":
    from skillnet.skill_packages import read_package_header

    with contextlib.ExitStack() as stack:
        if isinstance(where, Path):
            file = stack.enter_context((where / f"{name}{PACKAGE_SUFFIX}").open("rb"))

            def read(start: int, end: int) -> bytes:
                file.seek(start)
                return file.read(end - start)
        else:
            read = partial(read_range, f"{where}/{name}{PACKAGE_SUFFIX}")
        return read_package_header(
            cast(IO[bytes], _RangedFile(read, size)), Path(f"{name}@{place}")
        )


class _RangedFile(io.RawIOBase):
    """File whose parts are read by requests, and kept.

    Args:
        read: returns the bytes from a start to an end.
        size: bytes of the file.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._read, self._size, self._place, self._total = read, size, 0, 0
        #: Start -> bytes from there.
        self._kept: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError("a place before the start of the file")
        self._place = start + offset
        return self._place

    def read(self, length: int | None = -1) -> bytes:
        rest = max(self._size - self._place, 0)
        wanted = rest if length is None or length < 0 else min(length, rest)
        found = self._find(self._place, wanted)
        self._place += len(found)
        return found

    def _find(self, start: int, length: int) -> bytes:
        for first, data in self._kept.items():
            if first <= start and start + length <= first + len(data):
                return data[start - first : start - first + length]
        # A directory lies at the end of the file, so the last block has what follows, too.
        first = min(start, max(self._size - BLOCK, 0))
        end = min(max(start + length, first + BLOCK), self._size)
        self._total += end - first
        if self._total > MAX_HEADER_BYTES:
            raise OSError(f"its header has more than {MAX_HEADER_BYTES} bytes")
        data = self._read(first, end)
        if len(data) != end - first:
            raise OSError("it changes while it is read")
        self._kept[first] = data
        return data[start - first : start - first + length]


@contextlib.contextmanager
def fetch_package(given: str, beside: Path) -> Iterator[Path]:
    """Provide the file of a package, downloaded if it is not on this machine.

    Args:
        given: file or URI, or NAME@PLACE.
        beside: path beside which a download lies while the block runs.

    Raises:
        UserError: there is no such package; names similar ones of its catalogue.
    """
    name, _, place = given.partition("@")
    if not place or "/" in name:
        place, _, file = given.rpartition("/")
        name = file.removesuffix(PACKAGE_SUFFIX)
        where = locate_catalogue(given)
    else:
        file = f"{name}{PACKAGE_SUFFIX}"
        folder = locate_catalogue(place)
        where = folder / file if isinstance(folder, Path) else f"{folder}/{file}"
    if isinstance(where, Path):
        if not where.is_file():
            raise UserError(f"{where}: no such package{_hint_names(name, str(where.parent))}")
        yield where
        return
    with make_scratch_directory(beside.parent / f".{beside.name}.download") as scratch:
        try:
            with _hub_errors(place):
                get_file(where, scratch / file)
        except FileNotFoundError:
            raise UserError(f"{given}: no such package{_hint_names(name, place)}") from None
        yield scratch / file


def _hint_names(name: str, place: str) -> str:
    """Return the names of a catalogue that are near a wrong one, and the first of all."""
    # The place itself may be wrong, and the first error says more.
    with contextlib.suppress(UserError, OSError):
        names: Sequence[str] = list(find_packages(place))
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        more = ", …" if len(names) > SHOWN_NAMES else ""
        return f"{hint} {place} has {', '.join(names[:SHOWN_NAMES]) or 'no packages'}{more}"
    return ""


@contextlib.contextmanager
def _hub_errors(place: str) -> Iterator[None]:
    """Explain the errors of the Hub's client, whose versions use different HTTP libraries."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        if not place.startswith(HUB):
            raise
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: the Hub does not answer ({problem})") from None
