"""Configurations of saved models that ask for more than their files hold are rejected at once."""

import json
import math
import re
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from skillnet import serialization, systems
from skillnet.multitask_model import FREE_REGISTRATIONS, limit_weights
from skillnet.serialization import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    read_tensor_shapes,
)
from skillnet.skills import SkillPlan, check_names, check_plan
from skillnet_hf import specialist
from skillnet_hf.specialist import SpecialistOptions
from tests.helpers.small_models import reseal_model, small_config

#: Inputs that all encoders of the specialists can divide.
SPECIALIST_INPUTS = {"mel_stack": 4, "n_mels": 16, "image_size": 16, "video_size": 16}
OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {"ffn_dim": 8},
    "moe": {"ffn_dim": 4},
    "specialist": {"ffn_dim": 16},
}


def save_system(system: str, folder: Path, **changes: Any) -> Path:
    inputs = SPECIALIST_INPUTS if system == "specialist" else {}
    config = small_config(**(inputs | changes))
    systems.build_system(system, config, OPTIONS.get(system)).save_pretrained(folder)
    return folder


def expect_rejection_at_once(saved: Path, about: dict[str, Any], message: str) -> None:
    (saved / "config.json").write_text(json.dumps(about))
    reseal_model(saved)
    begin = time.process_time()
    with pytest.raises(ValueError, match=message):
        systems.load_model(saved)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("system", ["skillnet", "alone", "dense", "moe", "specialist"])
@pytest.mark.parametrize(
    "change",
    [{"num_layers": 1024}, {"options": {"experts": 2**20}}, {"skills": 3000}],
    ids=["layers", "experts", "skills"],
)
def test_no_system_builds_more_weights_than_its_files_name(
    tmp_path: Path, system: str, change: dict[str, Any]
) -> None:
    """A large file does not raise the limit: only the names of weights count."""
    saved = save_system(system, tmp_path / "model", bigram_buckets=2**16)
    about = json.loads((saved / "config.json").read_text())
    if "experts" in change.get("options", {}) and system != "moe":
        pytest.skip("it has no experts")
    if "skills" in change:
        if system != "skillnet":
            pytest.skip("it has one skill or none")
        more = [f"s{number}" for number in range(change["skills"])]
        about["skills"] += more
        about["tasks"]["text_classification"]["towers"]["input"]["skills"] += more
    else:
        options = about["options"] | change.get("options", {})
        about |= change | {"options": options}
    # The experts of a layer are one weight, so its shape is wrong.
    expect_rejection_at_once(saved, about, r"more than the \d+ weights of its files|expected \(")


@pytest.mark.parametrize(
    ("modality", "change", "message"),
    [
        ("text", {"num_hidden_layers": 1024}, "more than the"),
        ("text", {"num_hidden_layers": 2**31}, "num_hidden_layers must be at most 1024"),
        ("text", {"num_labels": 2**24}, "'num_labels' is no setting of this model"),
        ("text", {"id2label": {"0": "a"}}, "'id2label' is no setting of this model"),
        ("text", {"hidden_act": "x" * 1000}, "hidden_act: a text of 1000 characters"),
        ("text", {"hidden_size": 10**400}, "hidden_size must be at most"),
        ("text", {"layer_norm_eps": float("nan")}, "layer_norm_eps must be at most"),
        ("video", {"image_size": 2**16, "patch_size": 1}, "a table of"),
        ("video", {"num_frames": 2**24}, "a table of"),
        ("sound", {"max_source_positions": 2**24}, "a table of"),
        ("sound", {"conv_kernel_sizes": [5] * 5000}, "a list of 5000 values"),
        ("image", {"depth": 2**24}, "depth must be at most 1024"),
        ("image", {"norm_layer": {"a": {}}}, "norm_layer: expected a text, a number or a list"),
    ],
)
def test_a_shape_of_a_library_is_bounded_before_the_library_reads_it(
    tmp_path: Path, modality: str, change: dict[str, Any], message: str
) -> None:
    saved = save_system("specialist", tmp_path / "model")
    about = json.loads((saved / "config.json").read_text())
    family, config = SpecialistOptions().family(modality), small_config(**SPECIALIST_INPUTS)
    shape = family.fresh(config, 16)
    inner = shape["arguments"] if modality == "image" else shape
    inner.update(change)
    about["options"]["shapes"] = {modality: shape}
    expect_rejection_at_once(saved, about, message)


def test_a_saved_model_looks_up_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save_system("specialist", tmp_path / "model")
    about = json.loads((saved / "config.json").read_text())
    about["options"] |= {"checkpoints": {"text": str(tmp_path)}, "download": True}
    (saved / "config.json").write_text(json.dumps(about))
    monkeypatch.setattr(specialist, "find_checkpoint", None)
    assert systems.load_model(reseal_model(saved)).options["checkpoints"] == {}


def test_names_of_many_skills_are_checked_in_linear_time() -> None:
    names = tuple(f"s{number}" for number in range(100_000))
    begin = time.process_time()
    check_names(names, "model.skills")
    check_plan(SkillPlan(names), names)
    assert time.process_time() - begin < 5


def test_models_of_other_threads_are_built_while_one_is_limited() -> None:
    with limit_weights(0), ThreadPoolExecutor(1) as threads:
        assert threads.submit(torch.nn.Linear, 2, 2).result().weight.shape == (2, 2)
        with pytest.raises(ValueError, match="more than the 0 weights"):
            for _ in range(FREE_REGISTRATIONS):
                torch.nn.Linear(2, 2)
    torch.nn.Linear(2, 2)


def write_names(path: Path, names: int, *, shape: list[int], data: bool) -> None:
    """Write a header of that many tensors, with or without the byte of each that it promises."""
    size = math.prod(shape)
    header = {
        f"heads.text_classification.w{number}": {
            "dtype": "U8",
            "shape": shape,
            "data_offsets": [number * size, (number + 1) * size],
        }
        for number in range(names)
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(names * size if data else 0))


@pytest.mark.parametrize("system", ["skillnet", "alone", "dense", "moe", "specialist"])
@pytest.mark.parametrize(
    ("file", "shape", "data"),
    [
        ("other.safetensors", [1], True),
        ("optimizer-shared.safetensors", [1], True),
        ("head-text_classification.safetensors", [0], False),
        ("head-text_classification.safetensors", [1], False),
    ],
    ids=["no file of the model", "optimizer", "empty tensors", "missing data"],
)
def test_names_without_weights_of_the_model_do_not_raise_its_limit(
    tmp_path: Path, system: str, file: str, shape: list[int], data: bool
) -> None:
    saved = save_system(system, tmp_path / "model")
    true = sum(len(read_tensor_shapes(path)) for path in saved.glob("*.safetensors"))
    if (saved / file).is_file():
        true -= len(read_tensor_shapes(saved / file))
    write_names(saved / file, 5_000, shape=shape, data=data)
    about = json.loads((saved / "config.json").read_text()) | {"num_layers": 1024}
    expect_rejection_at_once(saved, about, f"more than the {true} weights of its files")


@pytest.mark.parametrize("system", ["skillnet", "alone", "dense", "moe", "specialist"])
def test_a_system_knows_all_files_that_it_can_have(tmp_path: Path, system: str) -> None:
    saved = save_system(system, tmp_path / "model")
    model = systems.load_model(saved)
    assert set(model.files_of()) <= model.possible_files(model.config)
    for task in model.config.tasks:
        assert set(systems.load_model(saved, task).files_of()) <= set(model.files_of())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda files: {f"{n}": files["config.json"] for n in range(MAX_FILES + 1)}, "files; at"),
        (lambda files: files | {"x" * MAX_MANIFEST_BYTES: files["config.json"]}, "bytes; at most"),
    ],
    ids=["files", "bytes"],
)
def test_a_manifest_of_many_names_is_rejected_before_its_files_are_looked_at(
    tmp_path: Path, content: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save_system("dense", tmp_path / "model")
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"files": content(manifest["files"])}))
    monkeypatch.setattr(serialization, "check_inside", None)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .*{message}"):
        systems.load_model(saved)
