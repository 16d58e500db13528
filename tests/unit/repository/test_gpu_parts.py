"""The parts of ``make gpu``, at tiny sizes on the CPU, and what is kept when one of them fails."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import device_parts, rank_parts, run_parts, step_parts
from benchmarks.gpu.__main__ import PartRows, main, measure_part, run_part
from benchmarks.gpu.bench import GpuBench
from benchmarks.gpu.part_list import list_parts
from benchmarks.measure import Result, plain, read_csv_rows
from skillnet import layers
from skillnet_platform.cluster.gpu_types import GpuType
from tests.unit.skillnet.test_packed_rows import attend_apart

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path: Path) -> GpuBench:
    """The CPU at tiny sizes."""
    made = GpuBench(CPU, tmp_path / "rows", 2, is_rehearsal=True, scratch=tmp_path / "scratch")
    made.scratch.mkdir()
    return made


def index(results: list[Result]) -> dict[tuple[str, str], Result]:
    return {(each.measured, each.unit): each for each in results}


def test_a_machine_without_a_gpu_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(driver, "find_device", lambda: None)
    assert main(["--output", str(tmp_path)]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.startswith("error: make gpu: ")
    assert "finds no GPU on this machine" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_part_keeps_the_rows_before_its_failure(bench: GpuBench) -> None:
    rows = PartRows(bench.output / "gpu.csv")

    def fail(bench: GpuBench):
        yield plain("first", "s", 1.5)
        raise RuntimeError("the card is gone")

    with pytest.raises(RuntimeError):
        measure_part(rows, bench, "broken", fail)
    measure_part(rows, bench, "good", lambda bench: iter([plain("second", "s", 2.5)]))
    kept = [(row["part"], row["measured"]) for row in read_csv_rows(rows.path)]
    assert kept == [("broken", "first"), ("good", "second"), ("good", "finished")]
    assert rows.list_finished() == {"good"}


@pytest.mark.parametrize(
    ("code", "limit_s", "note"),
    [
        ("raise SystemExit('no memory left')", 60.0, "no memory left"),
        ("import os; os.kill(os.getpid(), 11)", 60.0, "exit code -11"),
        ("import time; time.sleep(600)", 0.5, "not finished after 0.5 s"),
    ],
)
def test_the_process_of_a_failed_part_leaves_a_row(
    code: str, limit_s: float, note: str, tmp_path: Path
) -> None:
    rows = PartRows(tmp_path / "gpu.csv")
    assert not run_part(rows, "x", [sys.executable, "-c", code], limit_s)
    (row,) = read_csv_rows(rows.path)
    assert (row["part"], row["measured"], row["note"]) == ("x", "failed", note)
    assert rows.list_finished() == set()


@pytest.mark.slow("test_gpu_parts.py::test_checkpoints_and_exchanges_are_timed")
def test_another_call_measures_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There are no corpora, so the demo fails.
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path / "empty"))
    words = ["--rehearse", "--rounds", "1", "--output", str(tmp_path), "demo", "rates"]
    assert main(words) == 1
    first = read_csv_rows(tmp_path / "gpu-cpu.csv")
    assert [row["part"] for row in first if row["measured"] == "finished"] == ["rates"]
    (failed,) = [row for row in first if row["measured"] == "failed"]
    assert failed["part"] == "demo"
    assert "missing. Run `skillnet prepare " in failed["note"]
    assert main(words) == 1
    second = read_csv_rows(tmp_path / "gpu-cpu.csv")[len(first) :]
    assert {row["part"] for row in second} == {"demo"}


def test_parts_are_named_by_their_starts(
    bench: GpuBench, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = list(list_parts(2, bench))
    assert parts[0] == "rates"
    assert parts[-1] == "demo"
    assert "sharding/2/hybrid/bf16" in parts
    assert not any(each.startswith("sharding") for each in list_parts(1, bench))
    assert main(["--rehearse", "--list", "steps/base/eager"]) == 0
    assert capsys.readouterr().out.split() == [
        each for each in parts if each.startswith("steps/base/eager")
    ]
    with pytest.raises(SystemExit):
        main(["--rehearse", "--list", "stebs"])
    assert "unknown part 'stebs'" in capsys.readouterr().err


def test_equal_devices_have_equal_weights(bench: GpuBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_parts, "PARITY_STEPS", 2)
    (result,) = device_parts.compare_devices(bench)
    assert (result.value, result.met) == (0.0, "yes")


def test_waits_are_counted_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work() -> None:
        for _ in range(4):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)

    every, place = device_parts.count_waits(work, steps=2)
    assert (every.value, place.value) == (2.0, 2.0)
    assert place.measured.startswith("waits of the host, test_gpu_parts.py:")
    assert modes == ["warn", "default"]


def test_each_batch_has_its_time_rate_and_share_of_the_peak(
    bench: GpuBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.card = GpuType("card", 100, 1000, 0.5, 0.5)
    found: list[Result] = []
    for result in step_parts.measure_steps(bench, "base", "text_to_image"):
        found.append(result)
    whole, parts = (each for each in found if each.unit == "s per step")
    assert whole.setting.endswith("4 rows, 4 at a time, eager")
    assert parts.setting.endswith("8 rows, 4 at a time, eager")
    units = {(each.setting, each.unit): each for each in found}
    for took, rows in ((whole, 4), (parts, 8)):
        rate = units[took.setting, "rows per second"]
        assert rate.high == pytest.approx(rows / took.low)
        assert 0 < units[took.setting, "MFU"].value < 1
    # The loss of parts passes forward twice.
    operations = [units[each.setting, "operations"].value for each in (whole, parts)]
    assert operations[1] > 2 * operations[0]


def test_a_part_of_compiled_steps_compiles_the_model(
    bench: GpuBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(step_parts, "compile_layers", lambda *given: compiled.append(given))
    part = list_parts(1, bench)["steps/base/compiled/text_classification"]
    settings = [each.setting for each in part(bench)]
    assert len(compiled) == 1
    assert all(each.endswith("compiled") for each in settings)


def test_checkpoints_and_exchanges_are_timed(bench: GpuBench) -> None:
    found = index([*run_parts.measure_checkpoints(bench), *run_parts.measure_swaps(bench)])
    assert found["checkpoint, loaded", "s"].value > 0
    assert found["exchange of tasks", "ms"].value > 0


@pytest.mark.slow("test_gpu_parts.py::test_checkpoints_and_exchanges_are_timed")
def test_rates_of_a_loader_come_with_and_without_steps(
    bench: GpuBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_parts, "LOADERS", (0,))
    monkeypatch.setattr(run_parts, "LOADED_STEPS", 3)
    found = index(list(run_parts.measure_loader(bench)))
    assert found["loader, 0 processes", "rows per second"].value > 0
    assert 0 < found["loader, 0 processes", "share of the time waiting"].value < 1


def test_a_traced_step_leaves_its_trace(bench: GpuBench) -> None:
    found = list(step_parts.trace_steps(bench, "base"))
    names = {each.note for each in found if each.note}
    assert len(names) == 5
    assert {path.name for path in bench.output.iterdir()} == names


@pytest.mark.slow("test_gpu_parts.py::test_checkpoints_and_exchanges_are_timed")
def test_ranks_are_measured_and_a_killed_run_resumes(bench: GpuBench) -> None:
    (sums,) = rank_parts.measure_sums(bench, 2)
    assert sums.value > 0
    found = index(list(rank_parts.measure_training(bench, 2, "full", "fp32")))
    name = "training on 2, sharding full, fp32"
    assert found[name, "rows per second"].value > 0
    assert found[name, "MB reduced per rank and step"].value > 0
    (lost, _) = run_parts.measure_restart(bench)
    assert (lost.measured, lost.met) == ("killed run", "yes")
    units = index(list(run_parts.measure_runs(bench)))
    assert units["evaluation", "rows per second"].value > 0


def test_figures_of_a_run_become_rows() -> None:
    row = {"metric": "accuracy", "task": "a", "split": "test", "value": 0.5}
    result = {"step": 3, "seconds": 2.0, "rows_per_second": 9.0, "waiting": 0.25}
    made = list(run_parts.read_run_result("finetune", result | {"evaluation": [row]}))
    assert [each.value for each in made] == [2.0, 9.0, 25.0, 0.5]


def test_attention_by_lengths_is_compared_with_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "attend_sequences", attend_apart)
    found = device_parts.compare_attention(CPU)
    assert 0 < found < device_parts.ROUNDED_LIMIT
    wrong = torch.tensor([0, 200, 400, 600, 800, 1000], dtype=torch.int32)
    monkeypatch.setattr(
        layers.RaggedRows, "find", lambda mask_BT: layers.RaggedRows(mask_BT, wrong)
    )
    assert device_parts.compare_attention(CPU) > device_parts.ROUNDED_LIMIT
