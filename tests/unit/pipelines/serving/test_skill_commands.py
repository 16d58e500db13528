"""``skillnet pack``, ``add``, ``remove`` and ``skills`` on the folder of a served model."""

import copy
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import skills as commands
from pipelines.data.shards.dataset import open_corpus
from pipelines.serving import bundle, skill_catalogues
from pipelines.training.growth.verification import digest_row_outputs
from pipelines.training.runs.bundle_manifest import add_bundle_manifest
from skillnet import SkillNet
from skillnet.model_merging import add_skill, add_task
from skillnet.serialization import write_model
from skillnet.skill_packages import pack_skills
from skillnet.skills import SkillPlan, Task
from skillnet.vocabulary import ModelVocabulary
from skillnet_platform.storage import directories
from tests.helpers.hub_server import serve_hub
from tests.helpers.object_store import ObjectStore
from tests.helpers.served_place import ServedPlace

NAMES = ("heart", "star", "sun")


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
    assert commands.print_skills([str(model), "--json"]) == 0
    listed = {entry["name"]: entry for entry in read(capsys)}
    assert listed["counting"]["package"] == "shapes"
    assert listed["counting"]["tasks"] == ["shape"]
    assert listed["general"]["package"] is None
    assert commands.print_skills([str(model)]) == 0
    assert "counting" in capsys.readouterr().out
    assert commands.drop_packages(["shapes", "--from", str(model)]) == 0
    assert hashes(model) == before


def test_old_tasks_are_proved_on_rows_of_the_corpora_at_hand(
    shelf: Path,
    place: ServedPlace,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = hashes(model)
    entries = bundle.check_bundle(model)["tasks"]
    data = Path(shutil.copytree(place.data, tmp_path / "corpora"))
    # Another version of a corpus has other rows than those of the training.
    manifest = data / "headings" / "manifest.json"
    shutil.rmtree(data / "syllables")
    shutil.copytree(data / "headings", data / "syllables")
    given = ["--data", str(data), "--json"]
    assert manifest.is_file()
    capsys.readouterr()
    monkeypatch.setattr(commands, "TEST_ROWS", 3)
    assert commands.join_packages([f"shapes@{shelf}", "--to", str(model), *given]) == 0
    proofs = {proof["task"]: proof for proof in read(capsys)}
    for task, entry in entries.items():
        if task == "speech_recognition":
            assert (proofs[task]["inputs"], proofs[task]["rows"]) == ("generated", 16)
        else:
            assert proofs[task]["inputs"] == f"{entry['corpus']}/test"
            assert 1 <= proofs[task]["rows"] <= 3
        assert proofs[task]["differing"] == 0
    assert proofs["shape"]["inputs"] == "generated"
    joined = hashes(model)
    monkeypatch.setattr(
        "pipelines.training.growth.verification.digest_row_outputs",
        lambda model, task, *rest: [b"", str("shape" in model.config.tasks).encode()],
    )
    assert commands.drop_packages(["shapes", "--from", str(model), *given]) == 2
    assert "change on 1 of 2 rows" in " ".join(capsys.readouterr().err.split())
    assert hashes(model) == joined
    shutil.rmtree(data / "headings")
    assert commands.drop_packages(["shapes", "--from", str(model), "--data", str(shelf)]) == 2
    assert f"--data {shelf}: no corpus that" in " ".join(capsys.readouterr().err.split())
    monkeypatch.undo()
    assert commands.drop_packages(["shapes", "--from", str(model), *given]) == 0
    kinds = {proof["task"]: proof["inputs"] for proof in read(capsys)}
    assert kinds["text_classification"] == "generated"
    assert hashes(model) == before


def test_the_digest_of_a_row_follows_its_outputs(place: ServedPlace) -> None:
    model = SkillNet.from_pretrained(place.bundle)
    for task, entry in bundle.check_bundle(place.bundle)["tasks"].items():
        corpus = open_corpus(place.data / entry["corpus"])
        first, same, fewer = (
            digest_row_outputs(model, task, corpus, "test", entry["limit"], count)
            for count in (1000, 1000, 1)
        )
        assert first == same
        assert len(first) == len(corpus.splits["test"].table())
        assert len(fewer) == 1
        with torch.no_grad():
            changed = copy.deepcopy(model)
            changed.encoder.norm.weight.mul_(1.01)
        other = digest_row_outputs(changed, task, corpus, "test", entry["limit"], 1000)
        assert not set(first) & set(other), task


SCRIPT = """
import contextlib, io, json, sys
from pipelines import skills
from pipelines.serving import skill_catalogues
skill_catalogues.BLOCK = 512
said = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run = skills.join_packages if "--to" in words else skills.print_skills
        code = run(words)
    said.append([code, out.getvalue(), " ".join(err.getvalue().split())])
print(json.dumps(said))
"""


def test_packages_come_from_a_pinned_revision_of_the_hub(
    shelf: Path, model: Path, tmp_path: Path
) -> None:
    to, place = ["--to", str(model)], "hf:owner/skills@v1"
    content = (shelf / "shapes.skill").read_bytes()
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("notes.txt", "none")
    calls = [
        [place, "--fits", str(model), "--json"],
        [f"shapes@{place}", *to],
        ["shapes@hf:owner/skills", *to],
        [f"shape@{place}", *to],
        ["shapes@hf:owner/none@v1", *to],
        ["shapes@hf://owner/skills", *to],
        ["hf:owner/none@v1"],
    ]
    with serve_hub() as hub:
        hub.repositories["owner/skills@v1"] = {
            "shapes.skill": content,
            "broken.skill": bytes(other.getvalue()),
            "README.md": b"# skills",
        }
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(calls)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        headers = hub.sent[: hub.sent.index(len(content))]
    assert ended.returncode == 0, ended.stderr
    listed, added, unpinned, missing, unknown, raw, empty = json.loads(ended.stdout)
    broken, shapes = json.loads(listed[1])
    assert shapes["problem"] is None
    assert shapes["bytes"] == len(content)
    assert "it has no skill.json" in broken["problem"]
    assert sum(headers) < len(content), "the ends of the packages"
    assert added[0] == 0, added
    assert "shape" in bundle.check_bundle(model)["tasks"]
    assert {said[0] for said in (unpinned, missing, unknown, raw, empty)} == {2}
    assert "name the revision" in unpinned[2]
    assert f"no such package; did you mean shapes? {place} has broken, shapes" in missing[2]
    assert "no such package" in unknown[2]
    assert "write hf:OWNER/NAME@REVISION" in raw[2]
    assert "no packages (*.skill)" in empty[2]


@pytest.fixture
def catalogue(shelf: Path, tmp_path: Path) -> Path:
    """Packages that fit, that do not, and files that are none."""
    folder = tmp_path / "catalogue"
    folder.mkdir()
    shutil.copy(shelf / "shapes.skill", folder)
    other = SkillNet.from_pretrained(shelf / "grown")
    with torch.no_grad():
        other.encoder.norm.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    pack_skills(tmp_path / "other", ["shape"], folder / "foreign.skill", program="0.1.0")
    (folder / "empty.skill").write_bytes(b"")
    (folder / "notes.txt").write_text("none")
    (folder / "folder.skill").mkdir()
    with zipfile.ZipFile(folder / "huge.skill", "w") as archive:
        archive.writestr("skill.json", b" " * (5 * 2**20))
    return folder


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_a_catalogue_lists_its_packages_from_their_ends(
    kind: str,
    catalogue: Path,
    model: Path,
    object_store: ObjectStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, taken = str(catalogue), []
    if kind == "store":
        place = f"{object_store.uri}/skills"
        for path in catalogue.iterdir():
            if path.is_file():
                directories.put_file(path, f"{place}/{path.name}")
        read_range = directories.read_range

        def counted(uri: str, start: int, end: int) -> bytes:
            taken.append((uri.rpartition("/")[2], end - start))
            return read_range(uri, start, end)

        monkeypatch.setattr(skill_catalogues, "read_range", counted)
        monkeypatch.setattr(skill_catalogues, "BLOCK", 512)
    capsys.readouterr()
    assert commands.print_skills([place, "--fits", str(model), "--json"]) == 0
    found = {entry["name"]: entry for entry in read(capsys)}
    assert list(found) == ["empty", "foreign", "huge", "shapes"]
    shapes = found["shapes"]
    assert shapes["problem"] is None
    assert (shapes["tasks"], shapes["skills"]) == (["shape"], ["counting"])
    assert shapes["bytes"] == (catalogue / "shapes.skill").stat().st_size
    shared = hashlib.sha256((model / "shared.safetensors").read_bytes()).hexdigest()
    assert shapes["base"] == shared
    assert shapes["licences"] == sorted(
        bundle.check_bundle(model)["tasks"]["text_to_image"]["licences"]
    )
    assert "made for another base" in found["foreign"]["problem"]
    assert found["foreign"]["base"] != shared
    assert "no whole package" in found["empty"]["problem"]
    assert "skill.json has more than" in found["huge"]["problem"]
    for name in {name for name, _ in taken}:
        size = (catalogue / name).stat().st_size
        assert sum(count for each, count in taken if each == name) < max(size, 1), name
    assert commands.print_skills([place]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "foreign" in said, "its base is not compared"
    assert commands.join_packages([f"shapes@{place}", "--to", str(model)]) == 0
    assert "shape" in bundle.check_bundle(model)["tasks"]
    capsys.readouterr()
    assert commands.print_skills([place, "--fits", str(model), "--json"]) == 0
    assert (
        "already has a package 'shapes'"
        in {e["name"]: e for e in read(capsys)}["shapes"]["problem"]
    )
    assert commands.join_packages([f"shapse@{place}", "--to", str(model)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"no such package; did you mean shapes? {place} has empty, foreign, huge" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{shelf}/none"], "no saved model, and no packages (*.skill)"),
        (["{model}", "--fits", "{model}"], "is a model, no catalogue"),
        (["{shelf}", "--fits", "{shelf}"], "no saved model. Write one"),
        (["hf:owner/skills"], "name the revision"),
        (["s3://key:secret@host/x"], "may be a password"),
    ],
)
def test_a_place_that_is_no_catalogue_ends_with_one_sentence(
    words: list[str], message: str, shelf: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.print_skills([word.format(shelf=shelf, model=model) for word in words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_directory_that_would_take_too_many_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The central directory of a zip may be as long as its writer likes."""
    with zipfile.ZipFile(tmp_path / "wide.skill", "w") as archive:
        for number in range(2000):
            archive.writestr(f"{number}-{'x' * 100}", b"")
    monkeypatch.setattr(skill_catalogues, "MAX_HEADER_BYTES", 100_000)
    (entry,) = skill_catalogues.list_catalogue(str(tmp_path))
    assert entry.problem is not None
    assert "its header has more than 100000 bytes" in entry.problem


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
    pack_skills(shelf / "grown", ["shape"], tmp_path / "bare.skill", program="0.1.0")
    before = hashes(model)
    assert commands.join_packages([str(tmp_path / "bare.skill"), "--to", str(model)]) == 2
    assert "no settings for predictions" in capsys.readouterr().err
    assert hashes(model) == before
    plain = tmp_path / "plain"
    SkillNet.from_pretrained(model).save_pretrained(plain)
    assert commands.join_packages([str(tmp_path / "bare.skill"), "--to", str(plain)]) == 0
