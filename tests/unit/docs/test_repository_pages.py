"""The README's limits, its links, the citation, the lock file and the image's recipe."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
MOST_LINES = 110
MOST_CELL_CHARACTERS = 40


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= MOST_LINES


def test_no_table_cell_of_the_readme_is_long() -> None:
    rows = [line for line in README.splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
    assert [cell for cell in cells if len(cell) > MOST_CELL_CHARACTERS] == []


def test_the_readme_states_its_status() -> None:
    head = README[: README.index("## ")]
    assert "tested on CPU and on emulated nodes; not yet on a GPU or a cloud" in head


def test_the_readme_has_one_results_table_with_five_rows() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    assert len(tables) == 1
    assert tables[0].count("\n") == 2 + 5


def test_links_of_the_front_pages_exist() -> None:
    missing = [
        f"{page}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text("utf-8"))
        if "://" not in target and not (ROOT / target).exists()
    ]
    assert missing == []


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_the_lock_file_refers_to_the_public_index_only() -> None:
    text = (ROOT / "uv.lock").read_text(encoding="utf-8")
    hosts = set(re.findall(r"https?://([^/\"]+)", text))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}


def test_the_image_contains_every_package() -> None:
    recipe = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in ("configs", "platform", "skillnet", "pipelines", "sweeps"):
        assert f"COPY {name} {name}\n" in recipe
        assert f"!{name}" in ignored


def test_the_dockerfile_passes_hadolint() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.is_file():
        pytest.skip("needs hadolint (the extra docs)")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_workflow_runs_the_ci_script() -> None:
    path = ROOT / ".github" / "workflows" / "ci.yml"
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    commands = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert "bash .ci/run" in commands


def test_the_workflow_names_actions_by_their_commits() -> None:
    """A tag can be moved to other code."""
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    used = [
        line.partition("uses:")[2].strip()
        for path in workflows
        for line in path.read_text(encoding="utf-8").splitlines()
        if "uses:" in line
    ]
    assert used
    assert [
        each for each in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v[\d.]+", each)
    ] == []


def test_images_of_the_workflow_and_the_dockerfile_have_digests() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    images = re.findall(r"^FROM (.*)", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    for job in workflow["jobs"].values():
        # A job with several images takes each from its matrix.
        images += (
            job.get("strategy", {}).get("matrix", {}).get("image", [job["container"]["image"]])
        )
    assert len(images) == 4
    assert [each for each in images if not re.fullmatch(r"[^@]+@sha256:[0-9a-f]{64}", each)] == []
