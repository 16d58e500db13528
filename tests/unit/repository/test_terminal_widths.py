"""Tables and progress of all commands at common widths: no word and no number is broken."""

import io
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from pipelines.data.preprocessing.inspection import inspect_corpus, show_inspection
from pipelines.training.evaluation.evaluator import tidy_rows
from pipelines.training.evaluation.tables import result_cells, summary_cells
from pipelines.verify import HashCheck, show_verification
from skillnet.metrics import ConfidenceInterval
from skillnet.skills import default_tasks
from skillnet_cluster.checks import Finding
from skillnet_cluster.doctor import DoctorReport, show_findings
from skillnet_platform import console
from skillnet_studies.analysis.finished_runs import compare_runs, label_runs, read_run
from skillnet_studies.report.report import build_report, show_report
from sweeps.search.ranking import RankedConfiguration, build_ranking_table
from tests.helpers import user_corpora
from tests.helpers.synthetic_runs import TASKS, write_study

SYSTEMS = {"skillnet": 0.5, "skillnet-pretrained": 1.2, "specialist": 0.0, "dense": -0.6}


#: Prints tables for people.
Show = Callable[[], None]


def show_evaluation(folder: Path) -> Show:
    metrics = {
        "text_classification": ("accuracy", "macro_f1"),
        "speech_recognition": ("token_error_rate", "exact_rate"),
    }
    ranks = ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank")
    rows = []
    for task in TASKS:
        names = metrics.get(task, (*ranks, *(f"reverse_{name}" for name in ranks)))
        measured = {name: ConfidenceInterval(1.0, 1.0, 1.0) for name in names}
        for split in ("test", "test_new_speakers"):
            rows += tidy_rows(
                measured,
                system="skillnet",
                task=task,
                seed=0,
                split=split,
                activated_params=10,
                flops_per_example=100,
                steps=2900,
            )

    def show() -> None:
        console.print_table("run", *result_cells(rows))
        console.print_table("five tasks", *summary_cells(rows, rows, default_tasks(), 20))

    return show


def show_ranking(folder: Path) -> Show:
    settings = {"training.lr": 0.00123, "model.dim": 256, "plan": "general+text+alignment"}
    one = RankedConfiguration(
        rank=1,
        name="lr=0.00123_dim=256",
        settings=settings,
        score=0.81234,
        score_std=0.01234,
        scores=dict.fromkeys(TASKS, 0.812345),
        status_counts={"finished": 3, "stopped": 1},
        activated_params=2_345_678,
        flops_per_example=123_456_789,
        step=2900,
    )
    two = RankedConfiguration(**(asdict(one) | {"rank": 2, "name": "lr=0.00456_dim=64"}))
    return lambda: console.print_table("sweep", *build_ranking_table([one, two]))


def show_comparison(folder: Path) -> Show:
    runs = write_study(folder / "runs", SYSTEMS, seeds=(0, 1, 2))
    report = build_report(compare_runs(label_runs([read_run(f) for f in runs])), "four")
    return lambda: show_report(report)


def show_inspected_folder(folder: Path) -> Show:
    found = inspect_corpus(str(user_corpora.tnews(folder / "tnews")))
    return lambda: show_inspection(found)


def show_doctor(folder: Path) -> Show:
    advice = "free space, or set SKILLNET_HOME to a directory of a larger disk, and run it again"
    findings = [
        Finding("memory", "ok", "13.1 GiB of 15.6 GiB are free"),
        Finding("disk", "warning", "3.1 GiB are free in /home/somebody/skillnet", advice),
    ]
    return lambda: show_findings(DoctorReport("doctor", findings, findings))


def show_verified_model(folder: Path) -> Show:
    detail = "13 files, 23.4 MiB in /home/somebody/skillnet/runs/first-run/model"
    checks = [HashCheck("weights", "ok", detail), HashCheck("corpus headings", "absent", "–")]
    return lambda: show_verification(checks, "models:/skillnet@champion")


SHOWN: list[Callable[[Path], Show]] = [
    show_evaluation,
    show_ranking,
    show_comparison,
    show_inspected_folder,
    show_doctor,
    show_verified_model,
]


@pytest.mark.parametrize("prepare", SHOWN)
def test_tables_fit_the_width_and_break_no_word(
    prepare: Callable[[Path], Show],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words: set[str] = set()
    print_table = console.print_table

    def record(title: str, columns: Any, rows: Any, caption: str = "") -> None:
        cells = [console._cell(cell) for row in rows for cell in row]
        words.update(" ".join([title, *columns, *cells, caption]).split())
        print_table(title, columns, rows, caption)

    monkeypatch.setattr(console, "print_table", record)
    show = prepare(tmp_path)
    for width in (80, 100, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        capsys.readouterr()
        words.clear()
        show()
        printed = capsys.readouterr().out
        # Chinese has no spaces, so its lines end after any character.
        latin = {word for word in words if cell_len(word) == len(word)}
        assert len(latin) > 10
        assert latin - set(printed.split()) == set(), width
        for line in printed.splitlines():
            # Only a path that is too long for the rest of its row makes a line longer.
            is_path = any(len(word) > width // 2 for word in line.split())
            assert cell_len(line) <= width or is_path, width


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


LOSSES = ", ".join(f"{task} 2.31{number}" for number, task in enumerate(TASKS))


@pytest.mark.parametrize("width", [80, 100, 120])
def test_progress_of_five_tasks_shows_step_rate_and_remaining_time(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with console.show_progress("training", 2900, done=0) as bar:
        bar.start -= 100.0
        bar.advance(1450, LOSSES)
    drawn = stream.getvalue().rpartition("\x1b[2K")[2]
    lines = drawn.replace("\x1b[?25h", "").splitlines()
    assert "1450/2900" in lines[0]
    assert "steps/s, 1:40 left" in lines[0]
    assert lines[0].count("━") > 10
    assert len(lines) > 1
    assert max(map(cell_len, lines)) <= width
    assert " ".join(" ".join(lines[1:]).split()) == LOSSES


def test_progress_of_a_pipe_honours_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with console.show_progress("training", 2900) as bar:
        bar.start -= 100.0
        bar.advance(1450, LOSSES)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training: 1450/2900 steps, ")
    assert lines[0].endswith("steps/s, 1:40 left")
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines[1:]).split()) == LOSSES
