"""Detection of archives that must be unpacked before a reader can use them, and the message."""

from pipelines.data.corpora.formats.unread_files import describe_unread_format
from pipelines.data.io.directory import SourceDirectory
from skillnet_platform.errors import UserError

#: Endings of archives. Tars are among them, because only the format webdataset reads them.
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
#: Archives that a message names.
MAX_NAMED = 3


def list_archives(source: SourceDirectory) -> list[str]:
    """Return the names of the archives in a directory, or the name of the file if it is one."""
    if source.is_file:
        return [source.name] if _is_archive(source.name) else []
    return [e.name for e in source.entries() if not e.is_folder and _is_archive(e.name)]


def unpack_hint(source: SourceDirectory) -> str:
    """Return ``". x.zip is an archive: …"`` to append to a message, or "" without archives."""
    found = list_archives(source)
    if not found:
        return ""
    more = " …" if len(found) > MAX_NAMED else ""
    single = len(found) == 1
    return (
        f". {', '.join(found[:MAX_NAMED])}{more} {'is an archive' if single else 'are archives'}: "
        f"unpack {'it' if single else 'them'} (unzip, or tar xf) and give the resulting directory"
    )


def missing_format_error(source: SourceDirectory, reason: str) -> UserError:
    """Return the error for a path that does not hold a format, with a hint about archives.

    Args:
        source: the path that was given.
        reason: which file or folder is missing.
    """
    if not list_archives(source) and (problem := describe_unread_format(source)):
        return UserError(f"{source.uri}: {problem}")
    empty = "an empty folder; " if is_empty_folder(source) else ""
    return UserError(f"{source.uri}: {empty}{reason}{unpack_hint(source)}")


def is_empty_folder(source: SourceDirectory) -> bool:
    """Return whether a path is a folder without a file, at any depth. Hidden files do not count."""
    return not source.is_file and next(source.walk(), None) is None


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVE_SUFFIXES)
