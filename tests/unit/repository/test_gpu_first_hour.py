"""The tables of ``make gpu``, made on the CPU at tiny sizes."""

import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_first_hour
from plugins.planning.tests.test_memory_plan import short_config
from skillnet_platform.cluster.gpu_types import GpuType
from tests.helpers.small_corpora import small_config, write_corpora

CPU = torch.device("cpu")


def test_a_machine_without_a_gpu_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_first_hour, "find_device", lambda: None)
    assert gpu_first_hour.main(["--output", str(tmp_path)]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.startswith("error: make gpu: ")
    assert "finds no GPU on this machine" in shown
    assert list(tmp_path.iterdir()) == []


def test_equal_devices_have_equal_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_corpora(tmp_path / "corpora", rows=8, test_rows=4)
    monkeypatch.setattr(gpu_first_hour, "PARITY_STEPS", 2)
    (result,) = gpu_first_hour.compare_devices(lambda use_gpu: small_config(data))
    assert (result.value, result.met) == (0.0, "yes")


def test_waits_are_counted_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work() -> None:
        for _ in range(4):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)

    every, place = gpu_first_hour.count_waits(work, steps=2)
    assert (every.value, place.value) == (2.0, 2.0)
    assert place.measured.startswith("waits of the host, test_gpu_first_hour.py:")
    assert modes == ["warn", "default"]


def test_each_task_has_its_time_rate_and_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    card = GpuType("card", 100, 1000, 0.5, 0.5)
    monkeypatch.setattr(gpu_first_hour, "describe_card", lambda device: card)
    config = short_config(micro_batch_size=4, precision="fp32")
    results = list(gpu_first_hour.measure_tasks(config, "tiny, ", CPU, rounds=2))
    units = {(each.measured, each.unit): each for each in results}
    for task in config.tasks:
        took = units[f"tiny, {task}", "s per step"]
        assert took.setting == "16 rows, 4 at a time"
        assert units[f"tiny, {task}", "rows per second"].high == pytest.approx(16 / took.low)
        assert 0 < units[f"tiny, {task}", "MFU"].value < 1
    assert len(results) == 3 * len(config.tasks)


def test_runs_become_rows_and_a_failed_run_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"metric": "accuracy", "task": "a", "split": "test", "value": 0.5}
    result = {"step": 3, "seconds": 2.0, "rows_per_second": 9.0, "waiting": 0.25}
    made = list(gpu_first_hour.read_run_result("finetune", result | {"evaluation": [row]}))
    assert [each.value for each in made] == [2.0, 9.0, 25.0, 0.5]

    def fail(words: list[Any], **options: Any) -> Any:
        return subprocess.CompletedProcess(words, int("--json" in words), "", "note\nerror: no GPU")

    monkeypatch.setattr(subprocess, "run", fail)
    (failed,) = gpu_first_hour.run_commands("x", use_gpu=True)
    assert (failed.measured, failed.note) == ("pretrain", "error: no GPU")


def test_steps_are_also_measured_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(gpu_first_hour, "compile_plans", compiled.append)
    config = short_config(precision="fp32")
    config.tasks.pop("text_to_image")
    for label, each in gpu_first_hour.list_compiled(config):
        list(gpu_first_hour.measure_tasks(each, label, CPU, rounds=1))
        assert len(compiled) == (label == "compiled ")
