"""Speed of reading shuffled batches of encoded images, compared with datasets, WebDataset and
MosaicML streaming: the same JPEG bytes in the format of each library, on a local disk.

A batch is 64 pictures of 224 x 224 as one uint8 tensor and their labels. Each contender shuffles
as it is meant to: rows in any order (ours, datasets), or a buffer of the whole corpus (the others).
A contender that is not installed is left out.
"""

import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from benchmarks.measure import Maker, Result, Took, ratio, rounds_of, side, spread
from benchmarks.media_corpus import PICTURE, decode, files
from pipelines.data.shards.columns import FixedColumn, open_column
from pipelines.data.shards.format import write_shard
from pipelines.data.shards.jpeg import encode_jpeg, jpeg_field
from skillnet.keyed_random import keyed_rng
from skillnet_platform import console

PICTURES, TIMES, BATCH = 64, 24, 64
SHAPE = (PICTURE, PICTURE, 3)
SHARDS = 4
OURS = "shards"
CLOCK = "cpu and wall, see the rows"

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def run(rounds: int, threads: int) -> list[Result]:
    """Ratios of times for one epoch."""
    cells = pictures() * TIMES
    size = sum(map(len, cells)) / len(cells)
    setting = (
        f"{len(cells)} JPEG of {PICTURE} x {PICTURE}, {size / 1024:.1f} KiB, batches of {BATCH}"
    )
    label = "reading encoded pictures"
    with ExitStack() as stack:
        took = rounds_of(contenders(stack, MAKERS, cells), rounds)
    return [*compared(label, took, len(cells), setting),
            Result(label, "", "bytes/row", size, size, size, "", 1, setting)]  # fmt: skip


def contenders(
    stack: ExitStack, makers: dict[str, tuple[str, Maker]], cells: list[bytes], *without: str
) -> dict[str, Callable[..., Took]]:
    """Those whose package is installed, each in a process of its own."""
    found = {}
    for name, (package, maker) in makers.items():
        if package and find_spec(package) is None:
            console.print_warning(f"{name} is not installed: left out")
            continue
        found[name] = stack.enter_context(side(maker, cells, keep=True, without=without))
    return found


def compared(label: str, took: dict[str, list[Took]], rows: int, setting: str) -> list[Result]:
    """Ratios to our shards, by CPU time and on the wall, and what a row of ours takes."""
    results = []
    for clock in Took._fields:
        seconds = {name: [getattr(one, clock) for one in each] for name, each in took.items()}
        name, count = f"{label}, {clock} time", len(took[OURS])
        for who, theirs in seconds.items():
            if who != OURS:
                found = ratio(theirs, seconds[OURS])
                results.append(Result(name, who, "times as fast", *found, ">= 1", count, setting))
        per_row = spread([each / rows for each in seconds[OURS]])
        reported = label if clock == "cpu" else name
        results.append(Result(reported, "", "s/row", *per_row, "", count, setting, f"{clock} time"))
    return results


def pictures() -> list[bytes]:
    """Pictures at the size that a model reads, as JPEG."""
    return [encode_jpeg(decode("image", path.read_bytes())) for path in files("image", PICTURES)]


def take(batches: Batches, rows: int) -> None:
    """An epoch: all batches, and every row in them."""
    seen = 0
    for pixels, labels in batches:
        assert pixels.shape[1:] == SHAPE, pixels.shape
        assert pixels.dtype == torch.uint8
        seen += len(labels)
    assert seen == rows, f"{seen} of {rows} rows"


def _shards(cells: list[bytes], home: Path, stack: ExitStack) -> Callable[[], object]:
    files = [home / entry["file"] for entry in write_shards(cells, home)]
    epochs = iter(range(1 << 30))

    def epoch() -> None:
        maps = [pa.memory_map(str(path)) for path in files]
        table = pa.concat_tables([pa.ipc.open_file(each).read_all() for each in maps])
        take(shard_batches(table, next(epochs)), len(cells))

    return epoch


def write_shards(cells: list[bytes], home: Path) -> list[dict[str, Any]]:
    """Our shards; returns their entries in a manifest."""
    schema = pa.schema([jpeg_field("pixels", SHAPE), pa.field("label", pa.int64())])
    entries = []
    for number, part in enumerate(_parts(cells)):
        rows = {"pixels": [cells[i] for i in part], "label": part}
        path = home / f"train-{number:05d}.arrow"
        entries.append(write_shard(pa.table(rows, schema=schema), path))
    return entries


def shard_batches(table: pa.Table, epoch: int) -> Batches:
    """Batches of the rows of our shards in an order of their own."""
    pixels, labels = (open_column(table, name, "made") for name in ("pixels", "label"))
    assert isinstance(pixels, FixedColumn)
    assert isinstance(labels, FixedColumn)
    order = keyed_rng(0, "order", epoch).permutation(table.num_rows)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        yield torch.from_numpy(pixels.take(rows)), torch.from_numpy(labels.take(rows))


def _datasets(cells: list[bytes], home: Path, stack: ExitStack) -> Callable[[], object]:
    import datasets

    as_dataset(cells).save_to_disk(str(home / "saved"))
    epochs = iter(range(1 << 30))

    def epoch() -> None:
        data = datasets.load_from_disk(str(home / "saved")).shuffle(seed=next(epochs))
        take(dataset_batches(data), len(cells))

    return epoch


def as_dataset(cells: list[bytes]) -> Any:
    """The pictures as a dataset of Hugging Face's."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": c, "path": None} for c in cells], "label": list(range(len(cells)))}
    return datasets.Dataset.from_dict(rows, features=features)


def dataset_batches(data: Any) -> Batches:
    """Batches of a dataset of Hugging Face's, on a disk or streamed."""
    for batch in data.iter(BATCH):
        pixels = np.stack([np.asarray(image) for image in batch["image"]])
        yield torch.from_numpy(pixels), torch.tensor(batch["label"])


def _webdataset(cells: list[bytes], home: Path, stack: ExitStack) -> Callable[[], object]:
    urls = [str(path) for path in write_tars(cells, home)]
    return lambda: take(tar_batches(urls, len(cells)), len(cells))


def write_tars(cells: list[bytes], home: Path) -> list[Path]:
    """WebDataset's tars."""
    paths = []
    for number, part in enumerate(_parts(cells)):
        paths.append(home / f"{number:05d}.tar")
        with tarfile.open(paths[-1], "w") as archive:
            for i in part:
                for ending, data in (("jpg", cells[i]), ("cls", str(i).encode())):
                    entry = tarfile.TarInfo(f"{i:08d}.{ending}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return paths


def tar_batches(urls: list[str], rows: int) -> Batches:
    """Batches of WebDataset's, shuffled in a buffer of all rows."""
    import webdataset

    stream = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
    stream = stream.shuffle(rows).decode("rgb8").to_tuple("jpg", "cls")
    for pixels, labels in stream.batched(BATCH, partial=True):
        yield torch.from_numpy(np.stack(pixels)), torch.as_tensor(labels)


def _mosaic(cells: list[bytes], home: Path, stack: ExitStack) -> Callable[[], object]:
    from streaming import StreamingDataset

    write_mosaic(cells, home / "mds")
    dataset = StreamingDataset(local=str(home / "mds"), shuffle=True, batch_size=BATCH)
    return lambda: take(mosaic_batches(dataset), len(cells))


def write_mosaic(cells: list[bytes], home: Path) -> None:
    """MosaicML's shards, as large as ours."""
    from streaming import MDSWriter

    size = sum(map(len, cells)) // SHARDS + 1
    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(home), columns=columns, size_limit=size) as out:
        for number, data in enumerate(cells):
            out.write({"image": data, "label": number})


def mosaic_batches(dataset: Any) -> Batches:
    """Batches of MosaicML's rows."""
    waiting: list[dict[str, Any]] = []
    for row in dataset:
        waiting.append(row)
        if len(waiting) == BATCH:
            yield _batch(waiting)
            waiting = []
    if waiting:
        yield _batch(waiting)


def _batch(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows])
    return torch.from_numpy(pixels), torch.tensor([row["label"] for row in rows])


def _parts(cells: list[bytes]) -> list[np.ndarray]:
    return np.array_split(np.arange(len(cells)), SHARDS)


MAKERS: dict[str, tuple[str, Maker]] = {
    OURS: ("", _shards),
    "datasets": ("datasets", _datasets),
    "WebDataset": ("webdataset", _webdataset),
    "MosaicML streaming": ("streaming", _mosaic),
}
