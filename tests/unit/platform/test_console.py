"""Tables and progress where there is no terminal, and JSON of what commands hand over."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from skillnet_platform import console


@dataclass
class Row:
    name: str
    values: tuple[float, ...]


def test_a_table_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("Tasks", ["task", "R@10"], [["text_to_image", 0.3512345], ["[x]", None]])
    captured = capsys.readouterr()
    assert "0.3512" in captured.out
    assert "[x]" in captured.out, "a cell is text, not markup"
    assert captured.err == ""


def test_a_wide_table_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    long = "a" * 90
    console.print_table("Wide", ["first", "second"], [[long, "end"]])
    assert long in capsys.readouterr().out


def test_json_takes_what_commands_have(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json(
        {
            "row": Row("a", (1.0, float("inf"))),
            "path": Path("x/y"),
            "array": np.arange(2, dtype=np.float32),
            "scalar": np.int64(3),
            "names": {"b", "a"},
        }
    )
    assert json.loads(capsys.readouterr().out) == {
        "row": {"name": "a", "values": [1.0, None]},
        "path": "x/y",
        "array": [0.0, 1.0],
        "scalar": 3,
        "names": ["a", "b"],
    }


def test_progress_without_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with console.show_progress("training", total=4, unit="steps") as bar:
        bar.advance(2, "loss 1.5")
        bar.advance(2)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0].startswith("training: 2/4 steps, ")
    assert "steps/s" in lines[0]
    assert "left" in lines[0]
    assert lines[0].endswith("loss 1.5")
    assert lines[-1].startswith("training: 4/4 steps, ")
    assert "left" not in lines[-1]


def test_progress_of_a_resumed_run_counts_only_its_own_steps() -> None:
    with console.show_progress("training", total=100, done=90) as bar:
        bar.start -= 10.0
        bar.advance(5)
        assert bar.rate == pytest.approx(0.5, rel=0.05)
        assert "95/100" in bar.line()
        assert "0:10 left" in bar.line()


def test_what_was_done_before_and_is_seen_late_says_nothing_of_the_rate() -> None:
    with console.show_progress("sweep", total=100) as bar:
        bar.start -= 10.0
        bar.found(60)
        bar.advance(20)
        assert bar.rate == pytest.approx(2.0, rel=0.05)
        assert "80/100" in bar.line()
        assert "0:10 left" in bar.line()
