"""The plan past one machine is computed from measured costs."""

from pathlib import Path

import pytest

from benchmarks import prepare_scaling
from benchmarks.measure import Result, write
from pipelines.data.shards.jpeg import uses_jpeg
from tests.helpers import user_corpora
from tools.docs import scale_table


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of CSVs with round costs: 10 ms a picture, 100 ms a recording of ten seconds."""
    costs = {"image": 0.01, "sound": 0.1, "video": 0.04, "code": 0.001}
    speed = [Result(f"prepare, {k}", "", "s/row", v, v, v) for k, v in costs.items()]
    speed.append(Result("prepare, image", "datasets.map", "times as fast", 9, 9, 9))
    write("prepare-speed", speed, 1, tmp_path)
    size = 20 * 1024.0
    write("reading", [Result("reading encoded pictures", "", "bytes/row", size, size, size)], 1,
          tmp_path)  # fmt: skip
    write("waiting", [Result("loader", "", "s/row", 0.001, 0.001, 0.001)], 1, tmp_path)
    names = ("AISHELL-1", "AIC-ICC", "VATEX", "tars")
    held = [Result(f"read, {name}", "", "bytes/row", 200, 200, 200) for name in names]
    kept = [Result(f"spool, {name}", "", "bytes/row on disk", 500, 500, 500) for name in names]
    write("reader-memory", held + kept, 1, tmp_path)
    return tmp_path


def test_hours_follow_from_the_cost_of_a_row(results: Path) -> None:
    text = scale_table.tables(results)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    # 210,000 x 10 ms / 80 % = 0.73 hours; 100 million of them are 347.
    assert "| 0.7 |" in rows["AIC-ICC"]
    assert "| 347.2 | 21.7 h | 1.4 h |" in rows["Wukong"]
    # 178 hours of speech at a hundredth of real time.
    assert "| 2.2 |" in rows["AISHELL-1"]
    # 100 KB every 10 ms, 80 % of the time, on each of 256 CPUs.
    assert "| 1.9 GiB/s |" in rows["Wukong"]
    assert "1.00 ms of a core" in text
    assert "needs 1.0 cores" in text
    assert "does not wait" in text


def test_every_assumption_is_printed(results: Path) -> None:
    text = scale_table.tables(results)
    assert all(plan.why in text for plan in scale_table.CORPORA)


def test_pictures_and_clips_are_a_range_and_reading_is_stated(results: Path) -> None:
    text = scale_table.tables(results)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    # Of 10 and 30 KB a row; 200 bytes are held and 500 spooled.
    assert rows["Wukong"].endswith("| 931.3 GiB to 2.7 TiB | 18.6 GiB | 46.6 GiB |")
    assert rows["AISHELL-1"].endswith("| 27.0 MiB | none |")
    assert rows["CodeSearchNet, Python"].endswith("| – | – |")


def test_a_clip_of_the_plan_is_stored_as_the_plan_says() -> None:
    assert uses_jpeg((8, 96, 96, 1), "auto")
    assert uses_jpeg((224, 224, 3), "auto")


def test_a_corpus_uses_no_more_cpus_than_its_reading_task_feeds(results: Path) -> None:
    assert "was not measured" in scale_table.tables(results)
    costs = {"aishell1": 1e-4, "aic_icc": 1e-4, "vatex": 1e-3, "codesearchnet": 1e-5,
             "webdataset": 1e-4}  # fmt: skip
    reads = [Result(f"reading rows, {name}", "", "s/row", v, v, v) for name, v in costs.items()]
    write("prepare-scaling", reads, 1, results)
    text = scale_table.tables(results)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()[::-1]}
    # 10 ms to prepare, 0.1 ms to read: a hundred CPUs, and 347 hours take 3.5 on 256 of them.
    assert "| 347.2 | 21.7 h | 3.5 h |" in rows["Wukong"]
    assert rows["Wukong"].endswith("| 100 |")
    assert "3 of Wukong" in text
    assert rows["VATEX"].endswith("| 250 |")
    assert "was not measured" not in text


def test_the_plan_knows_each_layout_that_is_measured() -> None:
    assert {plan.layout for plan in scale_table.CORPORA} <= set(prepare_scaling.LAYOUTS)


@pytest.mark.parametrize("name", prepare_scaling.LAYOUTS)
def test_a_layout_is_read_whole(tmp_path: Path, name: str) -> None:
    picture = tmp_path / "1.jpg"
    picture.write_bytes(user_corpora.jpg(1))
    write_layout, _ = prepare_scaling.LAYOUTS[name]
    write_layout(tmp_path / "corpus", 30, lambda path, _: path.hardlink_to(picture))
    assert prepare_scaling._read(name, tmp_path, 30) > 0


def test_without_measurements_there_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run python -m benchmarks prepare-speed"):
        scale_table.tables(tmp_path)
