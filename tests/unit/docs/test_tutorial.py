"""The tutorial "your first own task": each of its blocks runs as it is printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tutorials" / "first-own-task.md"
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


@pytest.mark.integration
def test_the_tutorial_runs_as_printed(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "SKILLNET_HOME": str(tmp_path / "runs"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    output = {}
    for language, title, code in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if title:
            (tmp_path / title).write_text(code, encoding="utf-8")
        elif language in ("python", "bash"):
            output[code.split("\n")[0]] = run_block(language, code, tmp_path, environment)
    described = next(text for code, text in output.items() if "inspect" in code)
    assert "image_classification" in described
    assert "test 185, train 1520, validation 92" in " ".join(described.split())
    trained = next(text for code, text in output.items() if "--name digits-skillnet" in code)
    accuracy = re.search(r"accuracy ([\d.]+) %", trained)
    assert accuracy
    assert float(accuracy[1]) > 80
    reports = list((tmp_path / "runs" / "comparisons").rglob("report.html"))
    assert len(reports) == 1
    text = reports[0].read_text(encoding="utf-8")
    assert "dense" in text
    assert "read digit" in text
