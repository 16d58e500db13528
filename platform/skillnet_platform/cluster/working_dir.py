"""Working directory of a job: the checkout without generated, private and large files.

The package is a zip file with equal bytes for equal content. Ray names packages by their digest,
so a second job with unchanged code uploads nothing.
"""

import fnmatch
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from skillnet_platform import storage
from skillnet_platform.errors import UserError

#: Names of generated files and folders.
GENERATED = (
    *(".git", ".hg", ".svn", ".venv", "venv", ".tox", ".nox", "node_modules", "__pycache__"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".import_linter_cache"),
    *("*.egg-info", "*.pyc", "dist", "build", ".DS_Store"),
)
#: Names of runs and secrets. The upload message lists the ones that stay on this machine.
PRIVATE = (
    *("runs", "mlruns", "mlartifacts", "*.db"),
    *(".env", "*.env", ".env.*", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "*.keytab"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "auth_token", "admin-password"),
    *(".ssh", ".gnupg", ".aws", ".azure", ".gcloud", ".kube", ".docker", ".mlflow", ".ray"),
    *(".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".git-credentials", ".htpasswd"),
    *("credentials", "credentials.json", "credentials.csv"),
    *("client_secret*.json", "service-account*.json"),
)
#: Number of private names in the message.
MAX_LISTED = 6
#: Limit of Ray for a package.
MAX_BYTES = 500 * 2**20
#: A larger package probably holds a file by mistake.
UNUSUAL = 50 * 2**20


@dataclass(frozen=True)
class JobPackage:
    """Zip file of a job's code.

    Args:
        path: location of the zip file.
        files: number of files in it.
        size: bytes of the zip file.
        largest: (path, bytes) of the largest files before compression, largest first.
        kept: private paths that are not uploaded.
    """

    path: Path
    files: int
    size: int
    largest: list[tuple[str, int]]
    kept: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return a summary: ``312 files, 1.1 MiB; not uploaded: .env, runs``."""
        text = f"{self.files} files, {storage.human_bytes(self.size)}"
        if not self.kept:
            return text
        more = f" and {len(self.kept) - MAX_LISTED} more" if len(self.kept) > MAX_LISTED else ""
        return f"{text}; not uploaded: {', '.join(self.kept[:MAX_LISTED])}{more}"


def pack_working_dir(root: Path, target: Path, excluded: Sequence[str] = ()) -> JobPackage:
    """Write the package of a checkout.

    Args:
        root: working directory of jobs.
        target: zip file to write.
        excluded: further names, or paths relative to ``root``, to leave out; ``*`` is a wildcard.

    Raises:
        UserError: the package is larger than Ray accepts; names the largest files.
    """
    sizes: dict[str, int] = {}
    kept: list[str] = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as package:
        for path in _chosen(root, [*GENERATED, *excluded], kept):
            name = path.relative_to(root).as_posix()
            content = path.read_bytes()
            entry = zipfile.ZipInfo(name)  # dated 1980: the same content gives the same bytes
            # Scripts must stay executable on the nodes.
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            package.writestr(entry, content)
            sizes[name] = len(content)
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    done = JobPackage(target, len(sizes), target.stat().st_size, largest, sorted(kept))
    if done.size > MAX_BYTES:
        raise UserError(
            f"{root}: the upload would be {done.summary()}, the limit of Ray is "
            f"{storage.human_bytes(MAX_BYTES)}; {describe_largest_files(done)}"
        )
    return done


def describe_largest_files(package: JobPackage) -> str:
    """Return the names of the largest files, and how to exclude them."""
    named = ", ".join(f"{name} ({storage.human_bytes(size)})" for name, size in package.largest)
    return f"the largest are {named}; exclude some with --exclude NAME,NAME"


def _chosen(root: Path, patterns: Sequence[str], kept: list[str]) -> Iterator[Path]:
    """Yield the files to upload in a fixed order, and collect private paths in ``kept``.

    Symbolic links are skipped: they may lead out of the folder.
    """
    own = storage.run_root()

    def stays(path: Path) -> bool:
        if path.is_symlink() or _matches(path, root, patterns):
            return True
        # A package of code may have the name of a private folder, as pipelines/training/runs has.
        # A hidden folder can be no package, so folders of secrets stay in any case.
        if path != own and path.name.isidentifier() and (path / "__init__.py").is_file():
            return False
        if path != own and not _matches(path, root, PRIVATE):
            return False
        kept.append(path.relative_to(root).as_posix())
        return True

    for folder, folders, names in os.walk(root):
        here = Path(folder)
        # In place, so that os.walk skips the others; sorted, so that the zip file is reproducible.
        folders[:] = sorted(
            name
            for name in folders
            # A virtual environment can have any name; this file marks it.
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
