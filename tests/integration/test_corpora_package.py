"""A format that another package adds by entry point is detected, inspected and prepared by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.data.shards.dataset import open_corpus

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed as any other."""
    root = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "tests" / "corpora_package", root / "source")
    what = ("--no-deps", "--no-build-isolation", "--no-index", "--target", str(root / "installed"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *what, str(root / "source")]
    subprocess.run(pip, check=True)
    return root / "installed"


@pytest.fixture(scope="module")
def poems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty poems, one of them empty."""
    folder = tmp_path_factory.mktemp("poems")
    for number in range(30):
        text = f"{'唐宋'[number % 2]}\n白日依山尽{number}\n黄河入海流\n欲穷千里目\n"
        (folder / f"{number:02d}.poem").write_text(text if number else "唐\n", encoding="utf-8")
    return folder


def prepare(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_command(installed, "prepare", *words)


def run_command(installed: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (installed, ROOT, ROOT / "platform")))
    return subprocess.run(
        [sys.executable, "-m", f"pipelines.{command}", *words, "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_it_is_prepared_by_its_name(installed: Path, poems: Path, tmp_path: Path) -> None:
    words = ["--corpus", f"poems={poems}", "--data", str(tmp_path), "--cpus", "1"]
    done = prepare(installed, *words, "--options.poems.verses", "2")
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout)["corpora"]["poems"]
    assert (entry["rows_in"], entry["rows_out"]) == (30, 29)
    corpus = open_corpus(tmp_path / "poems", verify=True)
    assert corpus.task == "text_classification"
    assert corpus.manifest["labels"] == ["唐", "宋"]
    assert corpus.manifest["quarantine"] == {"a poem without a dynasty or verses": 1}
    assert all(t.count("，") == 1 for t in corpus.splits["train"].column("text").to_pylist())


def test_it_is_guessed_and_its_options_are_checked(installed: Path, poems: Path) -> None:
    found = run_command(installed, "inspect", str(poems))
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["reader"] == "poems"
    wrong = prepare(installed, "--corpus", f"poems={poems}", "--options.poems.verse", "2")
    assert wrong.returncode == 2
    assert "did you mean 'verses'" in wrong.stderr
