"""Plans with the rates that ``make gpu`` has measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import PartRows
from benchmarks.measure import plain
from pipelines.finetune import main as finetune
from skillnet_planning.measurements import (
    COPIES,
    LAUNCH,
    PRODUCTS,
    SUMS,
    describe_step,
    read_measurements,
)
from skillnet_planning.plan import PlanConfig, main, parse_pool, parse_runs
from skillnet_planning.run_plan import plan_run
from skillnet_platform.cluster.gpu_types import find_gpu_type
from skillnet_platform.errors import UserError

WORDS = ["--config", "tiny", "--gpus", "8xH100"]
RATES = (
    (f"{PRODUCTS}bfloat16", "TFLOP/s", 600.0),
    (f"{PRODUCTS}float32", "TFLOP/s", 50.0),
    (f"{COPIES}device", "GB/s", 2500.0),
    (f"{COPIES}host to device", "GB/s", 20.0),
    (LAUNCH, "us", 20.0),
    (LAUNCH, "us", 30.0),
    (LAUNCH, "us", 25.0),
    (f"{SUMS}8 ranks", "GB/s", 90.0),
    (f"{SUMS}8 ranks", "GB/s", 300.0),
)


def write_rows(path: Path, *rows: tuple[str, str, float, str]) -> Path:
    kept = PartRows(path)
    for measured, unit, value in RATES:
        kept.append("rates", plain(measured, unit, value))
    for measured, unit, value, setting in rows:
        kept.append("steps", plain(measured, unit, value, setting=setting))
    return path


def test_measured_rates_take_the_place_of_the_data_sheet(tmp_path: Path) -> None:
    found = read_measurements(write_rows(tmp_path / "gpu.csv"))
    card = found.apply(find_gpu_type("H100"))
    assert (card.bf16_tflops, card.fp32_tflops, card.bandwidth_gb_s) == (600, 50, 2500)
    assert (card.link_gb_s, card.memory_gb) == (300, 80)
    assert found.launch_s == pytest.approx(25e-6)


def test_a_plan_shows_measured_steps_beside_its_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finetune.parse_arguments(WORDS[:2]).joint()
    # The 16 rows of this task are two on each of eight.
    name = describe_step(config, "text_classification", 2, None, is_compiled=False)
    other = describe_step(config, "text_classification", 2, None, is_compiled=True)
    path = write_rows(
        tmp_path / "gpu.csv",
        ("base", "s per step", 0.125, name),
        ("base", "s per step", 9.0, other),
    )
    (run,) = parse_runs(WORDS[:2])
    pool = parse_pool(PlanConfig(gpus="8xH100"))
    sheet = plan_run(run.config, pool)
    found = plan_run(run.config, replace(pool, measured=read_measurements(path)))
    by_sheet = {task.task: task for task in sheet.tasks}
    for task in found.tasks:
        before = by_sheet[task.task]
        assert task.compute_s > before.compute_s
        assert task.launch_s == pytest.approx(2.5 * before.launch_s)
        assert task.measured_s == (0.125 if task.task == "text_classification" else None)
        assert before.measured_s is None
    assert found.hours > sheet.hours
    assert main([*WORDS, "--measurements", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "the rates in gpu.csv" in shown
    assert "0.125 (" in shown


def test_a_step_of_other_sizes_is_another_step() -> None:
    config = finetune.parse_arguments(WORDS[:2]).joint()
    wide = replace(config, model=replace(config.model, ffn_dim=4096))
    names = {
        describe_step(each, "text_classification", rows, part, False)
        for each in (config, wide)
        for rows, part in ((64, None), (64, 32), (32, None))
    }
    assert len(names) == 6
    # A part that holds all rows is no part.
    same = describe_step(config, "text_classification", 64, 256, False)
    assert same == describe_step(config, "text_classification", 64, None, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a,b\n1,2\n", "it has no column 'part'. Give a file of make gpu"),
        ("part,measured,unit,value,setting\nx,y,s,fast,\n", "line 2: 'fast' is no number"),
        ("part,measured,unit,value,setting\nx,y,s,1.0,\n", "it has no rates. Measure them"),
        ("part,measured,unit,value,setting\nx,launch in a step,us,nan,\n", "it has no rates"),
    ],
)
def test_other_files_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="--measurements") as caught:
        read_measurements(path)
    assert message in str(caught.value)
