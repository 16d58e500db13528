"""When a corpus in the making is stopped for its bad rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.preprocessing.datasource import Order
from pipelines.preprocessing.progress import WORTH_STOPPING, Making
from pipelines.preprocessing.staging import READ, REJECTED_ROWS
from skillnet_platform.errors import UserError
from tests.helpers.synthetic_corpora import Made


def making(folder: Path) -> Making:
    partial = folder / ".made.partial"
    partial.mkdir()
    return Making(Order(Made(), folder / "made", {}), partial, {})


def shard(number: int, rows: int, **bad: int) -> dict[str, Any]:
    return {"stem": f"train-{number:05d}", "entry": None, "rows": rows, "bad": bad}


def read(rows: int, **bad: int) -> dict[str, Any]:
    return {"counts": {"train": rows}, "reasons": {"by choice": 5} | bad, "bad": bad}


def is_over(state: Making, units: int, summary: dict[str, Any]) -> None:
    told = {"summary": summary, "units": units}
    (state.folder / READ).write_text(json.dumps(told), encoding="utf-8")


def test_bad_rows_at_the_head_of_a_corpus_do_not_stop_it(tmp_path: Path) -> None:
    """Half of what is done is bad; of all rows it is a twentieth."""
    state = making(tmp_path)
    state.count(shard(0, 8192, damaged=4096))
    state.judge(0.1)
    is_over(state, 10, read(8192 * 10, cut=100))
    state.judge(0.1)


def test_it_is_stopped_as_soon_as_the_share_is_certain(tmp_path: Path) -> None:
    state = making(tmp_path)
    state.count(shard(0, 1000, damaged=800))
    is_over(state, 20, read(WORTH_STOPPING, cut=150))
    state.judge(0.1)
    state.count(shard(1, 1000, damaged=200))
    with pytest.raises(UserError, match=r"made: at least 1150 of 10155 rows.*11\.3%") as told:
        state.judge(0.1)
    assert "1000 × damaged; 150 × cut" in str(told.value)
    assert "--max_bad" not in str(told.value)


def test_a_large_corpus_most_of_which_is_bad_is_not_read_to_its_end(tmp_path: Path) -> None:
    state = making(tmp_path)
    state.count(shard(0, WORTH_STOPPING // 2, damaged=WORTH_STOPPING // 2))
    state.judge(0.1)
    state.count(shard(1, WORTH_STOPPING // 2, damaged=1))
    with pytest.raises(UserError, match=r"5001 of the first 10000 rows.*50\.0%.*mend the files"):
        state.judge(0.1)
    state.judge(0.6)


def test_a_small_corpus_is_looked_at_whole(tmp_path: Path) -> None:
    state = making(tmp_path)
    is_over(state, 2, read(90, cut=20))
    state.count(shard(0, 50, damaged=5))
    state.judge(0.1)
    state.count(shard(1, 40))
    with pytest.raises(UserError, match=r"made: 25 of 115 rows.*21\.7%.*--max_bad 0\.22") as told:
        state.judge(0.1)
    assert "20 × cut; 5 × damaged" in str(told.value)


def test_nobody_is_told_to_go_on_without_most_of_a_corpus(tmp_path: Path) -> None:
    state = making(tmp_path)
    state.count({"summary": read(0, cut=95), "units": 0})
    with pytest.raises(UserError, match=r"95 of 100 rows.*95 × cut.*mend the files") as told:
        state.judge(0.1)
    assert "--max_bad" not in str(told.value)


def test_what_an_earlier_run_read_is_not_taken_for_this_one(tmp_path: Path) -> None:
    partial = tmp_path / ".made.partial"
    partial.mkdir()
    (partial / READ).write_text('{"summary": {"bad": {"cut": 9}}, "units": 0}', encoding="utf-8")
    Making(Order(Made(), tmp_path / "made", {}), partial, {}).judge(0.1)


def test_a_corpus_without_a_row_to_train_on_is_not_put_in_place(tmp_path: Path) -> None:
    state = making(tmp_path)
    (state.folder / REJECTED_ROWS).touch()
    state.count({"summary": {"reasons": {}}, "units": 0})
    assert state.is_complete()
    with pytest.raises(UserError, match="made: no row is left to train on"):
        state.finish()
    assert not (tmp_path / "made").exists()
