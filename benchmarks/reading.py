"""Reading shuffled batches of encoded pictures beside datasets, WebDataset and MosaicML
streaming: the same JPEG bytes in each one's own format, on a local disk, one process.

A batch is 64 pictures of 224 x 224 as one uint8 tensor and their labels. Each contender shuffles
as it is meant to: rows in any order (ours, datasets), or a buffer of the whole corpus (the others).
A contender that is not installed is left out.
"""

import io
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from benchmarks.measure import Result, clock_for, in_turns, ratio, spread
from benchmarks.media import PICTURE, decode, files
from pipelines.collate import Fixed, open_column
from pipelines.encoded import encode, encoded_field
from pipelines.shards import write_shard
from pipelines.training.mixture import generator
from skillnet_platform import console

PICTURES, TIMES, BATCH = 64, 6, 64
SHAPE = (PICTURE, PICTURE, 3)
SHARDS = 4


def run(rounds: int, threads: int) -> list[Result]:
    """Ratios of times for one epoch."""
    cells = [encode(decode("image", path.read_bytes())) for path in files("image", PICTURES)]
    cells *= TIMES
    makers: dict[str, tuple[str, Callable[[list[bytes], Path], Callable[[], object]]]] = {
        "shards": ("", _shards),
        "datasets": ("datasets", _datasets),
        "WebDataset": ("webdataset", _webdataset),
        "MosaicML streaming": ("streaming", _mosaic),
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contenders = {}
        for name, (package, make) in makers.items():
            if package and find_spec(package) is None:
                console.warn(f"{name} is not installed: left out")
                continue
            home = Path(folder) / name.replace(" ", "-")
            home.mkdir()
            contenders[name] = make(cells, home)
        seconds = in_turns(contenders, rounds, clock_for(threads), warmup=1)
    size = sum(map(len, cells)) / len(cells)
    setting = (
        f"{len(cells)} JPEG of {PICTURE} x {PICTURE}, {size / 1024:.1f} KiB, batches of {BATCH}"
    )
    per_row = [s / len(cells) for s in seconds["shards"]]
    results = [
        Result("reading encoded pictures", name, "times as fast", *ratio(took, seconds["shards"]),
               ">= 1", rounds, setting)
        for name, took in seconds.items()
        if name != "shards"
    ]  # fmt: skip
    note = "cpu time of one process"
    figures = {"s/row": spread(per_row), "bytes/row": spread([size])}
    for unit, figure in figures.items():
        label = "reading encoded pictures"
        results.append(Result(label, "", unit, *figure, "", rounds, setting, note))
    return results


def _take(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], rows: int) -> None:
    seen = 0
    for pixels, labels in batches:
        assert pixels.shape[1:] == SHAPE, pixels.shape
        assert pixels.dtype == torch.uint8
        seen += len(labels)
    assert seen == rows, f"{seen} of {rows} rows"


def _shards(cells: list[bytes], home: Path) -> Callable[[], object]:
    schema = pa.schema([encoded_field("pixels", SHAPE), pa.field("label", pa.int64())])
    for number, part in enumerate(np.array_split(np.arange(len(cells)), SHARDS)):
        rows = {"pixels": [cells[i] for i in part], "label": part}
        write_shard(pa.table(rows, schema=schema), home / f"train-{number:05d}.arrow")
    epochs = iter(range(1 << 30))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        maps = [pa.memory_map(str(path)) for path in sorted(home.glob("*.arrow"))]
        table = pa.concat_tables([pa.ipc.open_file(each).read_all() for each in maps])
        pixels, labels = (open_column(table, name, "made") for name in ("pixels", "label"))
        assert isinstance(pixels, Fixed)
        assert isinstance(labels, Fixed)
        order = generator(0, "order", next(epochs)).permutation(len(cells))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            yield torch.from_numpy(pixels.take(rows)), torch.from_numpy(labels.take(rows))

    return lambda: _take(batches(), len(cells))


def _datasets(cells: list[bytes], home: Path) -> Callable[[], object]:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": c, "path": None} for c in cells], "label": list(range(len(cells)))}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(home / "saved"))
    epochs = iter(range(1 << 30))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        data = datasets.load_from_disk(str(home / "saved")).shuffle(seed=next(epochs))
        for batch in data.iter(BATCH):
            pixels = np.stack([np.asarray(image) for image in batch["image"]])
            yield torch.from_numpy(pixels), torch.tensor(batch["label"])

    return lambda: _take(batches(), len(cells))


def _webdataset(cells: list[bytes], home: Path) -> Callable[[], object]:
    import webdataset

    for number, part in enumerate(np.array_split(np.arange(len(cells)), SHARDS)):
        with tarfile.open(home / f"{number:05d}.tar", "w") as archive:
            for i in part:
                for ending, data in (("jpg", cells[i]), ("cls", str(i).encode())):
                    entry = tarfile.TarInfo(f"{i:08d}.{ending}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    urls = [str(path) for path in sorted(home.glob("*.tar"))]

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        stream = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        stream = stream.shuffle(len(cells)).decode("rgb8").to_tuple("jpg", "cls")
        for pixels, labels in stream.batched(BATCH, partial=True):
            yield torch.from_numpy(np.stack(pixels)), torch.as_tensor(labels)

    return lambda: _take(batches(), len(cells))


def _mosaic(cells: list[bytes], home: Path) -> Callable[[], object]:
    from streaming import MDSWriter, StreamingDataset

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(home / "mds"), columns=columns, size_limit=1 << 22) as out:
        for number, data in enumerate(cells):
            out.write({"image": data, "label": number})
    dataset = StreamingDataset(local=str(home / "mds"), shuffle=True, batch_size=BATCH)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        waiting: list[dict[str, Any]] = []
        for row in dataset:
            waiting.append(row)
            if len(waiting) == BATCH:
                yield _batch(waiting)
                waiting = []
        if waiting:
            yield _batch(waiting)

    return lambda: _take(batches(), len(cells))


def _batch(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows])
    return torch.from_numpy(pixels), torch.tensor([row["label"] for row in rows])
