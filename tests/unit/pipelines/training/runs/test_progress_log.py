"""Progress file: a line truncated by a full disk or a kill does not damage later lines.

The name of a run whose first process was killed early stays free; a user's folder does not.
"""

import errno
import json
from pathlib import Path

import pytest

from pipelines.training.runs.layout import CONFIG, LOCK, is_unused, lock_run_folder
from pipelines.training.runs.progress_log import (
    ProgressFile,
    follow_progress,
    read_metric_history,
    read_pace,
)
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write
from tests.helpers.waiting import wait_until


def test_partial_last_line_is_removed_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    file = ProgressFile(path)
    file.append(step=1, metrics={"loss": 3.0})
    file.append(step=2, metrics={"loss": 2.0})
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    again = ProgressFile(path)
    again.append(step=2, metrics={"loss": 2.5})
    again.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert read_metric_history(path) == {"loss": [(1, 3.0), (2, 2.5)]}
    path.write_bytes(b"")
    ProgressFile(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("lines", "start", "expected"),
    [
        ([], 0, (0, 0.0)),
        (['{"step": 4, "time": 10}'], 0, (4, 0.0)),
        (['{"step": 4, "time": 10}', '{"step": 8, "time": 12.0}', '{"st'], 0, (8, 2.0)),
        (['{"step": 4, "time": 10}', '{"step": 8, "time": "x"}'], 0, (4, 0.0)),
        (['{"step": 8, "time": 10}', '{"step": 4, "time": 12}'], 0, (4, 0.0)),
        (['{"step": 4}', '{"step": 8}'], 12, (8, 0.0)),
        (['{"step": 4, "time": 1}', f'{{"step": {10**400}, "time": 2}}'], 0, (10**400, 0.0)),
        (['{"step": 1, "time": 1}'] * 900 + ['{"step": 9, "time": 2}'], 0, (9, 8.0)),
    ],
)
def test_pace_of_the_last_lines(tmp_path, lines, start, expected):
    path = tmp_path / "progress.jsonl"
    assert read_pace(path) == (0, 0.0)
    # A line that is being written has no end.
    path.write_text("".join(f"{line}\n" if line.endswith("}") else line for line in lines))
    assert read_pace(path, start) == expected


def test_joined_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_text('{"step": 1, "metrics": {"loss": 1.0}}\n{"step": 2, "met{"step": 3}\n')
    assert read_metric_history(path) == {"loss": [(1, 1.0)]}


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        '"x"',
        '{"metrics": {"loss": 1}}',
        '{"step": "2", "losses": ""}',
        '{"step": 2, "metrics": [1]}',
        '{"step": 2, "metrics": {"loss": "1"}}',
        "[" * 100000,
        "\ud800",
    ],
    ids=range(9),
)
def test_foreign_line_is_skipped(line: str, tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    whole = b'{"step": 1, "metrics": {"loss": 1.0}}\n'
    path.write_bytes(whole + line.encode("utf-8", "surrogatepass") + b"\n")
    assert read_metric_history(path) == {"loss": [(1, 1.0)]}


def test_full_disk_is_reported_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ProgressFile(tmp_path / "progress.jsonl")

    class Full:
        def write(self, line: bytes) -> int:
            if len(line) > 5:
                return len(line) - 5
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    file._stream.close()
    monkeypatch.setattr(file, "_stream", Full())
    with pytest.raises(UserError, match=r"progress.jsonl: the disk is full"):
        file.append(step=1, losses="")
    file.close()


@pytest.mark.parametrize("reached", [10, 7])
def test_progress_ends_with_the_training(reached, tmp_path, capsys):
    """Also if the training stops early, for example after a number of minutes."""
    (tmp_path / "trained.json").write_text("{}", encoding="utf-8")
    file = ProgressFile(tmp_path / "progress.jsonl")
    with follow_progress(tmp_path / "progress.jsonl", 10):
        file.append(step=0, losses="")
        file.append(step=reached, losses="loss 2.0")
        if reached < 10:
            (tmp_path / "trained.json").write_text("{ }", encoding="utf-8")
        said: list[str] = []

        def is_said() -> bool:
            said.append(capsys.readouterr().err)
            return "training" in "".join(said)

        wait_until(is_said, 60)
        console.print_note("evaluating")
    file.close()
    assert "".join(said).startswith(f"training: {reached}/10 steps")
    assert capsys.readouterr().err == "evaluating\n"


def test_the_final_evaluation_has_a_bar_of_its_own(tmp_path, capsys):
    file = ProgressFile(tmp_path / "progress.jsonl")
    with follow_progress(tmp_path / "progress.jsonl", 2):
        file.append(step=0, losses="")
        file.append(step=2, losses="loss 2.0")
        file.append(step=2, evaluating="text_to_image test", rows=30, left=42)
        file.append(step=2, evaluating="text_to_code test", rows=12, left=12)
        file.append(step=2, evaluating="text_to_code test of the source", rows=20, left=20)
    file.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training: 2/2 steps")
    assert lines[-2].startswith("evaluating: 42/42 rows")
    assert lines[-2].endswith("text_to_code test")
    assert lines[-1].startswith("evaluating: 20/20 rows")


def test_a_kill_before_the_configuration_leaves_the_name_free(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).touch()
    (run / f".{CONFIG}.sn-{'0' * 16}.tmp").write_text("na", encoding="utf-8")
    assert is_unused(run)
    with lock_run_folder(run), atomic_write(run / CONFIG, "w") as stream:
        stream.write("name: run")
    assert {path.name for path in run.iterdir()} == {CONFIG, LOCK}
    assert not is_unused(run)


def test_a_rejected_command_removes_the_leftovers_of_a_killed_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / f".{CONFIG}.sn-{'0' * 16}.tmp").touch()
    with lock_run_folder(run):
        pass
    assert not run.exists()


def test_a_folder_with_a_file_of_a_user_is_used(tmp_path: Path) -> None:
    (tmp_path / ".diary.tmp").touch()
    assert not is_unused(tmp_path)
