"""Arrow batches and Parquet files with values that cannot be read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.corpora.formats.encoding import BadRecord
from pipelines.data.corpora.formats.record_reader import iter_batch_rows, read_records
from pipelines.data.io.directory import SourceDirectory

NOT_UTF8 = BadRecord("not UTF-8")


def strings(*values: bytes) -> pa.Array:
    """Return a text column that holds any bytes."""
    return pa.array(values, pa.binary()).view(pa.string())


def test_a_text_that_is_not_utf8_costs_only_its_row(tmp_path: Path) -> None:
    texts = [str(n).encode() for n in range(600)]
    for bad in (3, 300, 599):
        texts[bad] = b"\xff\xfe"
    pq.write_table(pa.table({"text": strings(*texts)}), tmp_path / "rows.parquet")
    found = list(read_records(SourceDirectory(str(tmp_path)), "rows.parquet"))
    assert [number for number, _ in found] == list(range(1, 601))
    for number, row in found:
        bad = number - 1 in (3, 300, 599)
        assert row == (NOT_UTF8 if bad else {"text": str(number - 1)})


@pytest.mark.parametrize(
    "column", [pa.array([0, 2**62, 1], pa.timestamp("us")), pa.array([0, 2**30, 1], pa.date32())]
)
def test_a_date_beyond_the_calendar_costs_only_its_row(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c"], "t": column}), tmp_path / "rows.parquet")
    (_, first), (number, second), (_, third) = read_records(
        SourceDirectory(str(tmp_path)), "rows.parquet"
    )
    assert isinstance(first, dict)
    assert isinstance(third, dict)
    assert (first["text"], third["text"]) == ("a", "c")
    assert (number, second) == (2, BadRecord("a date or time that cannot be read"))


def batch_with(offsets: list[int]) -> pa.RecordBatch:
    """Return texts of two letters with any offsets, as in a malicious file."""
    data = pa.record_batch({"t": ["ab"] * (len(offsets) - 1)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.schema) as out:
        out.write_batch(data)
    right = np.arange(0, 2 * len(offsets), 2, dtype=np.int32).tobytes()
    made = sink.getvalue().to_pybytes()
    assert made.count(right) == 1
    wrong = np.array(offsets, np.int32).tobytes()
    return pa.ipc.open_stream(made.replace(right, wrong)).read_next_batch()


def test_an_invalid_offset_costs_its_rows() -> None:
    found = list(iter_batch_rows(batch_with([0, 2, 2**30, 6, 8])))
    assert found[0] == {"t": "ab"}
    assert found[3] == {"t": "ab"}
    assert found[1:3] == [BadRecord("a damaged value")] * 2


def test_an_inconsistent_batch_has_no_rows() -> None:
    with pytest.raises(pa.ArrowInvalid):
        list(iter_batch_rows(batch_with([0, 2, 4, 6, 2**30])))
