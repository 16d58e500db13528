"""Batched inference of a trained model: rows are grouped by length, outputs keep the row order.

:func:`split_inputs` reads prepared shards, :func:`memory_inputs` reads arrays, and
:class:`InferenceRunner` runs the tasks. Evaluation, prediction and search use them.

Shapes: N rows, C classes, E width of the retrieval space.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.data.shards.columns import (
    NestedRaggedColumn,
    RaggedColumn,
    open_column,
)
from pipelines.data.shards.id_columns import TOKEN_COLUMNS, IdRange, check_ids
from pipelines.training.config.data import MaskConfig
from pipelines.training.config.run import TaskTraining
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loading.task_dataset import TaskDataset
from skillnet.config import SkillNetConfig
from skillnet.keyed_random import BatchRandom
from skillnet.modality import find_modality
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.objectives.ctc import CTCHead
from skillnet.objectives.heads import head_class, mean_pool
from skillnet.precision import choose_precision, find_device
from skillnet.skills import SkillPlan, find_task

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus

T = TypeVar("T")

#: Bytes of a result that are on the device at a time while ranks exchange it.
EXCHANGED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class EvaluationRanks:
    """Processes that evaluate together, seen from one of them.

    Args:
        rank: index of this process, from 0. The first one computes the metrics.
        world: number of processes; several have joined the process group of torch.
        device: on which the process group exchanges tensors.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this rank computes and records the metrics."""
        return self.rank == 0

    def select(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches of this rank: every ``world``-th one."""
        return islice(batches, self.rank, None, self.world)

    def merge(self, rows_N: np.ndarray) -> np.ndarray:
        """Return the rows of all ranks; every rank calls this for the same results.

        Args:
            rows_N: (N, …) rows that this rank computed, and zeros for all others.
        """
        if self.world == 1:
            return rows_N
        # A sum with zeros keeps the bits of a row, and needs neither pickle nor equal parts.
        step = max(1, EXCHANGED_BYTES // max(rows_N[:1].nbytes, 1))
        merged = np.empty_like(rows_N)
        for start in range(0, len(rows_N), step):
            part = torch.from_numpy(rows_N[start : start + step]).to(self.device, copy=True)
            dist.all_reduce(part)
            merged[start : start + step] = part.cpu().numpy()
        return merged

    def merge_sequences(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the sequences of all ranks; every rank calls this for the same results.

        Args:
            rows: N sequences; this rank's own, and empty ones for all others.
        """
        if self.world == 1:
            return [list(row) for row in rows]
        lengths_N = self.merge(np.array([len(row) for row in rows], dtype=np.int64))
        padded_NL = np.zeros((len(rows), int(lengths_N.max(initial=0))), dtype=np.int32)
        for index, row in enumerate(rows):
            padded_NL[index, : len(row)] = row
        merged_NL = self.merge(padded_NL)
        return [
            row[:length].tolist() for row, length in zip(merged_NL, lengths_N.tolist(), strict=True)
        ]

    def is_any(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank; every rank calls this at the same place."""
        return bool(self.merge(np.array([flag], dtype=np.int64)).any())


#: Type of device -> rows x tokens of one batch, and rows of one batch. On a CPU a batch is large
#: enough for two cores and small in memory. A GPU computes 4096 tokens faster than the host reads
#: the next batch, and has memory for sixteen times as many.
BATCH_LIMITS = {"cpu": (4096, 512), "cuda": (65_536, 4096)}


@dataclass(frozen=True)
class InferenceInputs:
    """Input of one tower for N rows.

    Args:
        lengths: (N,) tokens of each row in the encoder.
        load_batch: maps row numbers to the tower's batch.
        row_lengths: (N,) length of each row in its own unit (tokens or frames); None if all rows
            have one size.
        owners: (N,) row of the split that each query belongs to; None if each row has one query.
    """

    lengths: np.ndarray
    load_batch: Callable[[np.ndarray], dict[str, Tensor]]
    row_lengths: np.ndarray | None = None
    owners: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)


def split_inputs(
    table: pa.Table,
    plan: SkillPlan,
    config: SkillNetConfig,
    where: str,
    *,
    column: str | None = None,
    all_captions: bool = False,
    limit: int | None = None,
) -> InferenceInputs:
    """Return the input of a tower from a prepared split.

    Args:
        table: rows of the split, memory-mapped.
        plan: active skills of the tower; its modality selects the column.
        config: shape of the model, for its limits.
        where: corpus and split, for error messages.
        column: that the tower reads, see
            :func:`pipelines.training.loading.task_columns.tower_column`; of captions the first one
            of each row. None takes the column of the modality.
        all_captions: read every caption of each row, in order.
        limit: maximum row length in tokens or frames; the model's own limit applies if it is lower.

    Raises:
        UserError: the column is missing, or a token is outside of the model's vocabulary.
    """
    modality = find_modality(plan.modality)
    half, name = modality.tensor_half, column or modality.column
    vocabulary = IdRange(
        f"the model's vocabulary has {config.vocab_size} tokens", config.vocab_size
    )
    ranges = {name: vocabulary} if name in TOKEN_COLUMNS else {}
    opened = open_column(table, name, where, ranges.get(name))
    check_ids(
        table,
        ranges,
        where,
        "Evaluate on a corpus that was prepared with the model's tokenizer.",
    )
    longest = min(half.find_longest(config) or 1 << 30, limit or 1 << 30)
    owners: np.ndarray | None = None
    if isinstance(opened, NestedRaggedColumn):
        firsts = opened.first(np.arange(len(table)))
        if all_captions:
            counts = opened.counts(np.arange(len(table)))
            owners = np.repeat(np.arange(len(table)), counts)
            firsts = np.concatenate(
                [np.arange(f, f + n) for f, n in zip(firsts, counts, strict=True)]
            )
        opened = opened.inner
    else:
        firsts = np.arange(len(table))
    if isinstance(opened, RaggedColumn):
        ragged = opened
        # Rows are cut at the limit when they are read, so batches and costs use the cut lengths.
        row_lengths = np.minimum(ragged.lengths(firsts), longest)

        # Only one batch is copied into memory; the split itself stays memory-mapped.
        def load_batch(rows: np.ndarray) -> dict[str, Tensor]:
            values, lengths = ragged.take(firsts[rows], limit=longest)
            return half.make_batch(values, lengths)

        tokens = half.count_tokens(config, row_lengths)
        return InferenceInputs(tokens, load_batch, row_lengths, owners)
    fixed = opened
    assert not isinstance(fixed, NestedRaggedColumn)
    return InferenceInputs(
        np.full(len(table), half.count_tokens(config)),
        lambda rows: half.make_batch(fixed.take(rows)),
    )


def memory_inputs(
    items: Sequence[np.ndarray], plan: SkillPlan, config: SkillNetConfig
) -> InferenceInputs:
    """Return the input of a tower from arrays in memory.

    Args:
        items: one array per row, as a transform returns it. Text and code: (T,) token ids. Audio:
            (frames, mels). Images: (H, W, 3) uint8. Video: (N, H, W, C) uint8.
        plan: active skills of the tower.
        config: shape of the model, for its limits.
    """
    half = find_modality(plan.modality).tensor_half
    longest = half.find_longest(config)
    if longest is None:
        return InferenceInputs(
            np.full(len(items), half.count_tokens(config)),
            lambda rows: half.make_batch(np.stack([items[row] for row in rows])),
        )
    lengths_N = np.array([min(len(item), longest) for item in items], dtype=np.int64)

    def load_batch(rows: np.ndarray) -> dict[str, Tensor]:
        lengths = lengths_N[rows]
        sample = items[int(rows[0])]
        # An empty text keeps one column of padding, because an encoder needs at least one token.
        values = np.zeros((len(rows), max(int(lengths.max()), 1), *sample.shape[1:]), sample.dtype)
        for index, row in enumerate(rows):
            values[index, : lengths[index]] = items[int(row)][: lengths[index]]
        return half.make_batch(values, lengths)

    return InferenceInputs(half.count_tokens(config, lengths_N), load_batch, lengths_N)


class InferenceRunner:
    """Inference of a model's tasks without gradients, in bf16 if the device supports it natively.

    With several ranks each infers a part of the batches, all must call the same methods in the
    same order, and every rank gets the results of all rows.

    Args:
        model: set to evaluation mode during inference; its mode is restored afterwards.
        precision: ``auto``, ``bf16``, ``fp32`` or ``fp64``.
        max_batch_tokens: rows x tokens of one batch; None takes the limit of the device.
        ranks: that infer together; None is this process alone.
    """

    def __init__(
        self,
        model: TaskModel,
        precision: str = "auto",
        max_batch_tokens: int | None = None,
        ranks: EvaluationRanks | None = None,
    ) -> None:
        self.model = model
        self.device = find_device(model.parameters())
        # Autocast would round away the digits for which float64 weights were chosen.
        double = next(model.parameters()).dtype == torch.float64
        self.precision = choose_precision("fp64" if double else precision, self.device)
        tokens, self.max_batch_rows = BATCH_LIMITS.get(self.device.type, BATCH_LIMITS["cpu"])
        self.max_batch_tokens = max_batch_tokens or tokens
        self.ranks = ranks or EvaluationRanks()

    def predict_rows(self, task: str, inputs: InferenceInputs) -> np.ndarray:
        """Return the predictions of the head, (N, outputs) float32.

        They are probabilities of classes, or the values of a regression in their own unit.

        Args:
            task: a task with predictions per row: classification, labels, numbers, or a task of a
                third party's objective.
            inputs: batch of its tower, N rows.
        """
        spec, config = find_task(task, self.model.config.tasks), self.model.config
        head = head_class(spec)
        mean, deviation = self.model.vocabulary.scales.get(task, (0.0, 1.0))
        merged = self._infer_rows(
            inputs,
            head.count_outputs(config, spec, 1),
            lambda batch: head.predict(self.model(task, {spec.row_tower: batch})),
        )
        if task not in self.model.vocabulary.scales:
            return merged
        # In double precision: a large mean would round small differences away.
        return mean + deviation * merged.astype(np.float64)

    def transcribe(self, task: str, inputs: InferenceInputs) -> tuple[list[list[int]], np.ndarray]:
        """Return the symbols of each row by greedy (best path) CTC decoding, and a confidence.

        Args:
            task: a CTC task.
            inputs: batch of its tower, N rows.

        Returns:
            Symbol sequences, and the geometric mean of the path's probabilities, (N,) in (0, 1].
        """
        spec = find_task(task, self.model.config.tasks)
        head = head_class(spec)
        assert issubclass(head, CTCHead)
        symbols: list[list[int]] = [[] for _ in range(len(inputs))]
        confidence = np.zeros(len(inputs), dtype=np.float32)

        def transcribe_batch(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
            outputs = self.model(task, {spec.row_tower: batch})
            return outputs["log_probs"].float(), outputs["lengths"]

        for rows, (log_probs, lengths) in self._infer(inputs, transcribe_batch):
            found = head.decode(log_probs, lengths)
            confidence[rows] = found.confidence
            for row, symbols_of_row in zip(rows, found.symbols, strict=True):
                symbols[row] = list(symbols_of_row)
        return self.ranks.merge_sequences(symbols), self.ranks.merge(confidence)

    def embed(
        self,
        task: str,
        tower: str,
        inputs: InferenceInputs,
        on_rows: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Return the unit vectors of a retrieval tower, (N, E) float32.

        Args:
            task: a retrieval task.
            tower: ``query`` or ``candidate``.
            inputs: batch of the tower, N rows.
            on_rows: called with the number of rows of each batch that is done.
        """
        width = self.model.config.embedding_dim
        return self._infer_rows(
            inputs, width, lambda batch: self.model.embed(task, tower, batch).float(), on_rows
        )

    def pool(self, task: str, tower: str, inputs: InferenceInputs) -> np.ndarray:
        """Return the means of the encoded real tokens of a tower, (N, D) float32.

        Args:
            task: name of the task.
            tower: tower of the task, such as ``query``.
            inputs: batch of the tower, N rows.
        """
        return self._infer_rows(
            inputs,
            self.model.config.dim,
            lambda batch: mean_pool(*self.model.tower_tokens(task, tower, batch)).float(),
        )

    def _infer_rows(
        self,
        inputs: InferenceInputs,
        width: int,
        infer_batch: Callable[[dict[str, Tensor]], Tensor],
        on_rows: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Return the (N, width) float32 results of all rows, of which each rank infers a part."""
        out = np.zeros((len(inputs), width), dtype=np.float32)
        for rows, (found,) in self._infer(inputs, lambda batch: (infer_batch(batch),)):
            out[rows] = found.numpy()
            if on_rows is not None:
                on_rows(len(rows))
        return self.ranks.merge(out)

    def _infer(
        self,
        inputs: InferenceInputs,
        infer_batch: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    ) -> Iterator[tuple[np.ndarray, tuple[Tensor, ...]]]:
        """Yield the rows of each batch of this rank, and its results in the host's memory.

        A GPU computes a batch while the host reads the next one: a result is waited for only after
        the next batch has been sent.
        """
        batches = batches_by_length(inputs.lengths, self.max_batch_tokens, self.max_batch_rows)
        waiting: tuple[np.ndarray, tuple[Tensor, ...], Callable[[], None]] | None = None
        with self.inference():
            for rows in self.ranks.select(batches):
                batch = send_batch(inputs.load_batch(rows), self.device)
                results, wait = fetch_results(infer_batch(batch))
                if waiting is not None:
                    waiting[2]()
                    yield waiting[0], waiting[1]
                waiting = rows, results, wait
            if waiting is not None:
                waiting[2]()
                yield waiting[0], waiting[1]

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Compute without gradients, in the precision and without dropout, in a block."""
        was_training = self.model.training
        # Setting the mode walks over all modules, which a server would do for each request.
        if was_training:
            self.model.eval()
        try:
            with torch.no_grad(), self.precision.autocast():
                yield
        finally:
            # Training runs evaluate between two steps and must find the mode that they left.
            if was_training:
                self.model.train()


def send_batch(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return a batch on a device; the host does not wait for a copy to a GPU.

    Args:
        batch: name -> tensor in the host's memory.
        device: device of the model, such as ``cuda:0``.
    """
    if device.type != "cuda":
        return {name: x.to(device) for name, x in batch.items()}
    # Only a copy from pinned memory runs beside the host.
    return {name: x.pin_memory().to(device, non_blocking=True) for name, x in batch.items()}


def fetch_results(results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Start to copy results to the host.

    Args:
        results: tensors on one device.

    Returns:
        The results in the host's memory, and a function that waits until they are there.
    """
    if results[0].device.type != "cuda":
        return tuple(x.cpu() for x in results), lambda: None
    copies = tuple(x.to("cpu", non_blocking=True) for x in results)
    copied = torch.cuda.Event()
    copied.record()
    return copies, copied.synchronize


def batches_by_length(
    lengths: np.ndarray, max_batch_tokens: int, max_batch_rows: int = BATCH_LIMITS["cpu"][1]
) -> Iterator[np.ndarray]:
    """Yield row numbers in batches of similar length, longest first; every row exactly once.

    Args:
        lengths: (N,) tokens of each row.
        max_batch_tokens: rows x tokens of one batch. A batch has at least one row.
        max_batch_rows: rows of one batch.
    """
    # Longest first, so that a lack of memory shows in the first batch. The stable order gives the
    # same batches, and therefore the same bits, in every evaluation.
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        rows = max(1, min(max_batch_rows, max_batch_tokens // longest))
        yield order[start : start + rows]
        start += rows


def mean_row_lengths(towers: Mapping[str, InferenceInputs]) -> dict[str, int]:
    """Return the mean row length of each tower whose rows differ in length.

    Args:
        towers: tower -> its inputs.
    """
    return {
        name: max(round(float(inputs.row_lengths.mean())), 1)
        for name, inputs in towers.items()
        if inputs.row_lengths is not None and len(inputs.row_lengths)
    }


#: Rows of one forward pass.
BATCH_ROWS = 64


def measure_hidden(
    runner: InferenceRunner,
    task: str,
    corpus: "PreparedCorpus",
    split: str,
    masks: MaskConfig | None,
    limit: int | None,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Return per-row metrics of a masked task: loss, and accuracy for discrete tokens.

    Args:
        runner: inference with the model on all ranks, each of which computes its share of the rows.
        task: a masked task of the model.
        corpus: shards of the task.
        split: name of the split.
        masks: mask settings.
        limit: maximum row length in tokens or frames.

    Returns:
        The primary metric (N,), and ``masked_accuracy`` (N,) if the targets are token ids. Tower ->
        mean length of its rows if these differ; masks hide tokens but do not remove them.
    """
    model, settings = runner.model, TaskTraining(corpus.name, split=split, max_length=limit)
    spec, dtype = find_task(task, model.config.tasks), next(model.parameters()).dtype
    dataset, head = TaskDataset(task, spec, corpus, model.config, settings, masks), head_class(spec)
    rows_N = np.arange(dataset.num_rows)
    # Loss, accuracy, and whether the task has an accuracy, which a rank without rows cannot know.
    values_N3 = np.zeros((len(rows_N), 3))
    for start in runner.ranks.select(range(0, len(rows_N), BATCH_ROWS)):
        part = rows_N[start : start + BATCH_ROWS]
        # The key of the generator is constant, so that each evaluation masks the same tokens.
        draws = BatchRandom(("evaluation", start), len(part), slice(None))
        towers, targets, changes = dataset.load(part, draws)
        batch = Batch(task, towers, targets, part, len(part), changes=changes)
        if runner.device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(runner.device, dtype)
        with runner.inference():
            outputs = model(task, batch.towers)
        losses_B, hits_B = head.score_hidden(outputs, batch.targets)
        values_N3[part, 0] = losses_B.double().cpu().numpy()
        if hits_B is not None:
            values_N3[part, 1] = hits_B.cpu().numpy()
            values_N3[part, 2] = 1.0
    values_N3 = runner.ranks.merge(values_N3)
    metrics = {find_objective(spec.objective).primary.name: values_N3[:, 0]}
    if values_N3[:, 2].any():
        metrics["masked_accuracy"] = values_N3[:, 1]
    lengths = dataset.row_lengths(rows_N)
    mean = {} if lengths is None else {spec.row_tower: max(round(float(lengths.mean())), 1)}
    return metrics, mean
