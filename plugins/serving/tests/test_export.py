"""Exports have the outputs of their source, and travel through the Hub."""

import dataclasses
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.serving import bundle
from skillnet import SkillNet, systems
from skillnet_platform.errors import UserError
from skillnet_serving import export as command
from skillnet_serving.exported_folder import push_folder
from skillnet_serving.model_export import GRAPH_MANIFEST, NEEDED, export_bundle
from tests.helpers.hub_server import serve_hub
from tests.helpers.processes import run_python
from tests.helpers.served_place import ServedPlace

FIGURE = {"task": "text_to_image", "split": "test", "metric": "recall_at_10", "value": 0.5}
#: Pushes a model, downloads one task of it, and then all tasks.
TRAVEL = """
import sys
from pathlib import Path
from skillnet import SkillNet

source = SkillNet.from_pretrained(Path(sys.argv[1]))
print(source.push_to_hub("owner/pictures", private=True))
one = SkillNet.from_pretrained("owner/pictures", "text_to_image")
print(sorted(path.name for path in one.origin.iterdir() if path.is_file()))
expected = source.encode_text(["红色方块"], task="text_to_image")
assert (one.encode_text(["红色方块"]) == expected).all()
every = SkillNet.from_pretrained("owner/pictures")
assert list(every.config.tasks) == list(source.config.tasks)
try:
    SkillNet.from_pretrained("owner/absent")
except ValueError as error:
    print(error)
for _ in range(2):
    models = [SkillNet.from_pretrained("owner/tags", revision=each) for each in ("v1", None)]
    print([len(model.config.tasks) for model in models])
for address, revision in (("owner/tags", "v2"), (sys.argv[1], "v1")):
    try:
        SkillNet.from_pretrained(address, revision=revision)
    except ValueError as error:
        print(error)
"""


class ExportPlace:
    """A bundle with an evaluation row, and its manifest.

    Args:
        served: model and corpora.
        root: directory of the bundle.
    """

    def __init__(self, served: ServedPlace, root: Path) -> None:
        # Settings of a run name folders and servers of the machine that trained it.
        settings = {
            "seed": 3,
            "run_dir": str(root / "runs"),
            "data": str(root / "corpora"),
            "init_from": str(root / "start"),
            "storage": {"mirror": "s3://bucket/secret", "cache": str(root)},
            "tracking": {"uri": f"sqlite:///{root}/mlflow.db"},
            "options": {"checkpoint": str(root / "bert-base"), "width": 3},
            "tasks": {"speech_recognition": {"corpus": "syllables"}},
        }
        source = dataclasses.replace(served.source, settings=settings)
        rows = [FIGURE | {"low": 0.4, "high": 0.6}]
        self.bundle = bundle.build_bundle(source, served.data, root / "bundle", rows)
        self.manifest = bundle.check_bundle(self.bundle)

    def export(self, target: Path, to: str, task: str | None = None) -> Any:
        return export_bundle(self.bundle, self.manifest, target, to, task)


@pytest.fixture(scope="module")
def made(place: ServedPlace, tmp_path_factory: pytest.TempPathFactory) -> ExportPlace:
    return ExportPlace(place, tmp_path_factory.mktemp("export"))


def test_folder_for_the_hub_loads_again_and_has_a_card(made: ExportPlace, tmp_path: Path) -> None:
    report = made.export(tmp_path / "hf", "hf")
    assert report.difference == 0
    model, source = (SkillNet.from_pretrained(folder) for folder in (tmp_path / "hf", made.bundle))
    pixels = np.arange(30 * 30 * 3, dtype=np.uint8).reshape(30, 30, 3)
    assert torch.equal(model.encode_image([pixels]), source.encode_image([pixels]))
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert card.startswith("---\nlibrary_name: skillnet-platform\n")
    for words in ("R@10 50.0", "40.0–60.0", "openmoji", "activated parameters", "| text_to_code |"):
        assert words in card, words
    bundle.open_bundle(tmp_path / "hf")
    with pytest.raises(UserError, match="hf: exists"):
        made.export(tmp_path / "hf", "hf")


@pytest.mark.parametrize("task", ["text_to_image", "speech_recognition"])
def test_dense_model_reads_raw_inputs(made, tmp_path, task, capsys):
    words = [task, "--to", "dense", "--output", str(tmp_path / "dense")]
    assert command.main([*words, "--model", str(made.bundle), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tasks"] == [task]
    assert report["difference"] <= 1e-6
    model = SkillNet.from_pretrained(tmp_path / "dense")
    assert list(model.config.tasks) == [task]
    assert model.processor.tokenizer.get_vocab_size()


def test_torch_program_is_compared_with_its_source(made: ExportPlace, tmp_path: Path) -> None:
    report = made.export(tmp_path / "graph", "pt2", "speech_recognition")
    assert report.difference <= 1e-5
    about = json.loads((tmp_path / "graph" / GRAPH_MANIFEST).read_text(encoding="utf-8"))
    assert about["towers"]["input"]["outputs"] == ["log_probs", "lengths"]
    assert about["names"]
    assert (tmp_path / "graph" / "input.pt2").is_file()


def test_onnx_without_its_extra_names_it(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        UserError, match=r"onnxscript is not installed\. Install the extra export: "
    ):
        made.export(tmp_path / "graph", "onnx", "speech_recognition")


@pytest.mark.slow("test_export.py::test_folder_for_the_hub_loads_again_and_has_a_card")
def test_one_task_of_a_pushed_model_is_downloaded_alone(made: ExportPlace, tmp_path: Path) -> None:
    with serve_hub() as hub:
        for name, task in (("owner/tags", None), ("owner/tags@v1", "text_to_image")):
            folder = tmp_path / name
            made.export(folder, "hf", task)
            hub.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        done = run_python("-c", TRAVEL, made.bundle, variables=hub.variables(tmp_path))
        assert done.returncode == 0, done.stderr
        pushed = hub.repositories["owner/pictures"]
    assert {"README.md", "manifest.json", "skill-code.safetensors"} <= pushed.keys()
    url, files, message, *tagged, unknown, folder_only = done.stdout.splitlines()
    assert tagged == ["[1, 5]"] * 2
    assert unknown.startswith("owner/tags: no folder of this name, and the Hub does not provide")
    assert "revision v2" in unknown
    assert "revision='v1' is for a repository" in folder_only
    assert url.endswith("/owner/pictures/commit/" + "c" * 40)
    assert "skill-image.safetensors" in files
    assert "captions-text_to_image.json" in files
    assert "skill-code" not in files
    assert "captions-text_to_code" not in files
    assert message.startswith("owner/absent: no folder of this name")


def test_a_hub_that_does_not_answer_is_one_sentence(
    made: ExportPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="owner/new: the Hub refuses the upload"):
        push_folder(made.bundle, "owner/new")


@pytest.mark.parametrize(
    ("to", "task"),
    [
        ("hf", None),
        ("dense", "text_to_image"),
        ("pt2", "text_to_code"),
        pytest.param(
            *("onnx", "text_to_image"),
            marks=pytest.mark.slow(
                "test_export.py::test_exports_name_no_place_of_the_machine_and_are_readable"
            ),
        ),
        ("sentence-transformers", "text_to_image"),
    ],
)
def test_exports_name_no_place_of_the_machine_and_are_readable(made, tmp_path, to, task):
    missing = [name for name in NEEDED.get(to, ()) if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"an extra is not installed: {', '.join(missing)}")
    before = os.umask(0o022)
    try:
        assert made.export(tmp_path / "out", to, task).difference <= 1e-5
    finally:
        os.umask(before)
    root = Path(torch.__file__).parents[1]
    secrets = (str(made.bundle.parent), "s3://bucket", str(root), str(Path(__file__).parents[4]))
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path.name
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += map(archive.read, archive.namelist())
        for secret in secrets:
            assert not any(secret.encode() in content for content in contents), (path.name, secret)
    if to in ("hf", "dense"):
        kept = bundle.check_bundle(tmp_path / "out")["settings"]
        assert kept["options"] == {"checkpoint": "bert-base", "width": 3}
        assert kept["seed"] == 3


def test_weights_of_eight_bits_are_smaller_and_their_difference_is_stated(made, tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    assert 1e-5 < made.export(tmp_path / "out", "onnx-int8", "text_to_image").difference < 1
    weights = onnx.load(tmp_path / "out" / "candidate.onnx").graph.initializer
    assert onnx.TensorProto.INT8 in {each.data_type for each in weights}


@pytest.mark.parametrize("is_wrong", [lambda rows: rows > 1, lambda rows: rows == 1])
def test_an_export_that_is_wrong_for_some_numbers_of_rows_is_refused(
    made, tmp_path, monkeypatch, is_wrong
):
    load = systems.load_model

    def load_spoiled(path: str | Path, task: str | None = None) -> Any:
        model = load(path, task)
        if Path(path) != made.bundle:
            model.encoder.register_forward_hook(
                lambda _, __, tokens_BTD: tokens_BTD * (1.5 if is_wrong(len(tokens_BTD)) else 1)
            )
        return model

    monkeypatch.setattr(systems, "load_model", load_spoiled)
    with pytest.raises(ValueError, match="outputs differ from the source"):
        made.export(tmp_path / "hf", "hf", "text_classification")
    assert not (tmp_path / "hf").exists()


def test_formats_of_one_task_need_its_name(made: ExportPlace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exports one task\. Give one of .*text_to_code"):
        made.export(tmp_path / "x", "onnx")
    with pytest.raises(ValueError, match="did you mean 'text_to_code'"):
        made.export(tmp_path / "x", "pt2", "text_to_cod")
