"""What of a checkout goes to a cluster with a job: everything but what is made, secret or huge.

The package is a zip file with the same bytes for the same content, so a second job with unchanged
code uploads nothing: Ray names packages by their digest.
"""

import fnmatch
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from skillnet_platform import storage
from skillnet_platform.errors import UserError

#: Names of files and folders that are made anew, or useless elsewhere.
MADE = (
    *(".git", ".hg", ".svn", ".venv", "venv", ".tox", ".nox", "node_modules", "__pycache__"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".import_linter_cache"),
    *("*.egg-info", "*.pyc", "dist", "build", ".DS_Store"),
)
#: Names of runs and secrets. It is said when one of these stays here.
PRIVATE = (
    *("runs", "mlruns", "mlartifacts", "*.db"),
    *(".env", "*.env", ".env.*", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "*.keytab"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "auth_token", "admin-password"),
    *(".ssh", ".gnupg", ".aws", ".azure", ".gcloud", ".kube", ".docker", ".mlflow", ".ray"),
    *(".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".git-credentials", ".htpasswd"),
    *("credentials", "credentials.json", "credentials.csv"),
    *("client_secret*.json", "service-account*.json"),
)
#: How many of them are named.
NAMED = 6
#: Ray refuses a larger one.
LARGEST = 500 * 2**20
#: Above this something was hardly meant to be sent.
UNUSUAL = 50 * 2**20


@dataclass(frozen=True)
class JobPackage:
    """A zip file that is ready to be sent.

    Args:
        path: of the zip file.
        files: in it.
        size: bytes of the zip file.
        largest: (path, bytes) of the largest files before compression, largest first.
        kept: paths of what looks private and stays here.
    """

    path: Path
    files: int
    size: int
    largest: list[tuple[str, int]]
    kept: list[str] = field(default_factory=list)

    def words(self) -> str:
        """``312 files, 1.1 MiB; left here: .env, runs``."""
        text = f"{self.files} files, {storage.human_bytes(self.size)}"
        if not self.kept:
            return text
        more = f" and {len(self.kept) - NAMED} more" if len(self.kept) > NAMED else ""
        return f"{text}; left here: {', '.join(self.kept[:NAMED])}{more}"


def pack_working_dir(root: Path, target: Path, left_out: Sequence[str] = ()) -> JobPackage:
    """Write the package of the folder ``root`` to ``target``.

    Args:
        root: what jobs run in.
        target: a zip file to write.
        left_out: further names, or paths relative to ``root``, that stay here; ``*`` is a wildcard.

    Raises:
        UserError: it is larger than Ray takes; names the largest files.
    """
    sizes: dict[str, int] = {}
    kept: list[str] = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as package:
        for path in _chosen(root, [*MADE, *left_out], kept):
            name = path.relative_to(root).as_posix()
            content = path.read_bytes()
            entry = zipfile.ZipInfo(name)  # dated 1980: the same content gives the same bytes
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            package.writestr(entry, content)
            sizes[name] = len(content)
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    done = JobPackage(target, len(sizes), target.stat().st_size, largest, sorted(kept))
    if done.size > LARGEST:
        raise UserError(
            f"{root}: the upload would be {done.words()}, Ray takes up to "
            f"{storage.human_bytes(LARGEST)}; {describe_largest_files(done)}"
        )
    return done


def describe_largest_files(package: JobPackage) -> str:
    """The largest files in words, and how to leave them here."""
    named = ", ".join(f"{name} ({storage.human_bytes(size)})" for name, size in package.largest)
    return f"the largest are {named}; leave some here with --exclude NAME,NAME"


def _chosen(root: Path, patterns: Sequence[str], kept: list[str]) -> Iterator[Path]:
    """Files to send, in a fixed order. Links are not followed: they may lead out of the folder.

    What looks private is not among them; its path is put into ``kept``.
    """
    own = storage.run_root()

    def stays(path: Path) -> bool:
        if path.is_symlink() or _matches(path, root, patterns):
            return True
        if path != own and not _matches(path, root, PRIVATE):
            return False
        kept.append(path.relative_to(root).as_posix())
        return True

    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not (here / name / "pyvenv.cfg").is_file() and not stays(here / name)
        )
        for name in sorted(names):
            path = here / name
            if path.is_file() and not stays(path):
                yield path


def _matches(path: Path, root: Path, patterns: Sequence[str]) -> bool:
    relative = path.relative_to(root).as_posix()
    return any(
        fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(relative, pattern)
        for pattern in patterns
    )
