"""Bearer token of ``skillnet serve``: where it comes from, and its comparison.

A token is never an argument: other users of a machine can read command lines.
"""

import base64
import hashlib
import hmac
import os
import stat
from pathlib import Path

from skillnet_platform.cluster import loopback
from skillnet_platform.errors import UserError

TOKEN_VARIABLE = "SKILLNET_SERVE_TOKEN"  # noqa: S105 - a variable's name
#: Shortest token, in characters; a random one of 16 bytes has 22.
MIN_TOKEN_LENGTH = 16
MAX_TOKEN_LENGTH = 4096
_MAKE_ONE = "Make one: (umask 077; openssl rand -hex 32 > token.txt)"


def read_token(path: str | None, host: str) -> str | None:
    """Return the token of a server: of a file, or of the environment.

    Args:
        path: of the file, or None.
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
        token: of the server; None accepts every request.
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
