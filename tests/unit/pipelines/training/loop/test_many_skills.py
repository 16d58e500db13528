"""What skills cost that no task of a run activates: nothing in a step, in memory or in a resume."""

import dataclasses
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop import loop
from pipelines.training.loop.loop import TrainResult, train_model
from pipelines.training.loop.optimizer import build_optimizer
from pipelines.training.loop.residency import SHARED_BYTES, SharedMemory
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from pipelines.training.runs import checkpoints
from skillnet import serialization, systems
from skillnet.multitask_model import TaskModel
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config

SEEN = Counter[str]()


class CountedName(str):
    """Name of a skill that counts how often anything looks at it."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        SEEN["names"] += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        SEEN["names"] += 1
        return str.__hash__(self)


def config_with(data: Path, further: int, **training: Any) -> FinetuneConfig:
    """Return a run whose model has further skills that no task activates."""
    config = small_config(data, **({"steps": 12, "precision": "fp32", "log_every": 99} | training))
    skills = (*config.model.skills, *(f"further{number}" for number in range(further)))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, skills=skills))


class StepCensus:
    """Callback that counts calls, names and walked parts of the model in some steps."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        """Nothing."""

    def on_step_start(self, step: int) -> None:
        """Count from the third step to the ninth: the first ones fill caches."""
        if step == 2:
            SEEN.clear()
            sys.setprofile(self._count)
        elif step == 9:
            sys.setprofile(None)
            self.found = Counter(SEEN)

    @staticmethod
    def _count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            SEEN["calls"] += 1


def _counted(method: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    def walk(*args: Any, **options: Any) -> Iterator[Any]:
        for each in method(*args, **options):
            SEEN["parts"] += 1
            yield each

    return walk


@pytest.mark.parametrize(("rank", "sharding"), [(0, "none"), (2, "none"), (0, "host")])
def test_a_step_looks_at_no_skill_that_its_task_does_not_activate(
    data, rank, sharding, monkeypatch
):
    for kind in (nn.ParameterDict, nn.ModuleDict):
        for method in ("__iter__", "keys", "values", "items"):
            monkeypatch.setattr(kind, method, _counted(getattr(kind, method)))
    for method in ("named_parameters", "named_modules", "named_children", "named_buffers"):
        monkeypatch.setattr(nn.Module, method, _counted(getattr(nn.Module, method)))
    found = []
    for further in (0, 40):
        config = config_with(data, further, ema=0.9, sharding=sharding)
        names = tuple(CountedName(name) for name in config.model.skills)
        model = dataclasses.replace(config.model, skills=names, skill_rank=rank)
        census = StepCensus()
        train_model(ResolvedRun(dataclasses.replace(config, model=model)), callbacks=[census])
        found.append(census.found)
    assert found[0]["calls"] > 1000
    assert found[0]["names"] > 10
    # A loader thread makes a call more or less; one call per skill and step would be 280.
    assert abs(found[0].pop("calls") - found[1].pop("calls")) < 40
    assert found[1] == found[0]


FURTHER = [f"skill-further{number}" for number in range(3)]


def task_config(data: Path, start: Path | None = None, **training: Any) -> FinetuneConfig:
    """Return a run of one task in a model with further skills."""
    config = config_with(data, len(FURTHER), steps=4, checkpoint_every=2, **training)
    config.tasks = {"text_classification": config.tasks["text_classification"]}
    tasks = {"text_classification": config.model.tasks["text_classification"]}
    model = dataclasses.replace(config.model, tasks=tasks)
    return dataclasses.replace(config, model=model, init_from=str(start) if start else None)


def train_task(
    data: Path, folder: Path, stop: int | None = None, start: Path | None = None, **training: Any
) -> TrainResult:
    """Train one task of a model with further skills, with checkpoints."""
    return train_model(ResolvedRun(task_config(data, start, **training), folder), stop_at=stop)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with the further skills."""
    folder = tmp_path_factory.mktemp("base") / "model"
    build_model(config_with(data, len(FURTHER))).save_pretrained(folder)
    return folder


def weights_of(model: TaskModel, files: set[str]) -> list[nn.Parameter]:
    return [weight for name, weight in model.named_parameters() if model.file_of(name) in files]


def unused_files(model: TaskModel) -> set[str]:
    used = model.required_files("text_classification")
    return {f"skill-{name}" for name in model.config.skills} - used


def mapped_file(weight: torch.Tensor) -> str | None:
    """Return the file whose pages hold a tensor; None for memory of the process."""
    place = weight.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= place < end:
            found = line.split(maxsplit=5)[5:]
            return found[0] if found and found[0].startswith("/") else None
    raise AssertionError("no map holds the tensor")


@pytest.mark.parametrize("sharding", ["none", "host"])
@pytest.mark.parametrize("start", ["random", "base"])
def test_weights_that_no_task_activates_lie_in_files_and_keep_their_bits(
    data, tmp_path, base, start, sharding
):
    source = base if start == "base" else None
    whole = train_task(data, tmp_path / "whole", start=source, sharding=sharding)
    first = train_task(data, tmp_path / "parts", stop=2, start=source, sharding=sharding)
    resumed = train_task(data, tmp_path / "parts", start=source, sharding=sharding)
    unused = unused_files(whole.model)
    assert set(FURTHER) < unused
    for result in (whole, first, resumed):
        assert all(mapped_file(weight) for weight in weights_of(result.model, unused))
        used = result.model.required_files("text_classification")
        assert not any(mapped_file(weight) for weight in weights_of(result.model, used))
        # What workers of other nodes would share is gone with the last of them.
        assert not list((tmp_path / "whole").glob(".shared*"))
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")
    expected = build_model(task_config(data)) if source is None else systems.load_model(base)
    kept = dict(expected.named_parameters())
    for name, weight in resumed.model.named_parameters():
        if resumed.model.file_of(name) in unused:
            assert torch.equal(weight, kept[name]), name


def test_workers_of_a_node_share_one_copy(tmp_path: Path) -> None:
    one, other = SharedMemory(tmp_path / "shared"), SharedMemory(tmp_path / "shared")
    sizes = [3, 5, SHARED_BYTES // 4, SHARED_BYTES, 7]
    values = [torch.arange(size, dtype=torch.float32) for size in sizes]
    mine, theirs = [one(x) for x in values], [other(x) for x in values]
    for value, a, b in zip(values, mine, theirs, strict=True):
        assert torch.equal(a, value)
        assert a.data_ptr() != b.data_ptr()
        assert a.data_ptr() % 64 == 0
        assert mapped_file(a) == mapped_file(b)
        a[-1] = -1
        assert b[-1] == -1


def test_a_resumed_run_hashes_and_reads_what_its_tasks_use(data, tmp_path, base, monkeypatch):
    hashed, read = Counter[str](), Counter[str]()

    def count(counter: Counter[str], original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *rest: Any) -> Any:
            counter[path.name] += 1
            return original(path, *rest)

        return call

    monkeypatch.setattr(serialization, "hash_file", count(hashed, serialization.hash_file))
    for module in ("skillnet.multitask_model", "pipelines.training.runs.checkpoints"):
        monkeypatch.setattr(f"{module}.load_tensors", count(read, serialization.load_tensors))
    for stop, start in ((2, "base"), (None, "checkpoint")):
        hashed.clear()
        read.clear()
        model = train_task(data, tmp_path, stop, base).model
        unused = {f"{file}.safetensors" for file in unused_files(model)}
        assert len(unused) > len(FURTHER)
        assert not unused & hashed.keys(), start
        assert not unused & read.keys(), start
        assert hashed["skill-text.safetensors"], start
        # Each is a name of the same file, from the base to the last checkpoint.
        for folder in checkpoints.list_checkpoint_folders(tmp_path / "checkpoints"):
            checkpoints.verify_checkpoint(folder)
            for name in unused:
                assert (folder / name).samefile(base / name), name


@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
@pytest.mark.parametrize(
    ("where", "sharding"), [("base", "none"), ("checkpoint", "none"), ("checkpoint", "host")]
)
def test_a_file_that_no_task_uses_is_refused_or_keeps_its_digest(
    data, tmp_path, base, where, sharding, damage, capsys
):
    start, name = tmp_path / "base", f"{FURTHER[1]}.safetensors"
    systems.load_model(base).save_pretrained(start)
    run = tmp_path / "run"
    if where == "checkpoint":
        train_task(data, run, 2, start, sharding=sharding)
    folder = start if where == "base" else run / "checkpoints" / "step-00000002"
    content = bytearray((folder / name).read_bytes())
    (folder / name).unlink()  # the same file has other names
    if damage != "missing":
        content[-1] ^= 1
        (folder / name).write_bytes(content[: -4 if damage == "short" else None])
    if damage != "changed" and where == "base":
        with pytest.raises((UserError, ValueError), match=name):
            train_task(data, run, start=start)
        return
    model = train_task(data, run, start=start, sharding=sharding).model
    if damage != "changed":
        # The run starts again: there is no older checkpoint.
        assert name in capsys.readouterr().err
        return
    # No task reads the file. A command that does refuses it, also after several runs.
    model.save_pretrained(tmp_path / "final")
    for saved in (tmp_path / "final", run / "checkpoints" / "step-00000004"):
        with pytest.raises(ValueError, match=f"{name} was altered"):
            systems.load_model(saved)


@pytest.mark.parametrize("trainable", [[], ["skill-general"]])
def test_gradients_and_optimizer_hold_trained_weights_only(data, tmp_path, trainable, monkeypatch):
    kept: list[Any] = []

    def keep(*arguments: Any) -> Any:
        kept.append(build_optimizer(*arguments))
        return kept[-1]

    monkeypatch.setattr(loop, "build_optimizer", keep)
    for stop in (2, None):
        model = train_task(data, tmp_path, stop, ema=0.5, trainable=trainable).model
        trained = {
            parameter
            for name, parameter in model.active_parameters("text_classification")
            if not trainable or model.file_of(name) in trainable
        }
        groups = kept[-1].param_groups
        assert {weight for group in groups for weight in group["params"]} == trained
        assert set(kept[-1].state) == trained
        assert all(parameter.grad is None for parameter in model.parameters())
