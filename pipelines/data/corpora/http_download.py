"""Download of one file over HTTP, with a limit of its size; callers compare it with its pin."""

import ssl
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from skillnet_platform.errors import first_line
from skillnet_platform.secret_uri import redact_secrets

#: Seconds without data after which a download fails.
TIMEOUT_S = 60
_CHUNK = 2**20


def download_file(
    url: str, path: Path, max_bytes: int, authorization: str = "", cafile: str | None = None
) -> str:
    """Download a file, unverified; return the error message, or "".

    Args:
        url: http or https address; userinfo in it is not sent.
        path: file to write.
        max_bytes: size at which a longer download is cut.
        authorization: value of the header for the first host.
        cafile: further certificates to trust.
    """
    parts = urlsplit(url)
    # Userinfo belongs into the header: urllib takes it for a part of the host's name.
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    request = urllib.request.Request(plain)  # noqa: S310 - http or https, checked by the callers
    if authorization:
        # A redirect leads to another host, which must not see the token.
        request.add_unredirected_header("Authorization", authorization)
    context = ssl.create_default_context()
    if cafile:
        context.load_verify_locations(cafile)
    try:
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer,  # noqa: S310
            path.open("wb") as stream,
        ):
            left = max_bytes + 1
            while left and (part := answer.read(min(left, _CHUNK))):
                stream.write(part)
                left -= len(part)
    except (OSError, ValueError) as error:
        return f"{redact_secrets(url)}: {first_line(error)}"
    return ""
