"""Git commit of the code of a run, for the tags of its MLflow run."""

import functools
import os
import subprocess
from pathlib import Path

from skillnet_platform.package_version import find_version

#: Tag that MLflow's pages show as the version of the source.
COMMIT_TAG = "mlflow.source.git.commit"
#: Whether tracked files differed from the commit.
MODIFIED_TAG = "skillnet.git.modified"
#: Commit of the code that a job received: the upload has no git folder.
COMMIT_VARIABLE = "SKILLNET_GIT_COMMIT"
#: Mark behind the commit in the variable if tracked files differed from it.
MODIFIED_MARK = "+"
#: Seconds that a run waits for git.
GIT_PATIENCE_S = 5.0


def commit_tags() -> dict[str, str]:
    """Return the tags of the commit of the code; none if the commit is unknown.

    The commit is that of the checkout of this package. An installed package has none, and the
    repository of the working directory counts: it holds the configuration files.
    """
    found = os.environ.get(COMMIT_VARIABLE) or read_commit(Path(__file__).parent) or _local_commit()
    if not found:
        return {}
    commit = found.removesuffix(MODIFIED_MARK)
    return {COMMIT_TAG: commit, MODIFIED_TAG: str(commit != found).lower()}


def find_source_commit() -> str:
    """Return the commit of this code, with a mark if files differ; its version without git."""
    tags = commit_tags()
    if tags:
        changed = tags[MODIFIED_TAG] == "true"
        return tags[COMMIT_TAG][:12] + (", with changes" if changed else "")
    version = find_version("skillnet-platform")
    return f"version {version}" if version else "unknown"


def commit_variable() -> dict[str, str]:
    """Return the environment variable that tells a job the commit of its code, or nothing."""
    found = os.environ.get(COMMIT_VARIABLE) or _local_commit()
    return {COMMIT_VARIABLE: found} if found else {}


def _local_commit() -> str:
    return read_commit(Path.cwd())


@functools.cache
def read_commit(folder: Path) -> str:
    """Return the commit of the repository that tracks a folder; "" without one.

    Args:
        folder: to look up.

    Returns:
        The hash, with ``MODIFIED_MARK`` behind it if tracked files differ from it.
    """
    # A virtual environment may be inside the repository of another project, which ignores it.
    if not _run_git(folder, "ls-files", "--", "."):
        return ""
    commit = _run_git(folder, "rev-parse", "--verify", "HEAD")
    changes = _run_git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + MODIFIED_MARK if commit and changes else commit


def _run_git(folder: Path, *words: str) -> str:
    # Without a lock: a run must not disturb git commands of the user.
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_PATIENCE_S)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
