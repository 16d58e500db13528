"""Archives that must be unpacked before they are a corpus, and the message that says so."""

from pipelines.io.directory import SourceDirectory
from skillnet_platform.errors import UserError

#: Endings of archives, WebDataset's own tars among them.
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
#: So many are named.
MAX_NAMED = 3


def list_archives(place: SourceDirectory) -> list[str]:
    """Names of the archives in a folder, or that of the file itself."""
    if place.is_file:
        return [place.name] if _is_packed(place.name) else []
    return [e.name for e in place.entries() if not e.is_folder and _is_packed(e.name)]


def unpack_hint(place: SourceDirectory) -> str:
    """``". x.zip is an archive: …"``, to be put behind a message; "" where there is none."""
    found = list_archives(place)
    if not found:
        return ""
    more = " …" if len(found) > MAX_NAMED else ""
    one = len(found) == 1
    return (
        f". {', '.join(found[:MAX_NAMED])}{more} {'is an archive' if one else 'are archives'}: unpack "
        f"{'it' if one else 'them'} (unzip, or tar xf) and give the folder that comes of it"
    )


def missing_format_error(place: SourceDirectory, what: str) -> UserError:
    """The error that a place does not hold a format, with the hint where it is still packed."""
    return UserError(f"{place.uri}: {what}{unpack_hint(place)}")


def _is_packed(name: str) -> bool:
    return name.lower().endswith(ARCHIVE_SUFFIXES)
