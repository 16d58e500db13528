"""``skillnet pack``, ``add``, ``remove`` and ``skills`` on the folder of a served model."""

import hashlib
import json
import os
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
from pipelines.training.runs.bundle_manifest import add_bundle_manifest
from skillnet import SkillNet
from skillnet.model_merging import add_skill, add_task
from skillnet.router import name_counts
from skillnet.serialization import write_model
from skillnet.skills import SkillPlan, Task
from skillnet.vocabulary import ModelVocabulary
from tests.helpers.file_forms import draw_png
from tests.helpers.hub_server import serve_hub
from tests.helpers.served_place import ServedPlace

NAMES = ("heart", "star", "sun")
GIVEN = ("shapes@hf:owner/skills@v1", "shapes@hf:owner/skills", "no@hf:owner/skills@v1")


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def shelf(place: ServedPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package ``shapes`` in a folder, made from a model that grew from the served one."""
    folder = tmp_path_factory.mktemp("shelf")
    grown = folder / "grown"
    model = SkillNet.from_pretrained(place.bundle)
    torch.manual_seed(5)
    add_skill(model, "counting")
    plan = SkillPlan(("counting", "general", "image"), "image")
    add_task(model, "shape", Task("classification", {"input": plan}, outputs=3))
    found = model.vocabulary
    model.vocabulary = ModelVocabulary(found.tokenizer, {**found.outputs, "shape": NAMES}, {})
    grown.mkdir()
    write_model(model, grown)
    about = dict(bundle.check_bundle(place.bundle))
    files = list(about["files"])
    for name in files:
        shutil.copyfile(place.bundle / name, grown / name)
    # The task reads the images of another one.
    files.append(name_counts("shape"))
    shutil.copyfile(grown / name_counts("text_to_image"), grown / name_counts("shape"))
    entry = about["tasks"]["text_to_image"] | {"names": list(NAMES), "limit": None}
    rows = [{"task": "shape", "split": "test", "metric": "accuracy", "value": 0.5}]
    about |= {
        "tasks": about["tasks"] | {"shape": entry},
        "evaluation": [row | {"low": 0.4, "high": 0.6} for row in rows],
        "settings": {
            "seed": 1,
            "tasks": {
                "shape": {"corpus": "a"},
                "text_to_image": {"corpus": "drawings", "eval_only": True},
            },
        },
    }
    about = {key: value for key, value in about.items() if key not in ("digest", "files", "format")}
    add_bundle_manifest(grown, about, files)
    target = folder / "shapes.skill"
    assert commands.pack_tasks([str(grown), "--output", str(target)]) == 0
    return folder


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
