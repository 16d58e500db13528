"""Downloads of pinned files over HTTP, without apt or npm, with a limit of their size.

The mirror of Debian packages is the public one, or that of ``SKILLNET_DEBIAN_MIRROR``. The package
is never installed.

An npm package takes one request. The registry, its token and its certificates come from npm's own
configuration: environment, user's ``.npmrc``, then the machine's. A ``.npmrc`` of the working
directory is not read: it could send the value of any environment variable to its registry.
"""

import base64
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from skillnet_platform.errors import UserError, first_line
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


#: Environment variable: address of a mirror, the folder that contains ``pool``.
MIRROR_VARIABLE = "SKILLNET_DEBIAN_MIRROR"
PUBLIC_MIRROR = "https://deb.debian.org/debian"


def package_url(file: str, source: str = "") -> str:
    """Return the address of a package's file.

    Args:
        file: as apt names it, such as ``gcin-voice_0~20170223-3_all.deb``.
        source: its source package, if it has another name.

    Raises:
        UserError: the configured mirror is not an http address.
    """
    mirror = os.environ.get(MIRROR_VARIABLE) or PUBLIC_MIRROR
    if urlsplit(mirror).scheme not in ("http", "https"):
        raise UserError(
            f"{MIRROR_VARIABLE}: {redact_secrets(mirror)!r} is no web address. Set it to the https "
            "address of a Debian mirror, or remove it"
        )
    package = source or file.partition("_")[0]
    # apt writes the epoch of a version, such as "1%3a", into the name. The pool does not.
    listed = re.sub(r"_\d+%3a", "_", file, count=1)
    return f"{mirror.rstrip('/')}/pool/main/{package[0]}/{package}/{listed}"


def download_debian_package(file: str, source: str, target: Path, max_bytes: int) -> str:
    """Download a package from the mirror, unverified; return the error message, or "".

    Args:
        file: name of the package's file.
        source: its source package, if it has another name.
        target: folder of the download.
        max_bytes: size at which a longer download is cut.
    """
    return download_file(package_url(file, source), target / file, max_bytes)


PUBLIC_REGISTRY = "https://registry.npmjs.org/"
_GLOBAL_FILES = ("/usr/local/etc/npmrc", "/usr/etc/npmrc", "/etc/npmrc")


def read_npm_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return npm's settings; the environment comes before the user's file and the machine's.

    Args:
        environment: environment variables.
    """
    named = {
        name.lower().removeprefix("npm_config_"): value
        for name, value in environment.items()
        if name.lower().startswith("npm_config_") and value
    }
    user = named.get("userconfig") or Path(environment.get("HOME") or "~").expanduser() / ".npmrc"
    machine = [named["globalconfig"]] if "globalconfig" in named else [*reversed(_GLOBAL_FILES)]
    settings: dict[str, str] = {}
    for path in (*machine, user):
        settings |= _read_npmrc(Path(path), environment)
    return settings | named


def registry_url(package: str, settings: Mapping[str, str]) -> str:
    """Return the registry of a package, with a slash at the end.

    Args:
        package: its name, such as ``cnchar-data`` or ``@scope/name``.
        settings: configuration of npm, key to value.

    Raises:
        UserError: the configured registry is not an http address.
    """
    scope = package.partition("/")[0] if package.startswith("@") else ""
    found = settings.get(f"{scope}:registry") or settings.get("registry") or PUBLIC_REGISTRY
    if urlsplit(found).scheme not in ("http", "https"):
        raise UserError(
            f"npm's setting registry: {redact_secrets(found)!r} is no web address. Set it to the "
            "https address of a registry, or remove it"
        )
    return found.rstrip("/") + "/"


def download_package(requirement: str, target: Path, max_bytes: int) -> str:
    """Download an archive into a folder, unverified; return the error message, or "".

    Args:
        requirement: name and version, such as ``cnchar-data@1.1.0``.
        target: folder of the archive.
        max_bytes: size at which a longer download is cut.
    """
    package, _, version = requirement.rpartition("@")
    settings = read_npm_settings()
    registry = registry_url(package, settings)
    # npm names the file of @scope/name scope-name.
    file = f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    url = f"{registry}{package}/-/{package.rpartition('/')[2]}-{version}.tgz"
    return download_file(
        url, target / file, max_bytes, _authorization(registry, settings), settings.get("cafile")
    )


def _authorization(registry: str, settings: Mapping[str, str]) -> str:
    """Return the value of the header for a registry, or "".

    npm binds a secret to a registry: ``//host/path/:_authToken``. A secret of another host is never
    sent.
    """
    parts = urlsplit(registry)
    if parts.username and parts.password:
        return _basic(f"{parts.username}:{parts.password}")
    place = f"//{parts.netloc.rpartition('@')[2]}{parts.path}"
    while place != "//":
        for key in (place, place.rstrip("/")):
            found = {
                name: settings[f"{key}:{name}"]
                for name in ("_authToken", "_auth", "username", "_password")
                if f"{key}:{name}" in settings
            }
            if "_authToken" in found:
                return f"Bearer {found['_authToken']}"
            if "_auth" in found:
                return f"Basic {found['_auth']}"
            if {"username", "_password"} <= set(found):
                password = base64.b64decode(found["_password"]).decode()
                return _basic(f"{found['username']}:{password}")
        place = place.rstrip("/").rpartition("/")[0] + "/"
    return ""


def _basic(pair: str) -> str:
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _read_npmrc(path: Path, environment: Mapping[str, str]) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    found: dict[str, str] = {}
    for line in lines:
        key, equals, value = (part.strip() for part in line.partition("="))
        if equals and not key.startswith((";", "#")):
            found[key] = re.sub(
                r"\$\{(\w+)\}", lambda name: environment.get(name[1], name[0]), value.strip("\"'")
            )
    return found
