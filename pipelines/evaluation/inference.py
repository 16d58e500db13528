"""A trained model over many rows: batches of like length, outputs in the order of the rows.

Shapes: N rows, C classes, E width of the retrieval space.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.shards.columns import NestedRaggedColumn, RaggedColumn, open_column
from skillnet.config import SkillNetConfig
from skillnet.metrics import greedy_symbols
from skillnet.multitask_model import TaskModel
from skillnet.precision import choose_precision
from skillnet.skills import SkillPlan, find_task

#: Positions (rows x tokens) of one batch: large enough to fill two cores, small in memory.
POSITIONS = 4096
MAX_BATCH_ROWS = 512

#: Column of a prepared corpus that holds a modality's input.
COLUMN = {
    "text": "tokens",
    "code": "tokens",
    "image": "pixels",
    "sound": "log_mel",
    "video": "frames",
}


@dataclass(frozen=True)
class InferenceInputs:
    """What one tower reads of N rows.

    Args:
        lengths: (N,) tokens that each row costs in the encoder.
        take: row numbers -> the tower's batch.
        items: (N,) the row's own length, in tokens or frames; None where all have one size.
        owners: (N,) row of the split that each is of, where a row may have several; None where
            each row is itself.
    """

    lengths: np.ndarray
    take: Callable[[np.ndarray], dict[str, Tensor]]
    items: np.ndarray | None = None
    owners: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def mean_items(self) -> int | None:
        """Mean length of a row, rounded, at least 1; None where all have one size."""
        if self.items is None or not len(self.items):
            return None
        return max(round(float(self.items.mean())), 1)


def split_inputs(
    table: pa.Table,
    plan: SkillPlan,
    config: SkillNetConfig,
    where: str,
    *,
    captions: bool = False,
    every: bool = False,
    limit: int | None = None,
) -> InferenceInputs:
    """The input of a tower from a prepared split.

    Args:
        table: rows of the split, memory-mapped.
        plan: the tower's plan; its modality names the column.
        config: shape of the model, for its limits.
        where: corpus and split, for messages.
        captions: read the first caption of each row in place of its own modality.
        every: read all captions of each row, one after the other.
        limit: longest row in tokens or frames; the model's own limit if that is lower.
    """
    name = "caption_tokens" if captions else COLUMN[plan.modality]
    column = open_column(table, name, where)
    longest = config.max_frames if plan.modality == "sound" else config.max_tokens
    longest = longest if limit is None else min(limit, longest)
    owners: np.ndarray | None = None
    if captions and isinstance(column, NestedRaggedColumn):
        firsts = column.first(np.arange(len(table)))
        if every:
            counts = column.counts(np.arange(len(table)))
            owners = np.repeat(np.arange(len(table)), counts)
            firsts = np.concatenate(
                [np.arange(f, f + n) for f, n in zip(firsts, counts, strict=True)]
            )
        column = column.inner
    else:
        firsts = np.arange(len(table))
    if isinstance(column, RaggedColumn):
        ragged = column
        items = np.minimum(ragged.lengths(firsts), longest)

        def take(rows: np.ndarray) -> dict[str, Tensor]:
            values, lengths = ragged.take(firsts[rows], limit=longest)
            return _ragged_batch(plan, values, lengths)

        return InferenceInputs(_cost(plan, config, items), take, items, owners)
    fixed = column
    assert not isinstance(fixed, NestedRaggedColumn)
    return InferenceInputs(
        np.full(len(table), _tokens_of_one(plan, config)),
        lambda rows: {COLUMN[plan.modality]: torch.from_numpy(fixed.take(rows))},
    )


def memory_inputs(
    items: Sequence[np.ndarray], plan: SkillPlan, config: SkillNetConfig
) -> InferenceInputs:
    """The input of a tower from arrays in memory, one per row, as a transform gives them.

    Text and code: (T,) token ids. Sound: (frames, mels). Pictures (H, W, 3) and clips
    (N, H, W, C): uint8.
    """
    if plan.modality in ("image", "video"):
        return InferenceInputs(
            np.full(len(items), _tokens_of_one(plan, config)),
            lambda rows: {
                COLUMN[plan.modality]: torch.from_numpy(np.stack([items[row] for row in rows]))
            },
        )
    longest = config.max_frames if plan.modality == "sound" else config.max_tokens
    lengths_N = np.array([min(len(item), longest) for item in items], dtype=np.int64)

    def take(rows: np.ndarray) -> dict[str, Tensor]:
        lengths = lengths_N[rows]
        sample = items[int(rows[0])]
        values = np.zeros((len(rows), max(int(lengths.max()), 1), *sample.shape[1:]), sample.dtype)
        for place, row in enumerate(rows):
            values[place, : lengths[place]] = items[int(row)][: lengths[place]]
        return _ragged_batch(plan, values, lengths)

    return InferenceInputs(_cost(plan, config, lengths_N), take, lengths_N)


class InferenceRunner:
    """Runs a model's tasks without gradients, in bf16 where the device multiplies it natively.

    Args:
        model: put into evaluation mode while it runs, and back afterwards.
        precision: ``auto``, ``bf16``, ``fp32`` or ``fp64``.
        positions: rows x tokens of one batch.
    """

    def __init__(
        self, model: TaskModel, precision: str = "auto", positions: int = POSITIONS
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        double = next(model.parameters()).dtype == torch.float64
        self.precision = choose_precision("fp64" if double else precision, self.device)
        self.positions = positions

    def classify(self, task: str, inputs: InferenceInputs) -> np.ndarray:
        """Probability of each class, (N, C) float32."""
        outputs = find_task(task, self.model.config.tasks).outputs
        out = np.zeros((len(inputs), outputs), dtype=np.float32)
        with self._inference():
            for rows, batch in self._batches(inputs):
                logits = self.model(task, {"input": batch})["logits"]
                out[rows] = torch.softmax(logits.float(), -1).cpu().numpy()
        return out

    def transcribe(self, task: str, inputs: InferenceInputs) -> tuple[list[list[int]], np.ndarray]:
        """Symbols of each row by greedy (best path) CTC decoding, and the path's confidence.

        The confidence is the geometric mean of the path's probabilities, (N,) in (0, 1].
        """
        symbols: list[list[int]] = [[] for _ in range(len(inputs))]
        confidence = np.zeros(len(inputs), dtype=np.float32)
        with self._inference():
            for rows, batch in self._batches(inputs):
                outputs = self.model(task, {"input": batch})
                log_probs, lengths = outputs["log_probs"].float().cpu(), outputs["lengths"].cpu()
                best = log_probs.amax(-1)
                said = greedy_symbols(log_probs, lengths)
                for place, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
                    symbols[row] = said[place]
                    confidence[row] = best[place, : max(length, 1)].mean().exp()
        return symbols, confidence

    def embed(self, task: str, tower: str, inputs: InferenceInputs) -> np.ndarray:
        """Unit vectors of a retrieval task's tower, (N, E) float32."""
        out = np.zeros((len(inputs), self.model.config.embedding_dim), dtype=np.float32)
        with self._inference():
            for rows, batch in self._batches(inputs):
                out[rows] = self.model.embed(task, tower, batch).float().cpu().numpy()
        return out

    def _batches(self, inputs: InferenceInputs) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        for rows in batches_by_length(inputs.lengths, self.positions):
            yield rows, {name: x.to(self.device) for name, x in inputs.take(rows).items()}

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.precision.autocast():
                yield
        finally:
            self.model.train(was_training)


def batches_by_length(lengths: np.ndarray, positions: int) -> Iterator[np.ndarray]:
    """Row numbers in batches of like length, longest first; every row exactly once."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, min(MAX_BATCH_ROWS, positions // max(int(lengths[order[start]]), 1)))
        yield order[start : start + rows]
        start += rows


def mean_input_lengths(towers: Mapping[str, InferenceInputs]) -> dict[str, int]:
    """Tower -> mean length of its rows, for those whose rows differ in length."""
    found = {name: inputs.mean_items for name, inputs in towers.items()}
    return {name: value for name, value in found.items() if value is not None}


def _ragged_batch(plan: SkillPlan, values: np.ndarray, lengths: np.ndarray) -> dict[str, Tensor]:
    if plan.modality == "sound":
        return {"log_mel": torch.from_numpy(values), "frames": torch.from_numpy(lengths)}
    return {"tokens": torch.from_numpy(values.astype(np.int64))}


def _cost(plan: SkillPlan, config: SkillNetConfig, items: np.ndarray) -> np.ndarray:
    return -(-items // config.mel_stack) if plan.modality == "sound" else items


def _tokens_of_one(plan: SkillPlan, config: SkillNetConfig) -> int:
    if plan.modality == "image":
        return (config.image_size // config.patch_size) ** 2
    f, h, w = config.tubelet
    return (config.video_frames // f) * (config.video_size // h) * (config.video_size // w)
