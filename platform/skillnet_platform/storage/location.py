"""Locations given by users: a path, or the URI of a folder in an object store."""

from pathlib import Path

from skillnet_platform.errors import UserError
from skillnet_platform.storage import local, objects
from skillnet_platform.storage.objects import is_uri, join_uri, require_no_secret

#: An absolute path, or a URI as plain text. ``file://`` URIs are paths.
Location = Path | str


def parse_location(given: str | Path | None, default: Path) -> Location:
    """Return the location of a user's text, or the default.

    ``pathlib`` turns ``s3://bucket`` into ``s3:/bucket``, so every user input passes through here.

    Args:
        given: path or URI. Empty takes the default.
        default: path to use without ``given``.

    Raises:
        UserError: a ``file://`` URI of another node.
    """
    if not given:
        return default
    text = str(given)
    if text.startswith(("file://", "local://")):
        host, _, path = text.partition("://")[2].partition("/")
        # `file://server/path` must not silently mean `/path` of this node.
        if host not in ("", "localhost"):
            raise UserError(f"{text}: a file on another host; write file:///{path} for this one")
        return Path("/", path)
    if is_uri(text):
        require_no_secret(text)
        return text.rstrip("/")
    return Path(text).expanduser().absolute()


def join_location(where: Location, *names: str) -> Location:
    """Return the location of ``names`` below ``where``."""
    return where.joinpath(*names) if isinstance(where, Path) else join_uri(where, *names)


def read_if_exists(where: Location) -> bytes | None:
    """Return the bytes of a small file, or ``None`` if the file does not exist."""
    try:
        if isinstance(where, Path):
            return where.read_bytes()
        return objects.read_bytes(where)
    except FileNotFoundError:
        return None


def write_if_absent(where: Location, data: bytes) -> bool:
    """Write a small file unless it exists; of several writers at most one succeeds.

    Args:
        where: path or URI of the file.
        data: content that no other writer has.

    Returns:
        Whether the file is that of this call.
    """
    if isinstance(where, Path):
        return local.create_file(where, data)
    return objects.create_bytes(where, data)


def write_location(where: Location, data: bytes) -> None:
    """Write a small file; readers see the old or the complete new one."""
    if isinstance(where, Path):
        with local.atomic_write(where) as stream:
            stream.write(data)
    else:
        objects.write_bytes(where, data)


def list_location(where: Location) -> list[str]:
    """Return the sorted names of the files in a folder; none if it is missing."""
    if isinstance(where, Path):
        return sorted(path.name for path in where.iterdir()) if where.is_dir() else []
    return [entry.name for entry in objects.list_files(where)]


def remove_location(where: Location) -> None:
    """Remove a file, if it exists."""
    if isinstance(where, Path):
        where.unlink(missing_ok=True)
    else:
        objects.remove_file(where)


def require_local_folder(given: str | Path | None, default: Path, key: str) -> Path:
    """Return a local folder given by the user, or the default.

    Args:
        given: path. Empty takes the default.
        default: path to use without ``given``.
        key: option, for the message.

    Raises:
        UserError: ``given`` is the URI of an object store.
    """
    found = parse_location(given, default)
    if isinstance(found, str):
        raise UserError(f"{key} takes a folder on this machine, not {found}")
    return found
