"""JPEG columns read like raw ones, with nearly equal values and a fraction of the bytes."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.preprocessing.blocks import rows_to_table
from pipelines.data.preprocessing.jobs import transform_block
from pipelines.data.shards.columns import FixedColumn, JpegColumn, open_column
from pipelines.data.shards.jpeg import decode_jpegs, encode_jpeg, jpeg_field, uses_jpeg
from skillnet_corpora.demo.strokes import draw_pen_paths
from skillnet_corpora.readers.folder import FolderCorpus
from skillnet_platform.errors import UserError
from tests.helpers.video_files import encode_video
from tests.unit.pipelines.data.transforms.test_transforms import PATHS

PICTURE, CLIP, COLOUR_CLIP = (224, 224, 3), (8, 96, 96, 1), (8, 112, 112, 3)


def smooth(shape: tuple[int, ...], number: int) -> np.ndarray:
    """Return a smooth row that JPEG preserves well."""
    y, x = np.mgrid[: shape[-3], : shape[-2]]
    wave = 127 + 120 * np.sin((x + 2 * y) / (20 + number))
    return np.broadcast_to(wave[..., None], shape).astype(np.uint8)


@pytest.mark.parametrize("shape", [PICTURE, CLIP, COLOUR_CLIP])
def test_decoded_rows_are_nearly_equal(shape: tuple[int, ...]) -> None:
    rows = [smooth(shape, number) for number in range(5)]
    cells = [encode_jpeg(row) for row in rows]
    back = decode_jpegs(cells, shape)
    assert back.shape == (5, *shape)
    assert np.abs(back.astype(int) - np.stack(rows)).mean() < 2
    assert sum(map(len, cells)) < 0.2 * sum(row.nbytes for row in rows)
    assert cells == [encode_jpeg(row) for row in rows]


def test_storage_depends_on_size_unless_it_is_set() -> None:
    assert not uses_jpeg((48, 48, 3), "auto")
    assert uses_jpeg(PICTURE, "auto")
    assert uses_jpeg((48, 48, 3), "encoded")
    assert not uses_jpeg(PICTURE, "raw")
    assert not uses_jpeg((400, 224, 224, 1), "auto")  # too high a strip
    with pytest.raises(ValueError, match="higher than 65535"):
        uses_jpeg((400, 224, 224, 1), "encoded")


def column(rows: int = 6, chunks: int = 2) -> tuple[pa.Table, np.ndarray]:
    """Return a JPEG column in several chunks, and its decoded rows."""
    cells = [encode_jpeg(smooth(PICTURE, number)) for number in range(rows)]
    schema = pa.schema([jpeg_field("pixels", PICTURE)])
    parts = [pa.table([cells[i::chunks]], schema=schema) for i in range(chunks)]
    order = [number for i in range(chunks) for number in range(rows)[i::chunks]]
    return pa.concat_tables(parts), decode_jpegs(cells, PICTURE)[order]


def test_a_column_is_read_in_any_order_across_shards() -> None:
    table, want = column()
    opened = open_column(table, "pixels", "made/train")
    assert isinstance(opened, JpegColumn)
    assert isinstance(opened, FixedColumn)  # what reads raw pixels reads these too
    assert len(opened) == 6
    rows = np.array([5, 0, 3, 3])
    assert np.array_equal(opened.take(rows), want[rows])
    assert opened.take(np.zeros(0, np.int64)).shape == (0, *PICTURE)
    single = open_column(table.slice(0, 3).combine_chunks(), "pixels", "made/train")
    assert np.array_equal(single.take(np.array([2, 1])), want[[2, 1]])


def test_cell_of_another_shape_is_reported() -> None:
    schema = pa.schema([jpeg_field("pixels", PICTURE)])
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "JPEG")
    table = pa.table([[b"no picture", small.getvalue()]], schema=schema)
    opened = open_column(table, "pixels", "made/train")
    with pytest.raises(UserError, match="made/train: column 'pixels': a row is not a JPEG"):
        opened.take(np.array([0]))
    with pytest.raises(UserError, match=r"RGB pixels, 8 x 8.*\(224, 224, 3\)"):
        opened.take(np.array([1]))


@pytest.mark.parametrize("kind", ["image", "video", "colour video"])
def test_folder_is_prepared_as_jpeg_without_its_bad_rows(tmp_path: Path, kind: str) -> None:
    ending = "jpg" if kind == "image" else "mp4"
    good = io.BytesIO()
    if kind == "image":
        Image.fromarray(smooth((300, 400, 3), 3)).save(good, "JPEG", quality=95)
    else:
        white = draw_pen_paths(PATHS, 8, 64)
        good.write(encode_video(white // np.array([1, 2, 4], np.uint8)))
    lines = []
    for number, data in enumerate([good.getvalue(), b"rubbish", good.getvalue()]):
        (tmp_path / f"{number}.{ending}").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{number}.{ending}", "caption": f"第{number}个"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    size = {"size": 224} if kind == "image" else {"video_size": 96}
    size |= {"video_channels": 3} if kind == "colour video" else {}
    corpora = {}
    for storage in ("encoded", "raw"):
        corpus = FolderCorpus(str(tmp_path), FolderCorpus.Options(storage=storage, **size))
        rows = [r for r in corpus.rows(SourceArchives.none()) if not isinstance(r, RejectedRow)]
        corpus.annotations_present = ()  # the pixels alone: no tokenizer is at hand
        corpus.finalize_schema()
        made = transform_block(corpus, None, rows_to_table(corpus, rows)[0])
        name = "pixels" if kind == "image" else "frames"
        schema = pa.schema([corpus.schema("train").field(name)])
        kept = made.filter(pa.compute.is_null(made["rejected"])).select([name]).cast(schema)
        assert [bool(reason) for reason in made["rejected"].to_pylist()] == [False, True, False]
        corpora[storage] = open_column(kept, name, "made").take(np.arange(2)), kept.nbytes
        assert corpus.preprocessing().items() >= size.items()
    (encoded, small), (raw, large) = corpora["encoded"], corpora["raw"]
    assert encoded.shape == raw.shape
    if kind == "colour video":
        red, _, blue = (int(raw[..., channel].max()) for channel in range(3))
        assert raw.shape == (2, 8, 96, 96, 3)
        assert red > 2.5 * blue
    assert np.abs(encoded.astype(int) - raw).mean() < 3
    assert small < large / 3
