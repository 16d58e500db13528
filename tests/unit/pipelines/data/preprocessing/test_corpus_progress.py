"""When a corpus is stopped because of its error rate, or by a signal."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.corpora.base import SourceArchives
from pipelines.data.preprocessing import ray_tasks
from pipelines.data.preprocessing.jobs import CorpusJob
from pipelines.data.preprocessing.progress import MIN_ROWS_TO_STOP, CorpusProgress
from pipelines.data.preprocessing.staging import READ_SUMMARY, REJECTED_ROWS
from skillnet_platform import signals
from skillnet_platform.errors import TerminatedError, UserError
from tests.helpers.synthetic_corpora import Made


def test_a_signal_does_not_reach_into_the_iterator_that_submits_tasks() -> None:
    is_inside, may_continue, closed_by = threading.Event(), threading.Event(), list[str]()

    def submit() -> Generator[dict[str, int], None, None]:
        try:
            yield {"rows": 1}
            is_inside.set()
            assert may_continue.wait(60)
            yield {"rows": 2}
        finally:
            closed_by.append(threading.current_thread().name)

    def interrupt() -> None:
        assert is_inside.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        may_continue.set()

    threading.Thread(target=interrupt).start()
    with (
        pytest.raises(TerminatedError),
        signals.terminate_as_interrupt(),
        contextlib.closing(ray_tasks._iterate_in_thread(submit())) as items,
    ):
        assert list(items) == "interrupted"
    # It was closed between two items, in its own thread, before its caller continued.
    assert closed_by == ["prepare"]


def test_items_and_errors_of_the_thread_arrive_in_order() -> None:
    def fail() -> Generator[dict[str, int], None, None]:
        yield {"rows": 1}
        raise UserError("a.csv: is damaged")

    items = ray_tasks._iterate_in_thread(fail())
    assert next(items) == {"rows": 1}
    with pytest.raises(UserError, match=r"a\.csv: is damaged"):
        next(items)
    many = ray_tasks._iterate_in_thread({"rows": number} for number in range(50))
    assert [item["rows"] for item in many] == list(range(50))


def start_progress(folder: Path) -> CorpusProgress:
    """Return the progress of a corpus without finished shards."""
    staging = folder / ".made.partial"
    staging.mkdir(exist_ok=True)
    job = CorpusJob(Made(), SourceArchives.none(), folder / "made", staging_dir=staging)
    return CorpusProgress(job, {})


def shard_result(number: int, rows: int, **bad: int) -> dict[str, Any]:
    return {"stem": f"train-{number:05d}", "entry": None, "rows": rows, "bad": bad}


def read_summary(rows: int, **errors: int) -> dict[str, Any]:
    rejections = {"by choice": 5} | errors
    return {"split_rows": {"train": rows}, "rejections": rejections, "errors": errors}


def end_reading(progress: CorpusProgress, units: int, summary: dict[str, Any]) -> None:
    """Write the file that the reading task leaves when it has ended."""
    text = json.dumps({"summary": summary, "units": units})
    (progress.job.staging_dir / READ_SUMMARY).write_text(text, encoding="utf-8")


def test_bad_rows_at_the_head_of_a_corpus_do_not_stop_it(tmp_path: Path) -> None:
    """Half of the finished rows are bad, but only a twentieth of all rows."""
    progress = start_progress(tmp_path)
    progress.add_result(shard_result(0, 8192, damaged=4096))
    progress.check_error_rate(0.1)
    end_reading(progress, 10, read_summary(8192 * 10, cut=100))
    progress.check_error_rate(0.1)


def test_a_corpus_is_stopped_as_soon_as_the_error_rate_is_certain(tmp_path: Path) -> None:
    progress = start_progress(tmp_path)
    progress.add_result(shard_result(0, 1000, damaged=800))
    end_reading(progress, 20, read_summary(MIN_ROWS_TO_STOP, cut=150))
    progress.check_error_rate(0.1)
    progress.add_result(shard_result(1, 1000, damaged=200))
    with pytest.raises(UserError, match=r"made: at least 1150 of 10155 rows.*11\.3%") as error:
        progress.check_error_rate(0.1)
    assert "1000 × damaged; 150 × cut" in str(error.value)
    assert "--max_error_rate" not in str(error.value)


def test_a_large_corpus_with_mostly_bad_rows_is_not_read_to_its_end(tmp_path: Path) -> None:
    progress = start_progress(tmp_path)
    progress.add_result(shard_result(0, MIN_ROWS_TO_STOP // 2, damaged=MIN_ROWS_TO_STOP // 2))
    progress.check_error_rate(0.1)
    progress.add_result(shard_result(1, MIN_ROWS_TO_STOP // 2, damaged=1))
    with pytest.raises(UserError, match=r"5001 of the first 10000 rows.*50\.0%.*fix the files"):
        progress.check_error_rate(0.1)
    progress.check_error_rate(0.6)


def test_a_small_corpus_is_read_completely_before_it_is_stopped(tmp_path: Path) -> None:
    progress = start_progress(tmp_path)
    end_reading(progress, 2, read_summary(90, cut=20))
    progress.add_result(shard_result(0, 50, damaged=5))
    progress.check_error_rate(0.1)
    progress.add_result(shard_result(1, 40))
    message = r"made: 25 of 115 rows.*21\.7%.*--max_error_rate 0\.22"
    with pytest.raises(UserError, match=message) as error:
        progress.check_error_rate(0.1)
    assert "20 × cut; 5 × damaged" in str(error.value)


def test_a_message_about_mostly_bad_rows_does_not_advise_a_higher_limit(tmp_path: Path) -> None:
    progress = start_progress(tmp_path)
    progress.add_result({"summary": read_summary(0, cut=95), "units": 0})
    with pytest.raises(UserError, match=r"95 of 100 rows.*95 × cut.*fix the files") as error:
        progress.check_error_rate(0.1)
    assert "--max_error_rate" not in str(error.value)


def test_the_read_summary_of_an_earlier_run_is_ignored(tmp_path: Path) -> None:
    staging = tmp_path / ".made.partial"
    staging.mkdir()
    text = '{"summary": {"errors": {"cut": 9}}, "units": 0}'
    (staging / READ_SUMMARY).write_text(text, encoding="utf-8")
    start_progress(tmp_path).check_error_rate(0.1)


def test_a_corpus_without_a_row_to_train_on_is_not_published(tmp_path: Path) -> None:
    progress = start_progress(tmp_path)
    (progress.job.staging_dir / REJECTED_ROWS).touch()
    progress.add_result({"summary": {"rejections": {}}, "units": 0})
    assert progress.is_complete()
    with pytest.raises(UserError, match="made: no row is left to train on"):
        progress.finish()
    assert not (tmp_path / "made").exists()
