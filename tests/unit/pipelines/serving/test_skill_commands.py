"""``skillnet pack``, ``add``, ``remove`` and ``skills`` on the folder of a served model."""

import copy
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import predict
from pipelines import skills as commands
from pipelines.data.shards.dataset import open_corpus
from pipelines.serving import bundle, skill_catalogues
from pipelines.training.growth.verification import digest_row_outputs
from skillnet import SkillNet
from skillnet.serialization import save_model
from skillnet.skill_packages import pack_skills
from skillnet_platform.storage import directories
from tests.helpers.file_forms import draw_png
from tests.helpers.hub_server import serve_hub
from tests.helpers.processes import run_python
from tests.helpers.served_place import ServedPlace, pack_shapes

ROOT = Path(__file__).resolve().parents[4]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture
def model(place: ServedPlace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place.bundle, tmp_path / "model"))


def read(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_an_added_task_predicts_and_a_removed_one_leaves_no_trace(shelf, model, capsys):
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


def test_old_tasks_are_proved_on_rows_of_the_corpora_at_hand(
    shelf, place, model, tmp_path, capsys, monkeypatch
):
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


def test_packages_come_from_a_pinned_revision_of_the_hub(shelf, model, tmp_path):
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
        ended = run_python(
            "-c", SCRIPT, json.dumps(calls), variables=hub.variables(tmp_path / "cache")
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
    kind, catalogue, model, object_store, capsys, monkeypatch
):
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


def test_a_directory_that_would_take_too_many_bytes_is_refused(tmp_path, monkeypatch):
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
        # Of ``skillnet skills``.
        (["{shelf}/none"], "no saved model, and no packages (*.skill)"),
        (["{model}", "--fits", "{model}"], "is a model, no catalogue"),
        (["{shelf}", "--fits", "{shelf}"], "no saved model. Write one"),
        (["hf:owner/skills"], "name the revision"),
        (["s3://key:secret@host/x"], "may be a password"),
    ],
)
def test_a_wrong_argument_ends_with_one_sentence(words, message, shelf, model, capsys):
    before = hashes(model)
    filled = [word.format(shelf=shelf, model=model) for word in words]
    adds = "--to" in words or words[0].startswith("shapes@")
    assert (commands.join_packages if adds else commands.print_skills)(filled) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message.format(shelf=shelf) in said
    assert "Traceback" not in said
    assert hashes(model) == before


def test_a_package_without_settings_for_predictions_joins_no_served_model(
    shelf, model, tmp_path, capsys
):
    pack_skills(shelf / "grown", ["shape"], tmp_path / "bare.skill", program="0.1.0")
    before = hashes(model)
    assert commands.join_packages([str(tmp_path / "bare.skill"), "--to", str(model)]) == 2
    assert "no settings for predictions" in capsys.readouterr().err
    assert hashes(model) == before
    plain = tmp_path / "plain"
    save_model(SkillNet.from_pretrained(model), plain)
    assert commands.join_packages([str(tmp_path / "bare.skill"), "--to", str(plain)]) == 0


@pytest.mark.integration
@pytest.mark.slow(
    "test_skill_commands.py::test_an_added_task_predicts_and_a_removed_one_leaves_no_trace"
)
def test_the_demo_of_packages_prints_what_the_readme_quotes(place, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(place.bundle, runs / "quickstart-1")
    for package, task in (("stroke-count", "stroke_count"), ("radical", "radical")):
        made = pack_shapes(place, tmp_path / package, package, task, "text_to_video")
        (runs / "skills").mkdir(exist_ok=True)
        made.rename(runs / "skills" / made.name)
    (runs / "skills" / "base-of-quickstart-1").touch()
    (runs / "corpora").symlink_to(place.data)
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
