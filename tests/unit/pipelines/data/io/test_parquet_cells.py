"""Media in columns of Parquet files: read by row, and unreadable ones state the reason."""

import io
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.io.media import MediaRef
from skillnet_platform.storage.retry import StoreUnavailableError
from tests.unit.pipelines.data.io.test_media import read

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(cells: list[bytes | None], nested: bool = True) -> bytes:
    """Return a Parquet file with a column of media, in row groups of seven rows."""
    values = [cell if cell is None or not nested else {"bytes": cell, "path": ""} for cell in cells]
    column = pa.array(values, STRUCT if nested else pa.large_binary())
    target = io.BytesIO()
    table = pa.table({"n": range(len(cells)), "image": column, "mask": column})
    pq.write_table(table, target, row_group_size=7)
    return target.getvalue()


def cell(path: object, row: int) -> MediaRef:
    return MediaRef(str(path), member="image", row_number=row)


@pytest.mark.parametrize("nested", [True, False])
def test_rows_are_read_in_any_order(tmp_path: Path, nested: bool) -> None:
    cells = [None, *(os.urandom(50) for _ in range(29))]
    (tmp_path / "a.parquet").write_bytes(parquet(cells, nested))
    order = [1, 2, 5, 6, 7, 3, 29, 28, 14, 4]
    found = read(*(cell(tmp_path / "a.parquet", row) for row in order))
    assert found == [cells[row] for row in order]
    assert read(cell(tmp_path / "a.parquet", 0)) == ["no media file"]


def test_unreadable_media_state_the_reason(tmp_path: Path) -> None:
    whole = parquet([b"", *(os.urandom(900) for _ in range(20))])
    (tmp_path / "whole").write_bytes(whole)
    (tmp_path / "cut").write_bytes(whole[:-9])
    damaged = bytearray(whole)
    damaged[100:6000] = bytes(5900)
    (tmp_path / "damaged").write_bytes(damaged)
    os.mkfifo(tmp_path / "pipe")
    names = ("cut", "damaged", "none", "pipe", "whole", "whole")
    found = read(
        *(cell(tmp_path / name, row) for row, name in enumerate(names, start=2)),
        cell(tmp_path / "whole", 99),
    )
    assert found[:3] == [
        "the Parquet file is damaged",
        "the Parquet file is damaged",
        "the Parquet file cannot be opened (No such file or directory)",
    ]
    assert "a pipe, device or socket" in str(found[3])
    assert [len(each) for each in found[4:6]] == [900, 900]
    assert found[6] == "the Parquet file is damaged"
    assert read(cell(tmp_path / "whole", 0)) == ["an empty file"]
    assert read(cell(tmp_path / "whole", 1), max_bytes=899) == [
        "a media file larger than 899 bytes"
    ]


def test_a_store_is_read_and_its_failure_rejects_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    cells: list[bytes | None] = [bytes([n]) * 9 for n in range(20)]
    fsspec.filesystem("memory").pipe({"/cells/a.parquet": parquet(cells), "/cells/b.parquet": b""})
    place = "memory://cells/a.parquet"
    assert read(*(cell(place, row) for row in (3, 11))) == [cells[3], cells[11]]

    def broken(self: object, path: str, *more: object, **others: object) -> bytes:
        raise TimeoutError("no answer")

    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "1")
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem._open", broken)
    with pytest.raises(StoreUnavailableError, match=r"b\.parquet: the store did not answer"):
        read(cell("memory://cells/b.parquet", 3))
