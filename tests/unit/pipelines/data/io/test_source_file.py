"""A store or disk that fails inside a file is not reported as damage of the file."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpora import detect_reader, open_external_corpus
from pipelines.data.corpora.base import SourceArchives
from pipelines.data.corpora.formats.record_reader import BadRecord, read_records
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.media import MediaRef, read_media
from pipelines.data.io.source_file import SourceReadError, open_stream
from pipelines.data.preprocessing.blocks import ReadSummary, read_blocks
from pipelines.data.preprocessing.jobs import STORE_UNAVAILABLE, CorpusJob, read_units
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.retry import StoreUnavailableError
from tests.helpers import user_corpora
from tests.helpers.archive_files import tarred
from tests.helpers.corpus_rows import read, sizes
from tests.helpers.flaky_store import reads_fail

ROWS = [{"text": f"第{n}条新闻，其余是{'很长的话' * 40}", "label": str(n % 3)} for n in range(60)]


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet() -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), target, row_group_size=7)
    return target.getvalue()


def csv() -> bytes:
    return ("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in ROWS)).encode()


FILES: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: lines(ROWS),
    "rows.jsonl.gz": lambda: gzip.compress(lines(ROWS), 1),
    "rows.json": lambda: json.dumps(ROWS).encode(),
    "rows.csv": csv,
    "rows.csv.gz": lambda: gzip.compress(csv(), 1),
    "rows.parquet": parquet,
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "3")


def put(name: str, data: bytes) -> SourceDirectory:
    fsspec.filesystem("memory").pipe({f"/source-files/{name}": data})
    return SourceDirectory(f"memory://source-files/{name}")


@pytest.mark.parametrize("name", FILES)
def test_reading_records_resumes_after_an_outage(name: str) -> None:
    place = put(name, FILES[name]())
    with reads_fail(2, place=900) as faults:
        found = [record for _, record in read_records(place, "")]
    assert faults["left"] == 0
    assert found == ROWS


@pytest.mark.parametrize("name", FILES)
def test_long_outage_is_not_a_bad_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "0.1")
    place = put(name, FILES[name]())
    with (
        reads_fail(10**6, place=900),
        pytest.raises(StoreUnavailableError, match=f"{name}: the store"),
    ):
        list(read_records(place, ""))


@pytest.mark.parametrize("packed", [False, True])
def test_reading_tars_resumes_after_an_outage(tmp_path, packed, monkeypatch):
    name = "all.tar.gz" if packed else "train-000000.tar"
    folder = user_corpora.webdataset(tmp_path)
    data = (folder / "train-000000.tar").read_bytes()
    place = put(name, gzip.compress(data, 1) if packed else data)
    corpus = open_external_corpus("mine", f"webdataset:{place.uri}")
    with reads_fail(2, place=4000) as faults:
        rows, reasons = read(corpus)
    assert faults["left"] == 0
    assert not reasons
    assert sum(sizes(rows).values()) == 12
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "0.1")
    with reads_fail(10**6, place=4000), pytest.raises(StoreUnavailableError):
        read(corpus)


def test_speaker_archive_waits_for_its_store(tmp_path, monkeypatch):
    folder = user_corpora.aishell1(tmp_path)
    fsspec.filesystem("memory").put(str(folder), "/source-files/aishell", recursive=True)
    corpus = open_external_corpus("aishell1", "memory://source-files/aishell")
    with reads_fail(2, place=10, name=".tar.gz") as faults:
        rows, _ = read(corpus)
    assert (faults["left"], len(rows["train"])) == (0, 15)
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "0.1")
    with reads_fail(10**6, place=10, name=".tar.gz"), pytest.raises(StoreUnavailableError):
        read(corpus)


def test_unavailable_store_is_reported_to_the_driver(tmp_path, monkeypatch):
    """The error is a unit of work, because Ray would wrap the exception."""
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "0.1")
    corpus = open_external_corpus("mine", f"folder:{put('rows.jsonl', lines(ROWS)).uri}")
    with reads_fail(10**6, place=900):
        *_, last = read_units(
            0, CorpusJob(corpus, SourceArchives.none(), tmp_path, staging_dir=tmp_path)
        )
    assert last["shard"][0].as_py() == STORE_UNAVAILABLE
    assert "rows.jsonl: the store did not answer" in last["raw"][0].as_py().decode()


def test_file_that_is_replaced_while_read_is_reported() -> None:
    place = put("rows.jsonl", lines(ROWS))
    with reads_fail(1, place=900), open_stream(place.uri) as stream:
        put("rows.jsonl", lines(ROWS[:30]))
        with pytest.raises(SourceReadError, match="replaced while it was read"):
            stream.read()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.jsonl.gz", "train.tar", "a.tar.gz"])
def test_disk_failure_names_the_file(tmp_path: Path, name: str) -> None:
    """Reading address 0 of a process gives EIO, as a broken disk or mount does."""
    (tmp_path / name).symlink_to("/proc/self/mem")
    reader = "webdataset" if "tar" in name else "folder"
    message = rf"{name}: cannot be read \(I.*\)\. .*no row was rejected"
    with pytest.raises(UserError, match=message):
        open_external_corpus(reader, str(tmp_path))
    if reader == "webdataset":
        with pytest.raises(UserError, match=message):
            detect_reader(SourceDirectory(str(tmp_path)))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".gz", ".json"))])
def test_damaged_file_is_still_reported_as_damaged(name: str) -> None:
    whole = FILES[name]()
    place = put(name, whole[: len(whole) // 2])
    *good, last = [record for _, record in read_records(place, "")]
    assert good == ROWS[: len(good)]
    assert isinstance(last, BadRecord)
    assert last.truncates_file


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_last_line_without_an_end_is_truncated(tmp_path: Path, name: str) -> None:
    """A bad line with an end does not concern the rest; a truncated download has no line end."""
    every = FILES[name]().splitlines(keepends=True)
    before = 9 + name.endswith(".csv")
    cut = b"".join(every[:before]) + every[before][:10]
    for ending, rest in ((b"", True), (b"\n", False)):
        (tmp_path / name).write_bytes(cut + ending)
        found = [record for _, record in read_records(SourceDirectory(str(tmp_path / name)), "")]
        assert found[:-1] == ROWS[:9]
        assert isinstance(found[-1], BadRecord)
        assert found[-1].truncates_file == rest


def summary(place: str, folder: Path, reader: str = "folder") -> ReadSummary:
    corpus = open_external_corpus("mine", f"{reader}:{place}")
    *_, last = read_blocks(corpus, SourceArchives.none(), folder / "rejected.jsonl")
    assert isinstance(last, ReadSummary)
    return last


def test_truncated_file_counts_as_one_file(tmp_path: Path) -> None:
    """A JSON array cut after a sixth is one bad row of eleven; counted by rows it would pass."""
    whole = FILES["rows.json"]()
    (tmp_path / "rows.json").write_bytes(whole[: len(whole) // 6])
    found = summary(str(tmp_path / "rows.json"), tmp_path)
    assert found.errors == {"JSON damaged from here on (cut short)": 1}
    good = found.rows - 1
    assert found.truncated_files == {
        "rows.json": f"after {good} rows (JSON damaged from here on (cut short))"
    }
    reported = found.truncation_error(0.1)
    assert reported.startswith(
        "1 of 1 files are truncated, and the rows after that point are lost: rows.json after"
    )
    assert "--max_error_rate 1.00" in reported
    assert not found.truncation_error(1.0)


def test_one_truncated_tar_of_many_is_allowed(tmp_path: Path) -> None:
    files = {f"{n}.txt": b"word" for n in range(20)} | {f"{n}.cls": b"1" for n in range(20)}
    for number in range(12):
        (tmp_path / f"train-{number}.tar.gz").write_bytes(tarred(dict(sorted(files.items()))))
    cut = tmp_path / "train-3.tar.gz"
    cut.write_bytes(cut.read_bytes()[:150])
    found = summary(str(tmp_path), tmp_path, "webdataset")
    assert list(found.truncated_files) == ["train-3.tar.gz"]
    assert found.num_files == 12
    assert not found.truncation_error(0.1)
    assert found.truncation_error(0.08)


def test_unavailable_bucket_gives_one_message(object_store, monkeypatch):
    """Finding, listing and reading retry and then give one message for any client error."""
    directories.write_bytes(f"{object_store.uri}/away/rows.jsonl", lines(ROWS))
    place = SourceDirectory(f"{object_store.uri}/away")
    reference = MediaRef(f"{object_store.uri}/away/rows.jsonl").row()
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "1")
    object_store.door.shut()
    try:
        for action in (
            lambda: SourceDirectory(f"{object_store.uri}/away"),
            lambda: place.entries("other"),
            lambda: list(read_records(place, "rows.jsonl")),
            lambda: list(read_media([reference])),
        ):
            with pytest.raises(StoreUnavailableError, match=r"away.* did not answer for 1 s"):
                action()
    finally:
        object_store.door.unshut()
    assert [record for _, record in read_records(place, "rows.jsonl")] == ROWS
