"""Malicious saved models: every loader reports the fault, and no code runs.

An attacker who makes a directory also makes its manifest, so the hashes below are correct.
"""

import json
import math
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.serving import bundle
from pipelines.training.config.run import TrainingConfig
from pipelines.training.loop import checkpointing
from pipelines.training.loop.optimizer import WeightAverage, build_optimizer
from pipelines.training.runs import bundle_manifest, checkpoints, model_source
from skillnet import systems
from skillnet.multitask_model import TaskModel
from skillnet.serialization import read_manifest
from skillnet_hf import library_models
from skillnet_hf.hf_checkpoints import find_checkpoint, require_finite
from tests.helpers.small_models import reseal_model, small_model

WEIGHTS = "skill-general.safetensors"


class Harm:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def model() -> TaskModel:
    return small_model(torch.float32)


def adamw(model: TaskModel) -> torch.optim.AdamW:
    return build_optimizer(model.named_parameters(), TrainingConfig())


@pytest.fixture
def saved(model: TaskModel, tmp_path: Path) -> Path:
    """A checkpoint, with state of the optimiser and averages."""
    optimizer, average = adamw(model), WeightAverage(0.9)
    active = list(model.named_parameters())
    for _, parameter in active:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    average.update(active)
    tensors = checkpointing.CheckpointTensors(model, optimizer, average)
    return checkpointing.write_checkpoint(tmp_path / "run", 3, tensors, {"seed": 1}, keep=1)


LOADERS: dict[str, Callable[[Path, TaskModel], object]] = {
    "load": lambda folder, model: systems.load_model(folder),
    "checkpoint": lambda folder, model: checkpoints.load_weights(folder, model),
    "source": lambda folder, model: model_source.load_source_model(
        model_source.resolve_model(str(folder))
    ),
}


def pickled(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Harm(mark)))


def saved_by_torch(path: Path, mark: Path) -> None:
    torch.save({"weights": Harm(mark)}, path)


def give_pickle(ending: str) -> Callable[[Path, Path], None]:
    """Return a change of weights into a pickle of another name."""

    def change(path: Path, mark: Path) -> None:
        pickled(path.with_suffix(ending), mark)
        path.unlink()

    return change


def give_number(number: float) -> Callable[[Path, Path], None]:
    """Return a change of the last number of the weights."""

    def change(path: Path, _: Path) -> None:
        tensors = load_file(path)
        tensors[min(tensors)].view(-1)[-1] = number
        save_file(tensors, path)

    return change


def give_integers(path: Path, _: Path) -> None:
    save_file({name: x.to(torch.int32) for name, x in load_file(path).items()}, path)


def give_huge_shape(path: Path, _: Path) -> None:
    """The header is right but for one shape; the file is as short as before."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[min(header)]["shape"] = [2**40, 2**20]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


NO_NUMBER = rf"{WEIGHTS}: \S+ holds infinities or not-a-number"
#: Changes of a file of weights, and why it is rejected.
BAD_WEIGHTS: list[tuple[Callable[[Path, Path], object], str]] = [
    *(
        (write, rf"{WEIGHTS} is no safetensors file .*run code")
        for write in (pickled, saved_by_torch)
    ),
    *(
        (give_pickle(ending), rf"incomplete: {WEIGHTS} is missing")
        for ending in (".bin", ".pt", ".pth")
    ),
    *((give_number(number), NO_NUMBER) for number in (math.nan, math.inf, -math.inf)),
    (give_integers, rf"{WEIGHTS}: .* of type torch.int32, expected floating"),
    (give_huge_shape, rf"{WEIGHTS} (does not fit|is no safetensors)"),
    *(
        (
            lambda path, _, start=start: path.write_bytes(start),
            rf"{WEIGHTS} (is no safetensors|holds other weights)",
        )
        for start in (
            struct.pack("<Q", 2**63),  # a header of exabytes
            struct.pack("<Q", 2**31) + b"{}",
            struct.pack("<Q", 2) + b"[]",
            struct.pack("<Q", 100_000) + b"[" * 100_000,
            struct.pack("<Q", 60) + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,9e9]}}    ',
            b"",
        )
    ),
]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("change", "words"), BAD_WEIGHTS)
def test_bad_weights_are_rejected_by_every_loader(
    saved: Path, model: TaskModel, loader: str, change: Callable[[Path, Path], object], words: str
) -> None:
    mark = saved.parent / "mark"
    change(saved / WEIGHTS, mark)
    with pytest.raises(ValueError, match=words):
        LOADERS[loader](reseal_model(saved), model)
    assert not mark.exists()


@pytest.mark.parametrize("write", [pickled, saved_by_torch])
def test_a_pickle_among_the_state_of_the_optimiser(
    saved: Path, model: TaskModel, write: Callable[[Path, Path], None]
) -> None:
    mark = saved.parent / "mark"
    write(saved / "optimizer-shared.safetensors", mark)
    found = checkpoints.verify_checkpoint(reseal_model(saved))
    with pytest.raises(ValueError, match=r"optimizer-shared\.safetensors is no safetensors file"):
        checkpointing.load_checkpoint(found, model, adamw(model))
    assert not mark.exists()


def test_large_weights_are_numbers(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    for tensor in tensors.values():
        tensor.fill_(3e38)  # whose sum is infinite
    save_file(tensors, saved / WEIGHTS)
    systems.load_model(reseal_model(saved))


def test_weights_of_several_types(saved: Path) -> None:
    tensors = {name: x.double() for name, x in load_file(saved / WEIGHTS).items()}
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(ValueError, match="weights of several types"):
        systems.load_model(reseal_model(saved))


# -- the manifest and the configuration ----------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a/b", "", ".", "a\\b", "x\0"]
)
def test_a_manifest_that_names_files_elsewhere(saved: Path, model: TaskModel, name: str) -> None:
    manifest = read_manifest(saved)
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    for load in LOADERS.values():
        with pytest.raises(ValueError, match="no file of this folder"):
            load(saved, model)
    with pytest.raises(ValueError, match="no file of this folder"):
        checkpoints.verify_checkpoint(saved)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_link_in_place_of_weights(saved: Path, model: TaskModel, loader: str) -> None:
    elsewhere = saved.parent / "elsewhere"
    (saved / WEIGHTS).rename(elsewhere)
    (saved / WEIGHTS).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is a link"):
        LOADERS[loader](saved, model)


def test_state_that_the_manifest_does_not_list_is_not_read(saved: Path, model: TaskModel) -> None:
    found = checkpoints.verify_checkpoint(saved)
    pickled(saved / "optimizer-more.safetensors", saved.parent / "mark")
    optimizer = adamw(model)
    checkpointing.load_checkpoint(found, model, optimizer)
    assert set(optimizer.state) == set(model.parameters())


@pytest.mark.parametrize("key", ["nobody/step", "stems.token.embedding.weight/other", "no-slash"])
def test_state_of_no_parameter(saved: Path, model: TaskModel, key: str) -> None:
    path = saved / "optimizer-shared.safetensors"
    save_file(load_file(path) | {key: torch.zeros(())}, path)
    found = checkpoints.verify_checkpoint(reseal_model(saved))
    with pytest.raises(ValueError, match="not the state of a parameter of this model"):
        checkpointing.load_checkpoint(found, model, adamw(model))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": "3"}', "[" * 100_000])
def test_a_state_file_that_tells_no_step(saved: Path, text: str) -> None:
    (saved / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state\.json"):
        checkpoints.verify_checkpoint(reseal_model(saved))
    assert checkpoints.find_newest(saved.parent) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dim", 2**20),
        ("ffn_dim", 2**23),
        ("vocab_size", 2**24),
        ("dim", 2**60),
        ("num_layers", 10**9),
        ("max_frames", 2**60),
        ("bigram_buckets", 2**40),
        ("dim", "16"),
        ("dim", 16.5),
        ("num_heads", None),
        ("tubelet", 3),
        ("tasks", [1]),
        ("tasks", {"x": {}}),
        ("tasks", {"../x": {"objective": "ctc", "towers": {}, "outputs": 1}}),
        ("skills", "general"),
        ("skills", 7),
        ("system", "os:system"),
        ("system", 7),
        ("options", {"unknown": 1}),
        ("options", [1]),
        ("drop_path", "x"),
        ("no_such", 1),
    ],
)
def test_a_configuration_that_asks_for_too_much_or_makes_no_sense(
    saved: Path, key: str, value: object
) -> None:
    about = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(about | {key: value}))
    reseal_model(saved)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"\w"):
            systems.load_model(saved)
        assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    finally:
        tracemalloc.stop()


def test_a_small_configuration_of_millions_of_weights_is_rejected_at_once(saved: Path) -> None:
    about = json.loads((saved / "config.json").read_text())
    about["num_layers"] = 1024
    about["skills"] = [*about["skills"], *(f"s{number}" for number in range(3000))]
    plan = about["tasks"]["text_classification"]["towers"]["input"]
    plan["skills"] = [*plan["skills"], *about["skills"][-3000:]]
    (saved / "config.json").write_text(json.dumps(about))
    reseal_model(saved)
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"more than the \d+ weights of its files"):
        systems.load_model(saved)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "\xff"])
def test_a_configuration_that_is_none(saved: Path, model: TaskModel, text: str) -> None:
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        systems.load_model(reseal_model(saved))


# -- bundles of the registry ----------------------------------


def bundled(model: TaskModel, folder: Path) -> Path:
    """As far as it is looked at before the tokenizer."""
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    about = {"package": "0", "weights_digest": "0", "run_id": None, "steps": None}
    about |= {"settings": {}, "evaluation": [], "tasks": {}}
    bundle_manifest.add_bundle_manifest(folder, about, ["tokenizer.json"])
    return folder


def test_bundles_are_checked_alike(model: TaskModel, tmp_path: Path) -> None:
    folder = bundled(model, tmp_path / "bundle")
    about, whole = bundle.check_bundle(folder), read_manifest(folder)

    def refused(words: str, **changes: object) -> None:
        # With a digest that fits, as its author can write it.
        bundle_manifest.write_sealed(folder, whole | {"serving": about | changes})
        with pytest.raises(ValueError, match=words):
            bundle.open_bundle(folder)

    files = about["files"]
    entry = files["tokenizer.json"]
    refused("names '../x'", files=files | {"../x": entry})
    refused("names '/etc/passwd'", files=files | {"/etc/passwd": entry})
    refused("does not list tokenizer.json", files={})
    refused("files.tokenizer.json is '0'; it should be", files={"tokenizer.json": "0"})
    refused(r"files is \[1\]; it should be a valid dict", files=[1])
    refused("tasks.x is 1; it should be a dictionary; register", tasks={"x": 1})
    refused("format None", format=None)
    refused("tasks are ; the model has")
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    refused("is a link")
    for serving in ([], None):
        (folder / "manifest.json").write_text(json.dumps(whole | {"serving": serving}))
        with pytest.raises(ValueError, match="format None"):
            bundle.check_bundle(folder)


def test_a_bank_of_captions_fits_its_vectors(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "captions-x.json").write_text('["one", "two"]')
    save_file({"embeddings": torch.zeros(3, 4)}, tmp_path / "captions-x.safetensors")
    with pytest.raises(ValueError, match=r"holds \(3, 4\) numbers .* expected \(2, 4\)"):
        bundle._read_caption_bank(tmp_path, "x", 4)
    pickled(tmp_path / "captions-x.safetensors", mark)
    with pytest.raises(ValueError, match="is no safetensors file"):
        bundle._read_caption_bank(tmp_path, "x", 4)
    assert not mark.exists()


# -- checkpoints of other libraries ----------------------------------


def test_pickles_of_other_libraries_are_not_read(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickled(tmp_path / "pytorch_model.bin", mark)
    with pytest.raises(ValueError, match=r"Pickled weights .* can run code"):
        find_checkpoint(str(tmp_path), download=False)
    pickled(tmp_path / "model.safetensors", mark)
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        find_checkpoint(str(tmp_path), download=False)
    assert not mark.exists()


def test_a_checkpoint_names_nothing_else_to_load() -> None:
    name = "vit_base_patch16_224"
    library_models.check_architecture(name, {"embed_dim": 32})
    for key in ("checkpoint_path", "pretrained", "pretrained_cfg"):
        with pytest.raises(ValueError, match="name other things to load"):
            library_models.check_architecture(name, {key: "x.pth"})
    for other in ("hf-hub:someone/model", "vit_of_nobody", "resnet50", None, 7):
        with pytest.raises(ValueError, match="is no Vision Transformer"):
            library_models.check_architecture(other, {})


def test_checkpoints_that_are_no_numbers(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    require_finite(layer, tmp_path)
    with torch.no_grad():
        layer.bias[0] = float("nan")
    with pytest.raises(ValueError, match="bias holds infinities or not-a-number"):
        require_finite(layer, tmp_path)
