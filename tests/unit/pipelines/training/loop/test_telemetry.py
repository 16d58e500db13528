"""Tokens, operations, memory, gauges and profiles of a training, and the steps it evaluates."""

import gzip
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.evaluation.inference import EvaluationRanks
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.reporter import LoopReporter, SilentReporter
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from pipelines.training.loop.telemetry import (
    PROFILES,
    CostMeter,
    GaugePublisher,
    find_peak_flops,
    measure_peak_memory,
)
from skillnet.multitask_model import TaskModel
from tests.helpers.small_corpora import small_config


class RecordingReporter(LoopReporter):
    """Reporter that keeps the metrics."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def metrics(self, values: dict[str, float], step: int) -> None:
        self.values |= values


def read_batch(run: ResolvedRun, task: str, rank: int = 0, world: int = 1) -> Batch:
    loader = run.dataloader
    step = next(s for s in range(100) if loader.batch_spec(s).task == task)
    return loader.batch(step, rank, world)


@pytest.mark.parametrize("task", ["text_classification", "speech_recognition", "text_to_code"])
def test_operations_are_three_forward_passes_and_tokens_are_those_of_all_ranks(data, task):
    """Padding is not computed, so it does not count."""
    run = ResolvedRun(small_config(data))
    model = build_model(run.config)
    batch = read_batch(run, task, 0, 2)
    lengths = {
        tower: x["frames"].tolist() if "frames" in x else (x["tokens"] != 0).sum(1).tolist()
        for tower, x in batch.towers.items()
    }
    rows = [dict(zip(lengths, row, strict=True)) for row in zip(*lengths.values(), strict=True)]
    assert len({tuple(row.values()) for row in rows}) > 1
    costs = [model.flops(task, row) for row in rows]
    meter = CostMeter(model, peak_flops=1e9)
    meter.add(batch)
    values = meter.collect_metrics(seconds=2.0)
    operations = 3 * sum(flops for flops, _ in costs)
    share = len(batch.rows) / batch.global_rows
    assert share < 1
    tokens = sum(count for _, count in costs) / share
    assert values["training/tokens_per_second"] == pytest.approx(tokens / 2)
    assert values["training/model_tflops_per_second"] == pytest.approx(operations / 2e12)
    assert values["training/model_flops_utilization"] == pytest.approx(operations / 2e9)
    assert meter.collect_metrics(seconds=2.0) == {}


def test_a_device_of_unknown_peak_has_no_utilization(data, monkeypatch):
    assert find_peak_flops(torch.device("cpu"), True) is None
    about = SimpleNamespace(name="NVIDIA L4", total_memory=24 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert find_peak_flops(torch.device("cuda"), True) == 121e12
    assert find_peak_flops(torch.device("cuda"), False) == 30.3e12
    about.name = "NVIDIA X9"
    assert find_peak_flops(torch.device("cuda"), True) is None


def test_a_system_without_formulas_is_not_run_to_count_it(data, monkeypatch):
    run = ResolvedRun(small_config(data))
    model = build_model(run.config)
    monkeypatch.setattr(type(model), "flops", TaskModel.flops)
    meter = CostMeter(model)
    meter.add(read_batch(run, "text_classification"))
    assert meter.collect_metrics(1.0) == {}


def test_training_reports_rate_and_memory_and_writes_a_profile(data: Path, tmp_path: Path) -> None:
    config = small_config(data, steps=4, log_every=2, profile_start=1)
    reporter = RecordingReporter()
    train_model(ResolvedRun(config, tmp_path), reporter=reporter)
    assert reporter.values["training/tokens_per_second"] > 0
    assert 0.05 < reporter.values["training/peak_host_memory_gb"] < 100
    # The peak of a CPU is not known, so its utilization is not stated.
    assert "training/model_flops_utilization" not in reporter.values
    trace = tmp_path / PROFILES / "step-00000001-rank-0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("embedding" in str(event.get("name")) for event in events)


def test_memory_of_a_gpu_is_reported_beside_that_of_the_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 10**9)
    values = measure_peak_memory(torch.device("cuda"))
    assert values["training/peak_device_memory_gb"] == 3.0


def test_gauges_have_the_metrics_of_the_training_and_the_name_of_the_run(monkeypatch):
    seen: dict[str, tuple[float, Mapping[str, str]]] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name = name

        def set(self, value: float, tags: Mapping[str, str]) -> None:
            seen[self.name] = (value, tags)

    metrics = ModuleType("ray.util.metrics")
    metrics.Gauge = Gauge
    monkeypatch.setitem(sys.modules, "ray.util.metrics", metrics)
    ray = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    publisher = GaugePublisher("first")
    values = {"training/steps_per_second": 3.5, "text_to_image/loss": 1.0}
    publisher.publish(values)
    assert not seen
    ray.is_initialized = lambda: True
    publisher.publish(values)
    assert seen == {"skillnet_training_steps_per_second": (3.5, {"run": "first"})}


def test_the_last_step_is_evaluated_once() -> None:
    settings = TrainingConfig(steps=10, evaluate_every=4)

    def evaluated(reporter: LoopReporter, last: int = 10) -> list[int]:
        return [s for s in range(1, last + 1) if reporter.needs_evaluation(s, last, settings)]

    assert evaluated(LoopReporter()) == [4, 8, 10]
    trial = SilentReporter(FinetuneConfig(), lambda rows, step: None, EvaluationRanks(1, 2))
    assert evaluated(trial) == [4, 8], "a trial does it itself"
    assert evaluated(LoopReporter(), last=6) == [4]
    assert not LoopReporter().needs_evaluation(10, 10, TrainingConfig(steps=10))
