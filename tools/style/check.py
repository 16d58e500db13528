"""Check language and names: ``python -m tools.style.check [PATH ...]``; exits with 1 on findings.

With ``--sections`` it also lists public functions whose docstrings lack ``Args``.
"""

import subprocess
import sys
from pathlib import Path

from tools.style.names import (
    PACKAGES,
    comment_shares,
    find_bad_names,
    find_empty_entries,
    missing_sections,
)
from tools.style.words import find_banned_words

ROOT = Path(__file__).resolve().parents[2]


def tracked_files(root: Path = ROOT) -> list[str]:
    """Return all files of the repository that are tracked or new, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return sorted({name for name in done.stdout.splitlines() if (root / name).is_file()})


def main(argv: list[str]) -> int:
    """Print findings below the given paths, or of the repository; return the exit code."""
    paths = [path.rstrip("/") for path in argv if not path.startswith("--")]
    files = tracked_files()
    modules = [name for name in files if name.startswith(tuple(f"{p}/" for p in PACKAGES))]
    findings = [*find_banned_words(ROOT, files), *find_bad_names(ROOT, modules)]
    findings += find_empty_entries(ROOT, files)
    if "--sections" in argv:
        findings += missing_sections(ROOT, modules)
    chosen = [f for f in findings if not paths or any(f.startswith(p) for p in paths)]
    print("\n".join(chosen))
    shares = comment_shares(ROOT, modules)
    text = ", ".join(f"{package} {share:.1%}" for package, share in shares.items())
    print(f"{len(chosen)} finding(s); comments: {text}", file=sys.stderr)
    return 1 if chosen else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
