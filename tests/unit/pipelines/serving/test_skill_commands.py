"""``skillnet pack``, ``add``, ``remove`` and ``skills`` on the folder of a served model."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import predict
from pipelines import skills as commands
from pipelines.serving import bundle
from skillnet import SkillNet
from tests.helpers.file_forms import draw_png
from tests.helpers.hub_server import serve_hub
from tests.helpers.served_place import ServedPlace, pack_shapes

ROOT = Path(__file__).resolve().parents[4]
GIVEN = ("shapes@hf:owner/skills@v1", "shapes@hf:owner/skills", "no@hf:owner/skills@v1")


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture
def model(place: ServedPlace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place.bundle, tmp_path / "model"))


def read(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_an_added_task_predicts_and_a_removed_one_leaves_no_trace(
    shelf: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(model)
    capsys.readouterr()
    assert commands.join_packages([f"shapes@{shelf}", "--to", str(model), "--json"]) == 0
    proofs = {proof["task"]: proof for proof in read(capsys)}
    assert {task for task, proof in proofs.items() if proof["package"] is None} == set(
        bundle.check_bundle(model)["tasks"]
    ) - {"shape"}
    assert not any(proof["differing"] for proof in proofs.values())
    assert proofs["shape"]["package"] == "shapes"
    assert bundle.check_bundle(model)["evaluation"][-1]["metric"] == "accuracy"
    answer = SkillNet.from_pretrained(model).classify(
        [torch.zeros(30, 30, 3, dtype=torch.uint8).numpy()], task="shape"
    )
    assert str(answer[0]).find("heart") + str(answer[0]).find("star") > -2
    image = model.parent / "a.png"
    image.write_bytes(draw_png())
    capsys.readouterr()
    assert predict.main([str(image), "--model", str(model), "--json"]) == 0
    assert [each["task"] for each in read(capsys)] == ["shape", "text_to_image"]
    assert commands.print_skills([str(model), "--json"]) == 0
    listed = {entry["name"]: entry for entry in read(capsys)}
    assert listed["counting"]["package"] == "shapes"
    assert listed["counting"]["tasks"] == ["shape"]
    assert listed["general"]["package"] is None
    assert commands.print_skills([str(model)]) == 0
    assert "counting" in capsys.readouterr().out
    assert commands.drop_packages(["shapes", "--from", str(model)]) == 0
    assert hashes(model) == before


def test_a_package_comes_from_a_pinned_revision_of_the_hub(
    shelf: Path, model: Path, tmp_path: Path
) -> None:
    with serve_hub() as hub:
        content = (shelf / "shapes.skill").read_bytes()
        hub.repositories["owner/skills@v1"] = {"shapes.skill": content}
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        script = (
            "import sys; from pipelines import skills; sys.exit(skills.join_packages(sys.argv[1:]))"
        )
        found = {}
        for given in (
            "shapes@hf:owner/skills@v1",
            "shapes@hf:owner/skills",
            "no@hf:owner/skills@v1",
        ):
            words = [sys.executable, "-c", script, given, "--to", str(model)]
            found[given] = subprocess.run(
                words, env=environment, capture_output=True, text=True, check=False, timeout=300
            )
    first, unpinned, missing = found.values()
    assert first.returncode == 0, first.stderr
    assert "name the revision" in unpinned.stderr
    assert "it cannot be downloaded" in missing.stderr
    assert "shape" in bundle.check_bundle(model)["tasks"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none@{shelf}", "--to", "{model}"], "none.skill: no such package. {shelf} has shapes"),
        (["{shelf}/none.skill", "--to", "{model}"], "no such package"),
        (["{shelf}/grown/manifest.json", "--to", "{model}"], "no whole package of skills"),
        (["shapes@{shelf}"], "--to: give the folder of a model"),
        (["shapes@{shelf}", "--to", "{shelf}"], "no saved model"),
        (["--to", "{model}"], "packages: give at least one"),
    ],
)
def test_a_wrong_argument_ends_with_one_sentence(
    words: list[str],
    message: str,
    shelf: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = hashes(model)
    filled = [word.format(shelf=shelf, model=model) for word in words]
    assert commands.join_packages(filled) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message.format(shelf=shelf) in said
    assert "Traceback" not in said
    assert hashes(model) == before


def test_a_package_without_settings_for_predictions_joins_no_served_model(
    shelf: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from skillnet.skill_packages import pack_skills

    pack_skills(shelf / "grown", ["shape"], tmp_path / "bare.skill", program="0.1.0")
    before = hashes(model)
    assert commands.join_packages([str(tmp_path / "bare.skill"), "--to", str(model)]) == 2
    assert "no settings for predictions" in capsys.readouterr().err
    assert hashes(model) == before
    plain = tmp_path / "plain"
    SkillNet.from_pretrained(model).save_pretrained(plain)
    assert commands.join_packages([str(tmp_path / "bare.skill"), "--to", str(plain)]) == 0


@pytest.mark.integration
def test_the_demo_of_packages_prints_what_the_readme_quotes(
    place: ServedPlace, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(place.bundle, runs / "quickstart-1")
    for package, task in (("stroke-count", "stroke_count"), ("radical", "radical")):
        made = pack_shapes(place, tmp_path / package, package, task, "text_to_video")
        (runs / "skills").mkdir(exist_ok=True)
        made.rename(runs / "skills" / made.name)
    (runs / "skills" / "base-of-quickstart-1").touch()
    environment = {
        **os.environ,
        "SKILLNET_HOME": str(runs),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "160",
    }
    done = subprocess.run(
        ["sh", "examples/skills.sh"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.replace(str(runs), "runs").splitlines()
    digests = [line.split()[-1] for line in printed if line.startswith("SHA-256 of all files")]
    assert len(set(digests)) == 1
    assert len(digests) == 2
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = readme[readme.index("$ skillnet add") :].partition("```")[0].splitlines()
    assert [line for line in quoted if mask(line) not in map(mask, printed)] == []


def test_the_demo_grows_its_skills_once_or_says_why_not(tmp_path: Path) -> None:
    stub = tmp_path / "bin" / "skillnet"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$1" >>calls\n[ "$1" != "$FAILING" ] || exit 2\n')
    stub.chmod(0o755)

    def run(*words: str, failing: str = "") -> tuple[int, list[str]]:
        (tmp_path / "calls").write_text("")
        path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "SKILLNET_HOME": "runs", "PATH": path, "FAILING": failing}
        command = ["sh", str(ROOT / "examples/skills.sh"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=60)
        return done.returncode, (tmp_path / "calls").read_text().split()

    assert run("grow") == (1, [])
    (tmp_path / "runs" / "quickstart-1").mkdir(parents=True)
    assert run("grow", failing="grow") == (1, ["prepare", "grow"])
    grown = ["prepare", "grow", "pack", "grow", "pack"]
    assert run("grow") == (0, grown)
    assert run(failing="export") == (2, ["export"])


def mask(line: str) -> str:
    """Return a line without what depends on the weights: numbers, digests, classes, rules."""
    line = re.sub(r"\b[0-9a-f]{32}\b|\b\d[\d.e+-]*\b", "#", line)
    return " ".join(line.split()[:1] if line.startswith("  examples/") else line.split())
