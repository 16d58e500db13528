"""``tools/setup/install.sh``: the build of torch, and what follows if its index is unreachable."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tools/setup/install.sh"

#: Stands for Python: notes its words, and fails where one of them is in FAILS.
PYTHON = """#!/bin/bash
case "$*" in
    "-m pip config list") printf '%s\\n' "$PIP_CONFIG"; exit ;;
    "-m pip install --quiet uv"*) word=uv ;;
    "-m pip install"*) word=pip ;;
    *--dry-run*) word="ask:${*: -1}" ;;
    *) word=install ;;
esac
[[ "$*" != *--torch-backend* ]] || word+=":$(sed -E 's/.*--torch-backend (\\S+).*/\\1/' <<<"$*")"
[ "$word" != uv ] && echo "$word" >>"$CALLS"
[[ " $FAILS " != *" $word "* ]]
"""
NOT_FOUND, BY_PIP = "TORCH={}: uv cannot install", "pip installs .[train]"
ASK = "ask:torch>=2.9,<3"


@pytest.mark.parametrize(
    ("torch", "config", "fails", "calls", "said"),
    [
        (None, "", "", [f"{ASK}:auto", "install:auto"], ""),
        ("cpu", "", "", [f"{ASK}:cpu", "install:cpu"], ""),
        ("cuda", "", "", ["install"], ""),
        (None, "", f"{ASK}:auto", [f"{ASK}:auto", "install"], NOT_FOUND.format("auto")),
        ("cu130", "", f"{ASK}:cu130", [f"{ASK}:cu130", "install"], NOT_FOUND.format("cu130")),
        # The index answers, but the files of the build are out of reach.
        (
            None,
            "",
            "install:auto",
            [f"{ASK}:auto", "install:auto", "install"],
            NOT_FOUND.format("auto"),
        ),
        (
            None,
            "",
            f"{ASK}:auto install",
            [f"{ASK}:auto", "install", "pip"],
            BY_PIP,
        ),
        (None, "", "uv", ["pip"], BY_PIP),
        (None, "global.index-url='https://a.invalid'", "", ["pip"], BY_PIP),
        (None, "global.find-links='/wheels'", "", [f"{ASK}:auto", "install:auto"], ""),
    ],
    ids=range(10),
)
def test_the_build_of_torch_has_a_fallback(
    torch: str | None, config: str, fails: str, calls: list[str], said: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "TORCH"}
    environment |= {"CALLS": str(tmp_path / "calls"), "FAILS": fails, "PIP_CONFIG": config}
    environment |= {"TORCH": torch} if torch else {}
    words = [SCRIPT, python, ".[train]"]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text(encoding="utf-8").splitlines() == calls
    assert said in done.stderr
    assert bool(done.stderr) == bool(said)
