"""What of a checkout goes to a cluster with a job: everything but what is made, secret or huge.

The package is a zip file with the same bytes for the same content, so a second job with unchanged
code uploads nothing: Ray names packages by their digest.
"""

import fnmatch
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from skillnet_platform import storage
from skillnet_platform.errors import UserError

#: Names of files and folders that stay here, wherever they are.
LEFT_OUT = (
    *(".git", ".hg", ".svn", ".venv", "venv", ".tox", ".nox", "node_modules", "__pycache__"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".import_linter_cache"),
    *("*.egg-info", "*.pyc", "dist", "build", "mlruns", "mlartifacts", "*.db", ".DS_Store"),
    *(".env", "*.pem", "*.key", "auth_token"),
)
#: Ray refuses a larger one.
LARGEST = 500 * 2**20
#: Above this something was hardly meant to be sent.
UNUSUAL = 50 * 2**20


@dataclass(frozen=True)
class Package:
    """A zip file that is ready to be sent.

    Args:
        path: of the zip file.
        files: in it.
        size: bytes of the zip file.
        largest: (path, bytes) of the largest files before compression, largest first.
    """

    path: Path
    files: int
    size: int
    largest: list[tuple[str, int]]

    def words(self) -> str:
        """``312 files, 1.1 MiB``."""
        return f"{self.files} files, {storage.human_bytes(self.size)}"


def pack(root: Path, target: Path, left_out: Sequence[str] = ()) -> Package:
    """Write the package of the folder ``root`` to ``target``.

    Args:
        root: what jobs run in.
        target: a zip file to write.
        left_out: further names, or paths relative to ``root``, that stay here; ``*`` is a wildcard.

    Raises:
        UserError: it is larger than Ray takes; names the largest files.
    """
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as package:
        for path in _chosen(root, [*LEFT_OUT, *left_out]):
            name = path.relative_to(root).as_posix()
            content = path.read_bytes()
            entry = zipfile.ZipInfo(name)  # dated 1980: the same content gives the same bytes
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            package.writestr(entry, content)
            sizes[name] = len(content)
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    done = Package(target, len(sizes), target.stat().st_size, largest)
    if done.size > LARGEST:
        raise UserError(
            f"{root}: the upload would be {done.words()}, Ray takes up to "
            f"{storage.human_bytes(LARGEST)}; {heaviest(done)}"
        )
    return done


def heaviest(package: Package) -> str:
    """The largest files in words, and how to leave them here."""
    named = ", ".join(f"{name} ({storage.human_bytes(size)})" for name, size in package.largest)
    return f"the largest are {named}; leave some here with --exclude NAME,NAME"


def _chosen(root: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Files to send, in a fixed order. Links are not followed: they may lead out of the folder."""
    own = storage.run_root()
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not _matches(here / name, root, patterns)
            and here / name != own
            and not (here / name / "pyvenv.cfg").is_file()
            and not (here / name).is_symlink()
        )
        for name in sorted(names):
            path = here / name
            if path.is_file() and not path.is_symlink() and not _matches(path, root, patterns):
                yield path


def _matches(path: Path, root: Path, patterns: Sequence[str]) -> bool:
    relative = path.relative_to(root).as_posix()
    return any(
        fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(relative, pattern)
        for pattern in patterns
    )
