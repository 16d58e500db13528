"""What a user gives where a folder is asked for: a path, or the URI of a place in a store."""

from pathlib import Path

from skillnet_platform.errors import UserError
from skillnet_platform.storage import objects
from skillnet_platform.storage.objects import is_uri, join_uri

#: An absolute path, or a URI as plain text. ``file://`` URIs are paths.
Location = Path | str


def parse_location(given: str | Path | None, default: Path) -> Location:
    """The place that was given, or the default.

    ``pathlib`` would make ``s3:/bucket`` of ``s3://bucket``: whoever takes a place from a user
    asks here first.

    Raises:
        UserError: a ``file://`` URI that names another host.
    """
    if not given:
        return default
    text = str(given)
    if text.startswith(("file://", "local://")):
        host, _, path = text.partition("://")[2].partition("/")
        if host not in ("", "localhost"):
            raise UserError(f"{text}: a file on another host; write file:///{path} for this one")
        return Path("/", path)
    if is_uri(text):
        return text.rstrip("/")
    return Path(text).expanduser().absolute()


def join_location(where: Location, *names: str) -> Location:
    """A place below another."""
    return where.joinpath(*names) if isinstance(where, Path) else join_uri(where, *names)


def read_if_exists(where: Location) -> bytes | None:
    """The bytes of a small file of a place, or none if there is no such file."""
    try:
        if isinstance(where, Path):
            return where.read_bytes()
        return objects.read_bytes(where)
    except FileNotFoundError:
        return None


def require_local_folder(given: str | Path | None, default: Path, key: str) -> Path:
    """The folder on this machine that was given, or the default.

    Raises:
        UserError: it is a place in a store; names the key.
    """
    found = parse_location(given, default)
    if isinstance(found, str):
        raise UserError(f"{key} takes a folder on this machine, not {found}")
    return found
