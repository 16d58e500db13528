"""Saved Hugging Face datasets, on a disk and in a store.

Untrusted Hugging Face datasets: odd metadata is reported, and damage costs only its rows.

No byte of an Arrow file ends the process.
"""

import json
import random
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pytest
from hypothesis import settings

from pipelines.data.corpora import detect_reader, open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.io.directory import SourceDirectory
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from tests.helpers import user_corpora
from tests.helpers.corpus_rows import media, read, sizes
from tests.helpers.object_store import ObjectStore
from tests.helpers.processes import run_python


def test_media_bytes_are_read_in_place(tmp_path: Path, object_store: ObjectStore) -> None:
    texts = [f"图{n}" for n in range(12)]
    pictures = [{"bytes": user_corpora.jpg(n, (40 + n, 40)), "path": None} for n in range(12)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    whole = datasets.Dataset.from_dict({"image": pictures, "caption": texts}, features)
    parts = datasets.DatasetDict({"train": whole, "test": whole.select(range(3, 7))})
    parts.save_to_disk(str(tmp_path / "saved"))
    found = detect_reader(SourceDirectory(str(tmp_path / "saved")))
    assert found[0] == "hf_dataset"
    corpus = open_external_corpus(
        "pictures", f"hf_dataset:{tmp_path / 'saved'}", {"validation": 0.0}
    )
    assert (corpus.modality, corpus.task) == ("image", "text_to_image")
    rows, reasons = read(corpus)
    assert not reasons
    assert sizes(rows) == {"test": 4, "train": 12}
    assert [media(row) for row in rows["train"]] == [p["bytes"] for p in pictures]
    assert media(rows["test"][0]) == pictures[3]["bytes"]
    assert [row["row"] for row in rows["test"]] == [1, 2, 3, 4]
    place = f"{object_store.uri}/saved"
    for path in (tmp_path / "saved").rglob("*.*"):
        name = path.relative_to(tmp_path / "saved").as_posix()
        directories.write_bytes(f"{place}/{name}", path.read_bytes())
    there = open_external_corpus("pictures", f"hf_dataset:{place}", {"validation": 0.0})
    assert there.can_run_remotely()
    far, far_reasons = read(there)
    assert not far_reasons
    assert [media(row) for row in far["train"]] == [p["bytes"] for p in pictures]
    assert media(far["test"][0]) == pictures[3]["bytes"]
    keys = [[row["key"] for row in found["train"]] for found in (rows, far)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("is_far", [False, True])
def test_a_truncated_file_loses_only_its_end(tmp_path: Path, is_far: bool) -> None:
    rows = {"text": [f"第{n}条" for n in range(3000)], "label": [n % 2 for n in range(3000)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    place = in_store(tmp_path / "saved") if is_far else str(tmp_path / "saved")
    found, reasons = read(open_external_corpus("mine", f"hf_dataset:{place}"))
    assert sum(map(len, found.values())) in (1000, 2000)
    assert reasons == {"an Arrow file that is cut short or damaged": 1}


@pytest.mark.parametrize("is_far", [False, True])
def test_a_missing_file_is_named(tmp_path: Path, is_far: bool) -> None:
    rows = {"text": [f"第{n}条" for n in range(40)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"), num_shards=20)
    (tmp_path / "saved" / "data-00007-of-00020.arrow").unlink()
    place = in_store(tmp_path / "saved") if is_far else str(tmp_path / "saved")
    with pytest.raises(UserError, match=r"data-00007-of-00020\.arrow: state\.json lists it"):
        open_external_corpus("mine", f"hf_dataset:{place}")


VALUE = {"dtype": "string", "_type": "Value"}
TEXTS = {"text": VALUE, "label": VALUE}
PICTURES = {"image": {"_type": "Image"}, "caption": VALUE}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ODD: dict[str, list[Any]] = {
    "state.json": [
        "[]",
        "{}",
        "[" * 100_000,
        '{"_data_files": "abc"}',
        '{"_data_files": [{}]}',
        '{"_data_files": [{"filename": 5}]}',
        '{"_data_files": [{"filename": "../x/data.arrow"}]}',
        '{"_data_files": [{"filename": "/etc/passwd"}]}',
    ],
    "dataset_info.json": [
        "5",
        '{"features": [{"name": "text"}]}',
        '{"features": {"label": {"_type": "ClassLabel", "names": [1, 2]}, "text": {}}}',
    ],
    "dataset_dict.json": ["[]", '{"splits": 5}', '{"splits": [5]}', '{"splits": ["../x"]}'],
}


def save(
    folder: Path,
    table: pa.Table,
    features: dict[str, Any],
    options: pa.ipc.IpcWriteOptions | None = None,
) -> Path:
    """Write a dataset like ``save_to_disk``, in batches of 20 rows; return the Arrow file."""
    folder.mkdir(exist_ok=True)
    file = folder / "data.arrow"
    with pa.ipc.new_stream(str(file), table.schema, options=options) as out:
        out.write_table(table, 20)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file.name}]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return file


def texts() -> pa.Table:
    return pa.table({"text": [f"第{n}条" for n in range(60)], "label": ["a", "b"] * 30})


def pictures(kind: pa.DataType, values: list[Any]) -> pa.Table:
    made = pa.StructArray.from_arrays(
        [pa.array(values, kind), pa.nulls(len(values), pa.string())], ["bytes", "path"]
    )
    return pa.table({"image": made, "caption": [f"图{n}" for n in range(len(values))]})


@pytest.mark.fuzz
@pytest.mark.parametrize(("name", "text"), [(n, text) for n, each in ODD.items() for text in each])
def test_odd_metadata_are_a_user_error(tmp_path: Path, name: str, text: str) -> None:
    save(tmp_path / "saved", texts(), TEXTS)
    save(tmp_path / "x", texts(), TEXTS)
    if name == "dataset_dict.json":
        (tmp_path / "saved" / "state.json").unlink()
    (tmp_path / "saved" / name).write_text(text)
    with pytest.raises(UserError, match=name):
        open_external_corpus("mine", f"hf_dataset:{tmp_path / 'saved'}").scan_labels()


@pytest.mark.fuzz
def test_the_description_of_a_column_can_be_anything(tmp_path: Path) -> None:
    save(tmp_path / "saved", texts(), {"text": 5, "label": {"_type": []}})
    rows, reasons = read(open_external_corpus("mine", f"hf_dataset:{tmp_path / 'saved'}"))
    assert not reasons
    assert sum(map(len, rows.values())) == 60


@pytest.mark.fuzz
def test_a_text_that_is_not_utf8_costs_only_its_row(tmp_path: Path) -> None:
    file = save(tmp_path / "saved", texts(), TEXTS)
    data = file.read_bytes()
    word = "第7条".encode()
    assert data.count(word) == 1
    file.write_bytes(data.replace(word, b"\xff" * len(word)))
    for place in (tmp_path / "saved", in_store(tmp_path / "saved")):
        corpus = open_external_corpus("mine", f"hf_dataset:{place}")
        found = list(corpus.rows(SourceArchives.none()))
        assert len(found) == 60
        (bad,) = [row for row in found if isinstance(row, RejectedRow)]
        assert (bad.row, bad.reason, bad.truncates_file) == (8, "not UTF-8", False)


def in_store(folder: Path) -> str:
    """Return the URI of a copy in a store that no other test uses."""
    place = f"/hostile-saved{folder}"
    system = fsspec.filesystem("memory")
    for file in folder.iterdir():
        system.pipe(f"{place}/{file.name}", file.read_bytes())
    return f"memory:/{place}"


@pytest.mark.fuzz
def test_an_empty_arrow_file_is_damaged(tmp_path: Path) -> None:
    save(tmp_path / "saved", texts(), TEXTS).write_bytes(b"")
    for place in (tmp_path / "saved", in_store(tmp_path / "saved")):
        with pytest.raises(UserError, match="Arrow file that is cut short or damaged"):
            open_external_corpus("mine", f"hf_dataset:{place}").scan_labels()


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string(), pa.large_string()])
def test_media_of_every_type_that_has_offsets(tmp_path: Path, kind: pa.DataType) -> None:
    values = [None if n == 3 else f"picture {n}" for n in range(30)]
    save(tmp_path / "saved", pictures(kind, values), PICTURES)
    rows, reasons = read(open_external_corpus("mine", f"hf_dataset:{tmp_path / 'saved'}"))
    found = {media(row) for each in rows.values() for row in each}
    assert found == {value.encode() for value in values if value}
    assert reasons == {"no media file": 1}


@pytest.mark.fuzz
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.list_(pa.uint8()), [1, 2]),
        (pa.binary(2), b"ab"),
        (pa.binary_view(), b"ab"),
        (pa.int64(), 1),
    ],
)
def test_media_of_another_type_are_reported(tmp_path: Path, kind: pa.DataType, value: Any) -> None:
    save(tmp_path / "saved", pictures(kind, [value] * 30), PICTURES)
    rows, reasons = read(open_external_corpus("mine", f"hf_dataset:{tmp_path / 'saved'}"))
    assert not rows
    ((reason, count),) = reasons.items()
    assert reason.startswith("media of an unsupported type; expected struct<bytes: binary")
    assert count == 1


@pytest.mark.fuzz
def test_media_outside_of_the_file_are_reported(tmp_path: Path) -> None:
    """The offsets of a compressed buffer refer to its decompressed bytes."""
    values = [bytes([n]) * 500 for n in range(30)]
    packed = pa.ipc.IpcWriteOptions(compression="lz4")
    save(tmp_path / "saved", pictures(pa.binary(), values), PICTURES, packed)
    rows, reasons = read(open_external_corpus("mine", f"hf_dataset:{tmp_path / 'saved'}"))
    assert not rows
    assert reasons == {"media outside of their Arrow file": 30}


#: Reads damaged copies of an Arrow file like ``skillnet prepare``; exit code 3 is an escaped error.
READ = """
import sys
from pathlib import Path
from pipelines.data.preprocessing.blocks import read_blocks
from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.base import SourceArchives
from skillnet_platform.cli import user_error_message
for copy in sorted(Path(sys.argv[1]).glob("*/copy-*")):
    folder = copy.parent
    copy.replace(folder / "data.arrow")
    print(copy, flush=True)
    try:
        corpus = open_external_corpus("mine", f"hf_dataset:{folder}")
        corpus.scan_labels()
        for _ in read_blocks(corpus, SourceArchives.none(), folder / "rejected"):
            pass
    except Exception as error:
        if not user_error_message(error):
            print(type(error).__name__, error)
            sys.exit(3)
"""


#: As many as examples of a property: 40, and 200 with the profile "long".
COPIES = settings().max_examples


@pytest.mark.fuzz
def test_no_damage_ends_the_process(tmp_path: Path) -> None:
    """Run in a separate process, because the test looks for crashes."""
    kinds = pa.array(["x", "y"] * 30).dictionary_encode()
    more = texts().append_column("kind", kinds).append_column("n", pa.array([[1, 2]] * 60))
    saved = {"texts": (more, TEXTS), "pictures": (pictures(pa.binary(), [b"abc"] * 60), PICTURES)}
    draw = random.Random(0)  # noqa: S311
    for name, (table, features) in saved.items():
        whole = save(tmp_path / name, table, features).read_bytes()
        for number in range(COPIES):
            data = bytearray(whole)
            for _ in range(draw.randrange(1, 4)):
                data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
            (tmp_path / name / f"copy-{number:03}").write_bytes(data)
    done = run_python("-c", READ, tmp_path)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-1000:]
    assert done.stdout.count("copy-") == 2 * COPIES
