"""Gradient share: the part of a task's squared gradient in each skill, the stems and the head.

Gradients are of training batches, in evaluation mode (no dropout) and without augmentation. A share
is a sum of squares over batches, divided by the sum of all parts, so larger parts have larger
shares. The entry point is :func:`measure_gradient_share`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.run import TaskTraining
from pipelines.training.evaluation.evaluator import locate_task_corpus
from pipelines.training.evaluation.tables import sort_rows
from pipelines.training.loading.dataloader import MultiTaskDataLoader
from pipelines.training.loop.step import task_loss
from pipelines.training.runs.vocabulary_match import align_outputs
from skillnet.metrics import ConfidenceInterval, bootstrap_interval, ratio_of_sums
from skillnet.model import SkillNet
from skillnet.precision import choose_precision

#: Keys of a row of :func:`measure_gradient_share`.
COLUMNS = (
    "task",
    "kind",
    "part",
    "share",
    "low",
    "high",
    "of_skills",
    "of_skills_low",
    "of_skills_high",
    "parameters",
    "batches",
)


def measure_gradient_share(
    model: SkillNet,
    data: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    corpora: Mapping[str, str] | None = None,
    limits: Mapping[str, int | None] | None = None,
    batches: int = 8,
    batch: int = 64,
    bootstrap_samples: int = 1000,
) -> list[dict[str, Any]]:
    """Measure the share of each part in the squared gradient norm of every task.

    Args:
        model: a trained model; it is not changed.
        data: directory of prepared corpora.
        tasks: task names; None takes all tasks with a headline metric.
        corpora: task -> corpus, if it is not the built-in corpus.
        limits: task -> maximum sequence length, as in training.
        batches: number of batches per task.
        batch: rows per batch.
        bootstrap_samples: resamplings of each interval, which is over batches.

    Returns:
        Rows with the keys ``COLUMNS``: one per skill (0 if inactive), one for shared parameters,
        one for the task's stems and one for its head. ``share`` is relative to all parts,
        ``of_skills`` to all skills (None for other parts); each sums to 1 over a task.
        ``parameters`` is the number of parameters of the part that the task uses.

    Raises:
        UserError: an unknown task, or a corpus that is missing or does not fit.
    """
    names = sort_rows(model.config.tasks) if tasks is None else list(tasks)
    table = []
    for name in names:
        corpus = open_corpus(locate_task_corpus(data, name, corpora))
        align_outputs(model, name, corpus)
        settings = TaskTraining(
            corpus.name, batch_size=batch, split="train", max_length=(limits or {}).get(name)
        )
        # Always the first caption, so that equal seeds give equal batches.
        settings = replace(settings, first_caption_prob=1.0)
        stream = MultiTaskDataLoader({corpus.name: corpus}, {name: settings}, model.config, seed=0)
        squares, sizes = _squared_norms(model, name, stream, batches)
        total = np.sum(list(squares.values()), 0)
        skills = np.sum([x for (kind, _), x in squares.items() if kind == "skill"], 0)
        for (kind, part), values in squares.items():
            row: dict[str, Any] = {"task": name, "kind": kind, "part": part, "batches": batches}
            row["parameters"] = sizes[kind, part]
            keys = ("share", "low", "high")
            row |= zip(keys, _share_interval(values, total, bootstrap_samples), strict=True)
            if kind == "skill":
                keys = ("of_skills", "of_skills_low", "of_skills_high")
                row |= zip(keys, _share_interval(values, skills, bootstrap_samples), strict=True)
            table.append({column: row.get(column) for column in COLUMNS})
    return table


def _share_interval(
    values: np.ndarray, total: np.ndarray, bootstrap_samples: int
) -> ConfidenceInterval:
    # A ratio of sums, so that the share of a batch with tiny gradients has little weight.
    rows_N2 = np.stack([values, total], 1)
    return bootstrap_interval(rows_N2, ratio_of_sums, seed=0, samples=bootstrap_samples)


#: (kind, name): ("skill", its name), or twice "shared", "stem" or "head".
ModelPart = tuple[str, str]


def _squared_norms(
    model: SkillNet, task: str, stream: MultiTaskDataLoader, batches: int
) -> tuple[dict[ModelPart, np.ndarray], dict[ModelPart, int]]:
    """Return part -> squared gradient norm of each batch, and part -> number of parameters."""
    named = list(model.active_parameters(task))
    # All skills are listed, so that inactive ones have a share of 0.
    parts: dict[ModelPart, int] = {("skill", skill): 0 for skill in model.config.skills}
    parts |= {(kind, kind): 0 for kind in ("shared", "stem", "head")}
    owners = [_parse_part(model.file_of(name)) for name, _ in named]
    for owner, (_, parameter) in zip(owners, named, strict=True):
        parts[owner] += parameter.numel()
    squares = {part: np.zeros(batches) for part in parts}
    first = next(model.parameters())
    frozen = [parameter for _, parameter in named if not parameter.requires_grad]
    numbers = choose_precision("fp64" if first.dtype == torch.float64 else "auto", first.device)
    training = model.training
    model.eval()
    try:
        for parameter in frozen:
            # Frozen parameters are included: the share describes the task, not the optimizer.
            parameter.requires_grad_(True)
        for step in range(batches):
            batch = stream.batch(step).to(first.device, first.dtype)
            with numbers.autocast():
                outputs = model(task, batch.towers)
            # The loss is computed outside autocast, as in training.
            loss = task_loss(model.config.tasks[task], outputs, batch)
            # autograd.grad leaves .grad of the parameters alone, so the model stays unchanged.
            gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            for owner, gradient in zip(owners, gradients, strict=True):
                if gradient is not None:
                    # Sums of millions of small squares lose digits in float32.
                    squares[owner][step] += float(gradient.double().square().sum())
    finally:
        for parameter in frozen:
            # An error must not leave the model of the caller unfrozen.
            parameter.requires_grad_(False)
        model.train(training)
    return squares, parts


def _parse_part(file: str) -> ModelPart:
    kind, _, name = file.partition("-")
    return (kind, name) if kind == "skill" else (kind, kind)
