"""Download of a Debian package without apt, or of a version that the machine's apt does not list.

The mirror is the public one, or that of ``SKILLNET_DEBIAN_MIRROR``. The package is never installed.
"""

import os
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.data.corpora.http_download import download_file
from skillnet_platform.errors import UserError
from skillnet_platform.secret_uri import redact_secrets

#: Environment variable: address of a mirror, the folder that contains ``pool``.
MIRROR_VARIABLE = "SKILLNET_DEBIAN_MIRROR"
PUBLIC_MIRROR = "https://deb.debian.org/debian"


def package_url(file: str) -> str:
    """Return the address of a package's file.

    Args:
        file: such as ``gcin-voice_0~20170223-3_all.deb``; the source package has the same name.

    Raises:
        UserError: the configured mirror is not an http address.
    """
    mirror = os.environ.get(MIRROR_VARIABLE) or PUBLIC_MIRROR
    if urlsplit(mirror).scheme not in ("http", "https"):
        raise UserError(
            f"{MIRROR_VARIABLE}: {redact_secrets(mirror)!r} is no web address. Set it to the https "
            "address of a Debian mirror, or remove it"
        )
    package = file.partition("_")[0]
    return f"{mirror.rstrip('/')}/pool/main/{package[0]}/{package}/{file}"


def download_debian_package(file: str, target: Path, max_bytes: int) -> str:
    """Download a package from the mirror, unverified; return the error message, or "".

    Args:
        file: name of the package's file.
        target: folder of the download.
        max_bytes: size at which a longer download is cut.
    """
    return download_file(package_url(file), target / file, max_bytes)
