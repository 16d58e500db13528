"""The stream alone, beside Hugging Face datasets on the same shards, and waiting for data.

Both make the same global batches of the same rows as padded tensors, without augmentation; what
augmentation costs stands in rows of its own. Waiting is measured in a training run of the
default size, by the loop itself.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.measure import Result, clock_for, in_turns, ratio, spread
from pipelines.data.shards.dataset import PreparedCorpus
from pipelines.training.config.data import AUGMENTATIONS
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.dataloader import MultiTaskDataLoader
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.runs.identity import open_corpora
from skillnet_platform import console
from skillnet_platform.errors import UserError

#: What a task reads of its corpus.
COLUMNS = {
    "text_classification": ["tokens", "label"],
    "speech_recognition": ["log_mel", "frames", "symbols"],
    "text_to_image": ["pixels", "caption_tokens", "group"],
    "text_to_video": ["frames", "caption_tokens", "group"],
    "text_to_code": ["tokens", "caption_tokens", "group"],
}
STEPS = 40


def run(rounds: int, threads: int) -> list[Result]:
    """Rows a second of each task, and the share of a training run spent waiting."""
    config = FinetuneConfig(data=os.environ.get("SKILLNET_BENCHMARK_DATA"))
    config.training = dataclasses.replace(
        config.training, workers=0, threads_per_worker=threads, steps=STEPS, checkpoint_every=0
    )
    try:
        corpora = open_corpora(config)
    except UserError as error:
        console.print_warning(
            f"the stream needs prepared corpora (skillnet prepare, or --data): {error}"
        )
        return []
    results = []
    for name in COLUMNS:
        results += _task(name, config, corpora, rounds, threads)
    done = train_model(ResolvedRun(config))
    waiting = spread([done.waiting])
    setting = f"{STEPS} steps of the default model and tasks, {done.rows_per_second:.0f} rows/s"
    results.append(
        Result("waiting for data", "time in the loop", "share", *waiting, "<= 0.02", 1, setting)
    )
    return results


def _task(
    name: str, config: FinetuneConfig, corpora: dict[str, PreparedCorpus], rounds: int, threads: int
) -> list[Result]:
    only = {name: config.tasks[name]}
    corpus = corpora[config.tasks[name].corpus]
    plain = MultiTaskDataLoader(corpora, only, config.model, 0)
    changed = MultiTaskDataLoader(
        corpora, only, config.model, 0, AUGMENTATIONS[config.training.augment]
    )
    dataset = _dataset(corpus, config.tasks[name].split, COLUMNS[name])
    limit = plain.datasets[name].limit

    def over(make: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [make(step) for step in range(4)]

    seconds = in_turns(
        {
            "stream": over(plain.batch),
            "augmented": over(changed.batch),
            "datasets": over(lambda step: _collate(dataset[plain.batch_spec(step).rows], limit)),
        },
        rounds,
        clock_for(threads),
        warmup=1,
    )
    count = sum(len(plain.batch_spec(step).rows) for step in range(4))
    rates = {key: spread([count / s for s in values]) for key, values in seconds.items()}
    batch = f"batches of {config.tasks[name].batch_size}"
    faster = ratio(seconds["datasets"], seconds["stream"])
    return [
        Result(f"stream, {name}", "", "rows/s", *rates["stream"], "", rounds, batch),
        Result(f"augmented stream, {name}", "", "rows/s", *rates["augmented"], "", rounds, batch),
        Result(f"datasets, {name}", "", "rows/s", *rates["datasets"], "", rounds, batch),
        Result(f"stream, {name}", "datasets", "times as fast", *faster, ">= 1", rounds, batch),
    ]


def _dataset(corpus: PreparedCorpus, split: str, columns: list[str]) -> Any:
    from datasets import Dataset, concatenate_datasets, disable_progress_bars

    disable_progress_bars()
    shards = corpus.manifest["splits"][split]["shards"]
    files = [str(Path(corpus.path) / shard["file"]) for shard in shards]
    whole = concatenate_datasets([Dataset.from_file(file) for file in files])
    return whole.select_columns(columns).with_format("numpy")


def _collate(rows: dict[str, Any], limit: int) -> dict[str, Tensor]:
    """What a data loader's collate function has to do for the same batch."""
    batch: dict[str, Tensor] = {}
    for name, column in rows.items():
        if name == "caption_tokens":
            batch[name] = _pad(captions[0] for captions in column)
        elif name in ("tokens", "log_mel", "symbols"):
            batch[name] = _pad(row[:limit] for row in column)
        else:
            batch[name] = torch.as_tensor(column)
    return batch


def _pad(rows: Iterable[Any]) -> Tensor:
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)
