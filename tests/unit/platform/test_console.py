"""Tables and progress where there is no terminal, and JSON of what commands hand over."""

import io
import json
import sys
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


@pytest.mark.parametrize("columns", ["1", "0", "wide", "9" * 30])
def test_an_unusable_number_of_columns_breaks_no_table(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    console.print_table("A title", ["first", "second"], [["a word", 1.5], ["", None]])
    assert {"A", "title", "first", "second", "a", "word", "1.5", "–"} <= set(
        capsys.readouterr().out.split()
    )


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
        bar.start -= 1.0
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


@pytest.mark.parametrize("pause", [0.0, 1e9])
def test_the_last_line_of_progress_is_printed_once(
    pause: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", pause)
    with console.show_progress("training", total=3) as bar:
        for loss in ("loss 3", "loss 2", "loss 2"):
            bar.advance(1, loss)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "3/3" in line] == ["training: 3/3 steps, loss 2"]
    assert len(lines) == (3 if pause == 0.0 else 1)


def test_a_line_without_progress_is_not_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with console.show_progress("tuning", total=3) as bar:
        for steps in (0, 0, 3, 0):
            bar.advance(steps, "2 running")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" steps")[0] for line in lines] == ["tuning: 0/3", "tuning: 3/3"]


def test_a_number_and_its_per_cent_sign_are_one_word(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "36")
    console.print_table(
        "", ["task", "metric", "split"], [["a b c d", "accuracy 6.8 %", "the test"]]
    )
    assert "6.8 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (1.26, "1.3 s"), (59.4, "59.4 s"), (59.7, "1 min 0 s"), (75, "1 min 15 s")],
)
def test_a_short_time_is_not_zero_minutes(seconds: float, text: str) -> None:
    assert console.format_minutes(seconds) == text


@pytest.mark.parametrize(("done", "found", "advanced"), [(90, 0, 5), (0, 60, 20)])
def test_steps_of_an_earlier_run_say_nothing_of_the_rate(
    done: int, found: int, advanced: int
) -> None:
    """Those that are known at the start, and those that are seen late."""
    with console.show_progress("training", total=100, done=done) as bar:
        bar.start -= 10.0
        bar.found(found)
        bar.advance(advanced)
        assert bar.rate == pytest.approx(advanced / 10, rel=0.05)
        assert f"{done + found + advanced}/100" in bar.line()
        assert "0:10 left" in bar.line()


#: What data can contain: markup that does not close, a write to the clipboard (OSC 52), also with
#: the one-byte introducer, a return to the start of the line, reordered text, half a character.
HOSTILE = "[/b]\x1b]52;c;Y3VybA==\x07\x9d52;c;WA==\x9c\rok\u202e[link=x]\udc80"
SHOWN = r"[/b]\u001b]52;c;Y3VybA==\u0007\u009d52;c;WA==\u009c\u000dok\u202e[link=x]\udc80"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_data_in_messages_reaches_the_terminal_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_note(f"two\nlines {HOSTILE}")
    console.print_warning(HOSTILE)
    console.print_error(HOSTILE)
    notes = capsys.readouterr().err
    assert notes == f"two\nlines {SHOWN}\nwarning: {SHOWN}\nerror: {SHOWN}\n"


def test_data_in_a_table_is_neither_markup_nor_control(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(f"{HOSTILE}\n", [HOSTILE, "b"], [[HOSTILE, 1]], caption=HOSTILE)
    table = capsys.readouterr().out
    assert table.count(SHOWN) == 4
    assert not set(table) & set("\x1b\x07\x9d\x9c\r\u202e\udc80")
    assert f"{SHOWN}\\n\n" in table, "a title is one line"


def test_data_in_progress_lines_is_one_line_of_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with console.show_progress(HOSTILE, total=2, unit=HOSTILE) as bar:
        bar.advance(1, f"file\nerror: {HOSTILE}")
        bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(SHOWN) for line in lines)
    assert f"file\\nerror: {SHOWN}" in lines[0]


def test_a_part_counts_when_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with console.show_progress("evaluating", unit="rows") as bar:
        seen = []
        for name, rows, left in (("first", 30, 42), ("second", 12, 12)):
            bar.begin_part(name, rows, left)
            seen.append((bar.done, bar.total))
    assert seen == [(0, 42), (30, 42)]
    assert capsys.readouterr().err.startswith("evaluating: 42/42 rows")


def test_data_in_a_progress_bar_is_neither_markup_nor_control(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "400")
    with console.show_progress(HOSTILE, total=2, unit=HOSTILE) as bar:
        bar.advance(1, f"a\n{HOSTILE}")
    drawn = stream.getvalue()
    assert "\x1b]" not in drawn
    assert "\x9d" not in drawn
    assert SHOWN in drawn
    assert f"a\\n{SHOWN}" in drawn


def test_a_live_table_on_a_terminal_and_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.show_live_table("Jobs", ["job", "state", "steps"]) as show:
        for steps in (1, 2):
            show([[f"a\n{HOSTILE}", "running", steps], ["b", "waiting", "–"]])
        show([[f"a\n{HOSTILE}", "done", 2], ["b", "waiting", "–"]])
    assert capsys.readouterr().err.splitlines() == [
        f"a\\n{SHOWN}: running, 1", "b: waiting", f"a\\n{SHOWN}: done, 2"
    ]  # fmt: skip
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "xterm")
    with console.show_live_table(HOSTILE, ["job", "state"]) as show:
        show([[f"a\n{HOSTILE}", "running"]])
        show([[f"a\n{HOSTILE}", "done"]])
    drawn = stream.getvalue()
    assert "\x1b]" not in drawn
    assert "\x9d" not in drawn
    assert f"a\\n{SHOWN}" in drawn
    assert "done" in drawn


def test_json_on_a_terminal_has_no_controls_and_the_same_content(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.emit_json({HOSTILE: [HOSTILE]})
    console.print_json_lines([{"a": HOSTILE}])
    printed = capsys.readouterr().out
    assert not set(printed) & set("\x1b\x07\x9d\x9c\r\u202e\udc80")
    document, _, line = printed.rpartition("}\n{")
    assert json.loads(document + "}") == {HOSTILE: [HOSTILE]}
    assert json.loads("{" + line) == {"a": HOSTILE}


def test_a_log_keeps_its_colours_only(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_log(f"\x1b[36m(worker)\x1b[0m {HOSTILE}\x1b[2J\n")
    assert capsys.readouterr().out == f"\x1b[36m(worker)\x1b[0m {SHOWN}\\u001b[2J\n"


def test_units_that_are_read_at_once_have_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of a run of a fraction of a second are read together."""
    with console.show_progress("training", 20, "steps") as bar:
        bar.advance(20, "loss 0.6")
    assert capsys.readouterr().err == "training: 20/20 steps, loss 0.6\n"
