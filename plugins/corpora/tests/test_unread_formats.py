"""Files of formats that no reader reads are named with the remedy."""

from pathlib import Path

import pytest

from pipelines.data.preprocessing.inspection import inspect_corpus
from skillnet_platform.errors import UserError
from tests.helpers.golden_layouts import write_files

#: Name of a file -> parts of the message.
FILES = {
    "train.xlsx": r"train\.xlsx.*Excel.*save it as CSV",
    "Train.XLS": r"Train\.XLS.*Excel.*save it as CSV",
    "sheet.ods": "save it as CSV",
    "rows.sqlite3": r"SQLite.*-csv",
    "rows.db": "SQLite",
    "train.tfrecord": r"TFRecord.*Parquet",
    "train.tfrecord-00000-of-00001": r"TFRecord.*Parquet",
    "data.mdb": r"LMDB.*Parquet",
    "rows.pkl": r"pickle.*run code.*Parquet",
    "model.pt": r"pickle.*run code",
    "train.npz": r"NumPy.*Parquet",
    "train.h5": r"HDF5.*Parquet",
    "rows.feather": r"Feather.*Parquet",
    "rows.arrow": r"Arrow.*Parquet",
    "rows.orc": "ORC",
    "rows.avro": "Avro",
    "train.rec": "RecordIO",
    "rows.jsonl.zst": r"Zstandard.*unzstd",
    "train-images-idx3-ubyte": "IDX",
    "train-images-idx3-ubyte.gz": "IDX",
    "rows.sav": "SPSS",
    "rows.rds": "R data",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_an_unread_format_is_named(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, {f"alone/{name}": "PK", f"below/data/{name}": "\0\1"})
    for place in ("alone", f"alone/{name}", "below"):
        for reader in ("", "folder:"):
            with pytest.raises(UserError, match=FILES[name]) as caught:
                inspect_corpus(f"{reader}{tmp_path}/{place}")
            assert "neither a metadata" not in str(caught.value)
            assert "no readable row" not in str(caught.value)
