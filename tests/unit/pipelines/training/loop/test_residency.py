"""Weights that only visit the device: the same run to the bit, at any step and in evaluations."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training.evaluation.tables import flat_metrics
from pipelines.training.loop import residency
from pipelines.training.loop.loop import TrainResult, train_model
from pipelines.training.loop.optimizer import WeightAverage, build_optimizer
from pipelines.training.loop.reporter import LoopReporter, evaluate_validation
from pipelines.training.loop.residency import WeightResidency
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from skillnet.multitask_model import TaskModel
from tests.helpers.small_corpora import small_config


class Evaluations(LoopReporter):
    """Keeps the metrics of each evaluation."""

    evaluates_last = True

    def __init__(self, run: ResolvedRun) -> None:
        self.config, self.found = run.config, dict[str, float]()

    def evaluate(self, model: TaskModel, step: int) -> None:
        rows = evaluate_validation(self.config, model, None)
        self.found |= {f"{step} {name}": value for name, value in flat_metrics(rows).items()}


def train(
    folder: Path, data: Path, stop: int | None = None, **training: Any
) -> tuple[TrainResult, dict[str, float]]:
    """Train, save the model, and return the result and the metrics of evaluations."""
    values = {"steps": 8, "precision": "fp32", "checkpoint_every": 3, "evaluate_every": 3}
    run = ResolvedRun(small_config(data, **(values | training)), folder)
    reporter = Evaluations(run)
    result = train_model(run, reporter=reporter, stop_at=stop)
    result.model.save_pretrained(folder / "model")
    return result, reporter.found


def digest_files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder, result and metrics of a run with an average, whose weights stay on the device."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, *train(folder, data, ema=0.9)


def test_a_run_and_its_checkpoints_are_the_same(data: Path, tmp_path: Path) -> None:
    (plain, metrics), (offloaded, others) = (
        train(tmp_path / place, data, trainable=["skill-general"], sharding=place)
        for place in ("none", "host")
    )
    assert digest_files(tmp_path / "none") == digest_files(tmp_path / "host")
    assert offloaded.losses == plain.losses
    assert others == metrics
    assert len(metrics) > 2 * len(plain.model.config.tasks)


def test_a_run_resumes_with_the_other_setting(data: Path, plain: Any, tmp_path: Path) -> None:
    # The last part loads a checkpoint into the host's memory.
    for stop, place in ((3, "host"), (5, "none"), (None, "host")):
        train(tmp_path, data, stop, ema=0.9, sharding=place)
    for part in ("model", "checkpoints/step-00000008"):
        assert digest_files(plain[0] / part) == digest_files(tmp_path / part)


def test_the_device_has_the_tensors_of_two_tasks(data: Path) -> None:
    config = small_config(data, ema=0.9)
    model = build_model(config)
    optimizer = build_optimizer(model.named_parameters(), config.training)
    average = WeightAverage(0.9)
    everything = list(model.named_parameters())
    for _, parameter in everything:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    average.update(everything)

    def locate() -> dict[str, dict[str, int]]:
        """Field -> name -> place in memory, of weights, optimizer state and averages."""
        fields = dict[str, dict[str, int]]()
        for name, parameter in everything:
            values = {"weight": parameter.data, "average": average.values[name]}
            for field, value in (values | optimizer.state[parameter]).items():
                fields.setdefault(field, {})[name] = value.data_ptr()
        return fields

    host = locate()
    assert host.keys() == {"weight", "average", "step", "exp_avg", "exp_avg_sq"}
    resident = WeightResidency(model, optimizer, average, torch.device("cpu"), config.tasks)
    used = {task: {name for name, _ in model.active_parameters(task)} for task in config.tasks}

    def moved() -> dict[str, set[str]]:
        """Field -> names of the weights whose field lies on the device."""
        return {
            field: {name for name, place in places.items() if place != host[field][name]}
            for field, places in locate().items()
        }

    assert not any(moved().values())
    resident.begin_step("text_to_image", "text_to_video")
    assert moved() == dict.fromkeys(host, used["text_to_image"] | used["text_to_video"])
    resident.begin_step("text_to_video", None)
    assert moved() == dict.fromkeys(host, used["text_to_video"])
    assert model.weight_loader is not None
    model.weight_loader("text_classification")
    # An evaluation needs no state.
    assert moved() == {field: set() for field in host} | {"weight": used["text_classification"]}


class LateStream:
    """Stream of a device that makes no copy until somebody waits for it.

    Args:
        device: ignored.
    """

    def __init__(self, device: torch.device) -> None:
        self._asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        self._asked += zip(targets, sources, strict=True)

    def wait(self) -> None:
        for target, source in self._asked:
            target.copy_(source)
        self._asked.clear()

    synchronize = wait


@pytest.mark.parametrize("every", [3, 0])
def test_checkpoints_evaluations_and_averages_wait_for_the_copies(
    every, data, plain, tmp_path, monkeypatch
):
    # An evaluation waits before the checkpoint of its step; without one the checkpoint waits.
    if not every:
        monkeypatch.setattr(Evaluations, "evaluates_last", False)
        plain = tmp_path / "0", *train(tmp_path / "0", data, ema=0.9, evaluate_every=0)
    monkeypatch.setattr(residency, "CopyStream", LateStream)
    late, others = train(tmp_path / "late", data, ema=0.9, evaluate_every=every, sharding="host")
    folder, expected, metrics = plain
    assert late.losses == expected.losses
    assert others == metrics
    assert digest_files(folder) == digest_files(tmp_path / "late")
