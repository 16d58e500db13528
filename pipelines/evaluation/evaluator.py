"""What a model reaches on prepared corpora, as tidy rows with bootstrap intervals.

Every row of a split is used exactly once. For retrieval the query of a row is its first caption
(the name of the thing; further captions are keywords), or each of its captions where the corpus'
manifest says that they are alike (``queries``: all five of a photograph). The candidates are all
rows of the split, and rows of one group are right answers for one another.
"""

import datetime
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config.data import MaskConfig
from pipelines.config.run import default_masked_training, default_tasks_training
from pipelines.evaluation.inference import (
    InferenceInputs,
    InferenceRunner,
    mean_input_lengths,
    split_inputs,
)
from pipelines.evaluation.masked import masked_losses, mean_masked_length
from pipelines.evaluation.outcomes import OutcomeTable
from pipelines.evaluation.tables import COLUMNS, sort_rows
from pipelines.runs.head_sizes import LISTED, num_outputs_of
from pipelines.shards.columns import FixedColumn, RaggedColumn, open_column
from pipelines.shards.dataset import CorpusSplit, PreparedCorpus, open_corpus
from skillnet.accounting import account_task
from skillnet.metrics import (
    ConfidenceInterval,
    bootstrap_interval,
    error_counts,
    macro_f1_of_rows,
    median_rank,
    ratio_of_sums,
    retrieval_ranks,
    unique_group_ids,
)
from skillnet.multitask_model import TaskModel
from skillnet.skills import Task, find_task
from skillnet_platform.errors import UserError
from skillnet_platform.storage.location import Place, below, place

TaskFigures = dict[str, ConfidenceInterval]


def evaluate_model(
    model: TaskModel,
    data: str | Path,
    tasks: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    *,
    seed: int = 0,
    corpora: Mapping[str, str] | None = None,
    limits: Mapping[str, int | None] | None = None,
    system: str | None = None,
    steps: int | None = None,
    precision: str = "auto",
    samples: int = 1000,
    on_split: Callable[[str, str, int], None] | None = None,
    outcomes: OutcomeTable | None = None,
    masks: MaskConfig | None = None,
) -> list[dict[str, Any]]:
    """Measure a model on the splits of its tasks' corpora.

    Args:
        model: on the device on which it shall run; its training mode is left as it was.
        data: directory of prepared corpora.
        tasks: names; none takes all tasks of the model.
        splits: names; none takes every split whose name starts with ``test``, and
            ``validation`` for masked tasks. A named split that a corpus lacks is skipped there.
        seed: seed of the run, copied into the rows, and of the bootstrap.
        corpora: task -> corpus, where it is not the built-in one.
        limits: task -> longest sequence of the corpus' own modality, as in training.
        system: name of the system in the rows; none takes the model's.
        steps: training steps, copied into the rows.
        precision: see :class:`pipelines.evaluation.inference.InferenceRunner`.
        samples: resamplings of each interval; 0 leaves intervals out.
        on_split: called with task, split and rows before each split.
        outcomes: is given what became of every row, if it is wanted.
        masks: what masked tasks hide, as in training.

    Returns:
        One dictionary per figure with the keys ``COLUMNS``. Rates lie in [0, 1].

    Raises:
        UserError: an unknown task, a missing corpus, or a split that no corpus has.
    """
    names = sort_rows(model.config.tasks) if tasks is None else list(tasks)
    specs = {name: find_task(name, model.config.tasks) for name in names}
    runner = InferenceRunner(model, precision)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for name, spec in specs.items():
        corpus = open_corpus(locate_task_corpus(data, name, corpora))
        check_outputs(corpus, name, spec)
        masked = spec.objective == "masked"
        for split_name in choose_splits(
            corpus, ["validation"] if masked and not splits else splits
        ):
            split = corpus.splits[split_name]
            seen.add(split_name)
            if on_split is not None:
                on_split(name, split_name, split.rows)
            limit = (limits or {}).get(name)
            if masked:
                figures = {
                    metric: _mean(values, seed, samples)
                    for metric, values in masked_losses(
                        runner, name, corpus, split_name, masks, limit
                    ).items()
                }
                lengths = mean_masked_length(model, name, corpus, split_name, limit)
            else:
                figures, lengths = measure_split(
                    runner,
                    name,
                    split,
                    f"{corpus.name}/{split_name}",
                    limit=limit,
                    seed=seed,
                    samples=samples,
                    outcomes=outcomes,
                    every_caption=uses_all_captions(corpus),
                )
            cost = account_task(model, name, lengths)
            rows += tidy_rows(
                figures,
                system=system or model.system,
                task=name,
                seed=seed,
                split=split_name,
                activated_params=cost.activated,
                flops_per_example=cost.flops_per_example,
                steps=steps,
            )
    missing = sorted(set(splits or ()) - seen)
    if missing or not rows:
        raise UserError(
            f"no corpus of the tasks {', '.join(names)} below {data} has "
            + (f"the split {missing[0]!r}" if missing else "a test split")
        )
    return rows


def measure_split(
    runner: InferenceRunner,
    task: str,
    split: CorpusSplit,
    where: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    samples: int = 1000,
    outcomes: OutcomeTable | None = None,
    every_caption: bool = False,
) -> tuple[TaskFigures, dict[str, int]]:
    """Figures of one task on one split, and the mean length of its towers' rows.

    ``where`` names the split in messages, ``every_caption`` makes each caption of a row a query;
    see :func:`evaluate_model` for the rest.
    """
    config = runner.model.config
    spec = find_task(task, config.tasks)
    kept = OutcomeTable() if outcomes is None else outcomes
    table = split.table()
    inputs: dict[str, InferenceInputs] = {
        tower: split_inputs(
            table,
            plan,
            config,
            where,
            captions=tower == "query",
            every=every_caption,
            limit=None if tower == "query" else limit,
        )
        for tower, plan in spec.towers.items()
    }
    if spec.objective == "classification":
        probabilities = runner.classify(task, inputs["input"])
        labels = fixed_column(table, "label", where)
        predicted = probabilities.argmax(1)
        figures = classification_figures(predicted, labels, seed, samples)
        kept.hits(task, split.name, predicted == labels)
    elif spec.objective == "ctc":
        symbols, _ = runner.transcribe(task, inputs["input"])
        counts = error_counts(symbols, ragged_column(table, "symbols", where))
        figures = count_figures(counts, seed, samples)
        kept.add(task, split.name, counts[:, 0], counts[:, 1])
    else:
        query = runner.embed(task, "query", inputs["query"])
        candidate = runner.embed(task, "candidate", inputs["candidate"])
        groups = unique_group_ids(fixed_column(table, "group", where))
        owners = inputs["query"].owners
        asked = groups if owners is None else groups[owners]
        ranks = retrieval_ranks(query, candidate, asked, groups)
        figures = rank_figures(ranks, "", seed, samples, owners) | retrieval_figures(
            query, candidate, asked, groups, seed, samples, ways=("reverse_",)
        )
        kept.ranks(task, split.name, ranks, owners)
    return figures, mean_input_lengths(inputs)


def classification_figures(
    predicted: np.ndarray, labels: np.ndarray, seed: int = 0, samples: int = 1000
) -> TaskFigures:
    """Accuracy and macro-F1 of predicted classes (N,)."""
    pairs = np.stack([np.asarray(predicted), np.asarray(labels)], 1).astype(np.int64)
    return {
        "accuracy": _mean(pairs[:, 0] == pairs[:, 1], seed, samples),
        "macro_f1": _interval(pairs, macro_f1_of_rows, seed, samples),
    }


def sequence_figures(
    said: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    seed: int = 0,
    samples: int = 1000,
) -> TaskFigures:
    """Token error rate (sum of edit distances over symbols) and share without any error."""
    return count_figures(error_counts(said, references), seed, samples)


def count_figures(counts: np.ndarray, seed: int = 0, samples: int = 1000) -> TaskFigures:
    """The same of (distance, symbols) of each row, (N, 2)."""
    return {
        "token_error_rate": _interval(counts, ratio_of_sums, seed, samples),
        "exact_rate": _mean(counts[:, 0] == 0, seed, samples),
    }


def retrieval_figures(
    query: np.ndarray,
    candidate: np.ndarray,
    query_ids: np.ndarray,
    candidate_ids: np.ndarray,
    seed: int = 0,
    samples: int = 1000,
    ways: Iterable[str] = ("", "reverse_"),
    owners: np.ndarray | None = None,
) -> TaskFigures:
    """Recall at 1, 5 and 10 and median rank, of text -> X and (``reverse_``) of X -> text.

    ``owners`` are the rows that queries are of, where rows have several."""
    figures: TaskFigures = {}
    for prefix in ways:
        if prefix:
            ranks = retrieval_ranks(candidate, query, candidate_ids, query_ids)
        else:
            ranks = retrieval_ranks(query, candidate, query_ids, candidate_ids)
        figures |= rank_figures(ranks, prefix, seed, samples, None if prefix else owners)
    return figures


def rank_figures(
    ranks: np.ndarray,
    prefix: str = "",
    seed: int = 0,
    samples: int = 1000,
    clusters: np.ndarray | None = None,
) -> TaskFigures:
    """Recall at 1, 5 and 10 and median rank of ranks that start at 1.

    Queries of one cluster (captions of one picture) are resampled together.
    """
    figures = {
        f"{prefix}recall_at_{k}": _mean(ranks <= k, seed, samples, clusters) for k in (1, 5, 10)
    }
    figures[f"{prefix}median_rank"] = _interval(ranks, median_rank, seed, samples, clusters)
    return figures


def uses_all_captions(corpus: PreparedCorpus) -> bool:
    """Whether every caption of a row is a query of its own, or only the first."""
    return corpus.manifest.get("queries") == "all"


def tidy_rows(figures: TaskFigures, **common: Any) -> list[dict[str, Any]]:
    """One row per figure, with the keys ``COLUMNS`` in their order."""
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine_name(),
    }
    return [
        {
            column: (common | stamp | {"metric": metric} | interval._asdict()).get(column)
            for column in COLUMNS
        }
        for metric, interval in figures.items()
    ]


def machine_name() -> str:
    """This machine in words: processor, cores that this process may use, accelerator."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [model or os.uname().machine, f"{cores} cores"]
    import torch

    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)


def locate_task_corpus(
    data: str | Path, task: str, corpora: Mapping[str, str] | None = None
) -> Place:
    """Place of a task's corpus: the one that ``corpora`` names, or the built-in one."""
    known = default_tasks_training() | default_masked_training()
    names = {name: entry.corpus for name, entry in known.items()} | dict(corpora or {})
    if task not in names:
        raise UserError(f"no corpus is known for the task {task!r}; give --corpora.{task} NAME")
    return below(place(data, Path()), names[task])


def choose_splits(corpus: PreparedCorpus, splits: Sequence[str] | None) -> list[str]:
    """The named splits that a corpus has, or all test sets."""
    if splits is None:
        return [name for name in corpus.splits if name.startswith("test")]
    return [name for name in splits if name in corpus.splits]


def check_outputs(corpus: PreparedCorpus, task: str, spec: Task) -> None:
    """Raise UserError if a corpus has another number of classes or symbols than the model."""
    found = num_outputs_of(corpus.manifest, spec)
    if found is not None and found != spec.outputs:
        raise UserError(
            f"{task}: the corpus {corpus.name} has {found} {LISTED[spec.objective]}, the model was "
            f"built for {spec.outputs}; set model.tasks.{task}.outputs to {found} and train again"
        )


def fixed_column(table: Any, name: str, where: str) -> np.ndarray:
    """All values of a column of numbers."""
    column = open_column(table, name, where)
    if not isinstance(column, FixedColumn):
        raise UserError(f"{where}: column {name!r} holds lists, expected one number a row")
    return column.take(np.arange(len(table)))


def ragged_column(table: Any, name: str, where: str) -> list[list[int]]:
    """All values of a column of lists of numbers."""
    column = open_column(table, name, where)
    if not isinstance(column, RaggedColumn):
        raise UserError(f"{where}: column {name!r} holds numbers, expected lists of them")
    values, lengths = column.take(np.arange(len(table)))
    return [row[:length].tolist() for row, length in zip(values, lengths, strict=True)]


def _mean(
    hits: np.ndarray, seed: int, samples: int, clusters: np.ndarray | None = None
) -> ConfidenceInterval:
    return _interval(np.asarray(hits, dtype=np.float64), np.mean, seed, samples, clusters)


def _interval(
    values: np.ndarray,
    statistic: Callable[..., float],
    seed: int,
    samples: int,
    clusters: np.ndarray | None = None,
) -> ConfidenceInterval:
    if not samples:
        return ConfidenceInterval(float(statistic(values)), float("nan"), float("nan"))
    return bootstrap_interval(values, statistic, seed=seed, samples=samples, clusters=clusters)
