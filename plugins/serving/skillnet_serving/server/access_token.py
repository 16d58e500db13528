"""Who may use ``skillnet serve``: the bearer token, the hosts, and the pages of browsers.

:mod:`.http_server` compares the token, parses the host that a client asked for
(:func:`parse_authority`), and refuses requests of other sites' pages
(:func:`describe_foreign_page`). A token is never an argument: other users of a machine can read
command lines.
"""

import base64
import hashlib
import hmac
import ipaddress
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skillnet_platform.cluster import loopback
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from starlette.datastructures import Headers

TOKEN_VARIABLE = "SKILLNET_SERVE_TOKEN"  # noqa: S105 - a variable's name
#: Shortest token, in characters; a random one of 16 bytes has 22.
MIN_TOKEN_LENGTH = 16
MAX_TOKEN_LENGTH = 4096
#: A host with an optional port: no user, no other spelling of an address, no empty port.
_AUTHORITY = re.compile(
    r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*))"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
DEFAULT_PORTS = {"http": 80, "https": 443}
#: Values of Sec-Fetch-Site: the page of this server, or a user who typed the address.
OWN_SITES = ("same-origin", "none")
_MAKE_ONE = "Make one: (umask 077; openssl rand -hex 32 > token.txt)"


def read_token(path: str | None, host: str) -> str | None:
    """Return the token of a server: of a file, or of the environment.

    Args:
        path: location of the file, or None.
        host: interface that the server listens on.

    Returns:
        None without a token, on loopback.

    Raises:
        UserError: the interface is not loopback and no token is given; the file is unreadable or
            open to other users; the token is too short.
    """
    if path is not None:
        token, source = _read_token_file(Path(path)), f"--token_file {path}"
    else:
        token, source = os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE
        if not token:
            if loopback.is_loopback_host(host):
                return None
            raise UserError(
                f"--host {host}: everyone who reaches this interface could use the model. Give "
                f"--token_file FILE, or set {TOKEN_VARIABLE}. {_MAKE_ONE}"
            )
    if not MIN_TOKEN_LENGTH <= len(token) <= MAX_TOKEN_LENGTH or not token.isascii():
        raise UserError(
            f"{source}: a token has {MIN_TOKEN_LENGTH} to {MAX_TOKEN_LENGTH} ASCII characters. "
            f"{_MAKE_ONE}"
        )
    return token


def _read_token_file(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & 0o077:
                raise UserError(
                    f"--token_file {path}: other users can read this file. Run: chmod 600 {path}"
                )
            data = stream.read(MAX_TOKEN_LENGTH + 2)
    except OSError as error:
        raise UserError(f"--token_file {path}: cannot be read ({error.strerror})") from None
    return data.decode("ascii", "replace").strip()


def is_authorized(token: str | None, header: str | None) -> bool:
    """Return whether an ``Authorization`` header has the token, in constant time.

    A program sends ``Bearer TOKEN``. A browser asks its user and sends ``Basic``: the token is the
    password, with any user name.

    Args:
        token: secret of the server; None accepts every request.
        header: value of the header, or None.
    """
    if token is None:
        return True
    scheme, _, value = (header or "").partition(" ")
    given = value.strip()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode("ascii").partition(":")[2]
        except ValueError:
            return False
    elif scheme.lower() != "bearer":
        return False
    # Digests have one length, so the comparison does not tell the length of the token.
    digests = [hashlib.sha256(each.encode("utf-8", "replace")).digest() for each in (token, given)]
    return hmac.compare_digest(*digests)


@dataclass(frozen=True)
class RequestAuthority:
    """Host that a client asked for.

    Args:
        name: in lower case; an IPv6 address without brackets.
        port: or None.
        is_loopback: whether no other machine can have the name.
    """

    name: str
    port: int | None
    is_loopback: bool


def parse_authority(text: str) -> RequestAuthority | None:
    """Return the host of a ``Host`` header; None if it is anything but a host and a port.

    Args:
        text: value of the header.
    """
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return None
    name, port = (
        (found["name"] or "").lower(),
        None if found["port"] is None else int(found["port"]),
    )
    if found["address"] is not None:
        try:
            name = str(ipaddress.IPv6Address(found["address"]))
        except ValueError:
            return None
    if port is not None and not 0 < port <= 0xFFFF:
        return None
    return RequestAuthority(name, port, loopback.is_loopback_host(name))


def describe_foreign_page(headers: "Headers", authority: RequestAuthority | None) -> str | None:
    """Return why a browser's page of another site sent a request; None if none did.

    Args:
        headers: named fields of the request. Programs send neither of the headers of browsers.
        authority: that the client asked for.
    """
    # Browsers omit this header where a connection is neither encrypted nor local.
    if any(site not in OWN_SITES for site in headers.getlist("sec-fetch-site")):
        return (
            "Sec-Fetch-Site: a page of another site sent this request; open the server's own page"
        )
    for origin in headers.getlist("origin"):
        scheme, separator, rest = origin.partition("://")
        own = parse_authority(rest) if separator and scheme in DEFAULT_PORTS else None
        if own is None or authority is None or own.name != authority.name:
            return "Origin: send the request from the page of this server"
        default = DEFAULT_PORTS[scheme]
        if (own.port or default) != (authority.port or default):
            return "Origin: send the request from the page of this server"
    return None
