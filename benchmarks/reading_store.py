"""Speed of reading shuffled batches of encoded images from an object store, compared with
datasets, WebDataset and MosaicML streaming: the same JPEG bytes in a bucket of moto's server.

An epoch starts with nothing of the corpus on this machine, and each contender fetches it as it is
meant to: ours and MosaicML's shard by shard into a cache on the disk (ours hashed), datasets and
WebDataset as streams with a shuffle buffer of all rows. Ours is read as training reads it: all rows
are shuffled, so the first batch needs all shards. The server is a process of its own, in Python:
its CPU time is nobody's, and on the wall it is slow for all alike.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from benchmarks.measure import Maker, Result, rounds_of
from benchmarks.media_corpus import PICTURE
from benchmarks.reading import (
    BATCH,
    OURS,
    SHARDS,
    TIMES,
    Batches,
    as_dataset,
    compared,
    contenders,
    dataset_batches,
    mosaic_batches,
    pictures,
    take,
    tar_batches,
    write_mosaic,
    write_shards,
    write_tars,
)

if TYPE_CHECKING:
    from pipelines.training.loading.samplers import ShuffleSampler
    from pipelines.training.loading.task_columns import ShardTable

PORT, BUCKET, PREFIX = 15_555, "pictures", "contender-"
ADDRESS = f"http://127.0.0.1:{PORT}"
MOST_ROUNDS = 8
CLOCK = "cpu and wall, see the rows"
SERVER = "moto_server"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_ENDPOINT_URL": ADDRESS,
    "S3_ENDPOINT_URL": ADDRESS,  # MosaicML's
}


def run(rounds: int, threads: int) -> list[Result]:
    """Ratios of times for one epoch."""
    cells = pictures() * TIMES
    size = sum(map(len, cells)) / len(cells)
    setting = (
        f"{len(cells)} JPEG of {PICTURE} x {PICTURE}, {size / 1024:.1f} KiB, {SHARDS} objects, "
        f"batches of {BATCH}, nothing cached"
    )
    with mock.patch.dict("os.environ", ENVIRONMENT), _server(), ExitStack() as stack:
        took = rounds_of(contenders(stack, MAKERS, cells), min(rounds, MOST_ROUNDS))
    return compared("reading encoded pictures from a store", took, len(cells), setting)


@contextlib.contextmanager
def _server() -> Iterator[None]:
    import boto3

    command = shutil.which(SERVER, path=str(Path(sys.executable).parent))
    assert command is not None, "moto_server is not installed: pip install -e .[dev]"
    quiet = subprocess.DEVNULL
    with subprocess.Popen([command, "-p", str(PORT)], stdout=quiet, stderr=quiet) as process:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{ADDRESS}/moto-api/data.json", timeout=10).close()  # noqa: S310
                    break
                time.sleep(0.1)
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield
        finally:
            process.terminate()


def _afresh(epoch: Callable[[Path, int], None]) -> Callable[[], object]:
    """Read one epoch after the other, each into a folder that is empty."""
    numbers = iter(range(1 << 30))

    def one() -> None:
        with tempfile.TemporaryDirectory() as cache:
            epoch(Path(cache), next(numbers))

    return one


def _upload(folder: Path) -> list[str]:
    """Send the files of a folder; returns their keys, in order."""
    import boto3

    client, keys = boto3.client("s3"), []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        keys.append(f"{PREFIX}{os.getpid()}/{path.relative_to(folder)}")
        # WebDataset reads by curl, which signs nothing.
        client.upload_file(str(path), BUCKET, keys[-1], ExtraArgs={"ACL": "public-read"})
    return keys


def _shards(cells: list[bytes], home: Path, stack: ExitStack) -> Callable[[], object]:
    from pipelines.data.shards.dataset import open_corpus
    from pipelines.data.shards.format import FORMAT_VERSION, write_corpus_manifest
    from pipelines.training.loading.samplers import ShuffleSampler
    from pipelines.training.loading.task_columns import ShardTable
    from skillnet_platform.storage.cache import FileCache

    entries = write_shards(cells, home)
    manifest = {
        "format_version": FORMAT_VERSION,
        "corpus": "pictures",
        "modality": "image",
        "task": "image_classification",
        "splits": {"train": {"rows": len(cells), "shards": entries}},
    }
    write_corpus_manifest(home, manifest)
    _upload(home)

    def epoch(cache: Path, number: int) -> None:
        corpus = open_corpus(f"s3://{BUCKET}/{PREFIX}{os.getpid()}", cache=FileCache(cache, 10**9))
        held, key = ShardTable([corpus.splits["train"]], "made"), (number, "order")
        take(_held_batches(held, ShuffleSampler(len(held), BATCH, key)), len(cells))

    return _afresh(epoch)


def _held_batches(held: "ShardTable", order: "ShuffleSampler") -> Batches:
    """Batches of one epoch, as the stream of a training takes them."""
    import torch

    from pipelines.data.shards.columns import FixedColumn

    for occurrence in range(len(held) // BATCH):
        rows = order.batch(occurrence)
        order.open_shards(held, occurrence)
        held.ensure_open(rows)
        pixels, labels = (held.column(name) for name in ("pixels", "label"))
        assert isinstance(pixels, FixedColumn)
        assert isinstance(labels, FixedColumn)
        local = held.to_local(rows)
        yield torch.from_numpy(pixels.take(local)), torch.from_numpy(labels.take(local))


def _datasets(cells: list[bytes], home: Path, stack: ExitStack) -> Callable[[], object]:
    import datasets

    whole = as_dataset(cells)
    for number in range(SHARDS):
        whole.shard(SHARDS, number, contiguous=True).to_parquet(str(home / f"{number:05d}.parquet"))
    files = [f"s3://{BUCKET}/{key}" for key in _upload(home)]

    def epoch(cache: Path, number: int) -> None:
        data = datasets.load_dataset(
            "parquet", data_files=files, split="train", streaming=True, cache_dir=str(cache)
        )
        take(dataset_batches(data.shuffle(seed=number, buffer_size=len(cells))), len(cells))

    return _afresh(epoch)


def _webdataset(cells: list[bytes], home: Path, stack: ExitStack) -> Callable[[], object]:
    write_tars(cells, home)
    urls = [f"{ADDRESS}/{BUCKET}/{key}" for key in _upload(home)]
    return lambda: take(tar_batches(urls, len(cells)), len(cells))


def _mosaic(cells: list[bytes], home: Path, stack: ExitStack) -> Callable[[], object]:
    from streaming import StreamingDataset

    write_mosaic(cells, home)
    _upload(home)

    def epoch(cache: Path, number: int) -> None:
        remote = f"s3://{BUCKET}/{PREFIX}{os.getpid()}"
        dataset = StreamingDataset(
            remote=remote, local=str(cache), shuffle=True, batch_size=BATCH, shuffle_seed=number
        )
        take(mosaic_batches(dataset), len(cells))

    return _afresh(epoch)


MAKERS: dict[str, tuple[str, Maker]] = {
    OURS: ("", _shards),
    "datasets": ("datasets", _datasets),
    "WebDataset": ("webdataset", _webdataset),
    "MosaicML streaming": ("streaming", _mosaic),
}
