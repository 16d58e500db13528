"""The stream alone, beside Hugging Face datasets on the same shards, and waiting for data.

Both make the same global batches of the same rows as padded tensors, without augmentation; what
augmentation costs stands in rows of its own. ``datasets`` collates in two ways: as an example of a
data loader does, with one tensor per row and ``pad_sequence``, and as the stream does, with one
array that is filled. The corpora of the demo fit into the cache of a processor, so a text corpus of
a million rows stands beside them. Waiting is measured in a training run of the default size, by the
loop itself.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.measure import Result, clock_for, in_turns, ratio, spread
from benchmarks.prepare_text import train_tokenizer, write_rows
from pipelines import prepare
from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
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
#: Rows of the large text corpus, and of its batches.
MANY_ROWS, MANY_BATCH = 1_000_000, 128


def run(rounds: int, threads: int) -> list[Result]:
    """Rows a second of each task, and the share of a training run spent waiting."""
    config = FinetuneConfig(data=os.environ.get("SKILLNET_BENCHMARK_DATA"))
    config.training = dataclasses.replace(
        config.training, threads_per_worker=threads, steps=STEPS, checkpoint_every=0
    )
    results = _many_rows(config, rounds, threads)
    try:
        corpora = open_corpora(config)
    except UserError as error:
        console.print_warning(
            f"the stream needs prepared corpora (skillnet prepare, or --data): {error}"
        )
        return results
    for name in COLUMNS:
        results += _task(name, config, corpora, rounds, threads)
    done = train_model(ResolvedRun(config))
    waiting = spread([done.waiting])
    setting = f"{STEPS} steps of the default model and tasks, {done.rows_per_second:.0f} rows/s"
    results.append(
        Result("waiting for data", "time in the loop", "share", *waiting, "<= 0.02", 1, setting)
    )
    return results


def _many_rows(config: FinetuneConfig, rounds: int, threads: int) -> list[Result]:
    """Prepare a text corpus of a million rows, and read it."""
    name = "text_classification"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path, tokenizer = write_rows(folder / "rows.jsonl", MANY_ROWS), train_tokenizer(folder)
        words = ["--corpus", f"many=folder:{path}", "--tokenizer", str(tokenizer)]
        if prepare.main([*words, "--data", str(folder / "data")]):
            raise RuntimeError("the corpus of a million rows was not prepared")
        task = dataclasses.replace(config.tasks[name], corpus="many", batch_size=MANY_BATCH)
        given = dataclasses.replace(config, tasks={name: task})
        return _task(name, given, {"many": open_corpus(folder / "data" / "many")}, rounds, threads)


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
    rows = corpus.splits[config.tasks[name].split].rows
    # Few steps of a large corpus would read the same pages in each round.
    steps = 4 if rows < MANY_ROWS // 2 else 40

    def over(make: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [make(step) for step in range(steps)]

    seconds = in_turns(
        {
            "stream": over(plain.batch),
            "augmented": over(changed.batch),
            "datasets": over(
                lambda step: _collate(dataset[plain.batch_spec(step).rows], limit, _fill)
            ),
            "pad_sequence": over(
                lambda step: _collate(dataset[plain.batch_spec(step).rows], limit, _pad)
            ),
        },
        rounds,
        clock_for(threads),
        warmup=1,
    )
    count = sum(len(plain.batch_spec(step).rows) for step in range(steps))
    rates = {key: spread([count / s for s in values]) for key, values in seconds.items()}
    batch = f"{rows} rows, batches of {config.tasks[name].batch_size}"
    names = {"stream": "stream", "augmented": "augmented stream", "datasets": "datasets"}
    names["pad_sequence"] = "datasets with pad_sequence"
    results = [
        Result(f"{label}, {name}", "", "rows/s", *rates[key], "", rounds, batch)
        for key, label in names.items()
    ]
    for key, target in (("datasets", ">= 1"), ("pad_sequence", "")):
        faster = ratio(seconds[key], seconds["stream"])
        results.append(
            Result(f"stream, {name}", names[key], "times as fast", *faster, target, rounds, batch)
        )
    return results


def _dataset(corpus: PreparedCorpus, split: str, columns: list[str]) -> Any:
    from datasets import Dataset, concatenate_datasets, disable_progress_bars

    disable_progress_bars()
    files = [str(Path(corpus.path) / shard["file"]) for shard in corpus.splits[split].shards]
    whole = concatenate_datasets([Dataset.from_file(file) for file in files])
    return whole.select_columns(columns).with_format("numpy")


Padding = Callable[[Iterable[Any]], Tensor]


def _collate(rows: dict[str, Any], limit: int, pad: Padding) -> dict[str, Tensor]:
    """What a data loader's collate function has to do for the same batch."""
    batch: dict[str, Tensor] = {}
    for name, column in rows.items():
        if name == "caption_tokens":
            batch[name] = pad(captions[0] for captions in column)
        elif name in ("tokens", "log_mel", "symbols"):
            batch[name] = pad(row[:limit] for row in column)
        else:
            batch[name] = torch.as_tensor(column)
    return batch


def _fill(rows: Iterable[Any]) -> Tensor:
    """Pad rows as the stream does: fill one array."""
    arrays = [np.asarray(row) for row in rows]
    shape = (len(arrays), max(map(len, arrays)), *arrays[0].shape[1:])
    padded = np.zeros(shape, np.int64 if arrays[0].dtype.kind in "iu" else np.float32)
    for row, values in zip(padded, arrays, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(padded)


def _pad(rows: Iterable[Any]) -> Tensor:
    """Pad rows as an example of a data loader does: a tensor per row."""
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)
