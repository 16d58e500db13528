"""Router: the task that an input belongs to, from counts of the features of training rows.

    input -> buckets ── counts of each task, summed per domain ──> domain, confidence or doubt

A feature is a token, a pair of adjacent tokens, or the signs of random projections of a token of
a stem. It is hashed into one of ``BUCKETS``. The counts of a task are sums over its own rows, so
adding or removing a task adds or removes them exactly: no weight is trained. The likelihood of the
features (naive Bayes) names the domain. Tasks whose rows look alike share a domain, and all of
them answer. Rows that no count has seen calibrate the confidence (decision 81).

Callers: ``pipelines.serving.bundle`` counts rows, ``pipelines.serving.predictor`` asks.

Shapes: B rows, T tokens, D width of a token, F features of a row, H buckets, K tasks or domains,
R rows of all tasks that calibrate.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from skillnet.modality import find_modality
from skillnet.model import SkillNet
from skillnet.multitask_model import Batch, TaskModel
from skillnet.serialization import load_tensors, save_tensors
from skillnet.skills import SkillPlan

#: Start of the names of files with counts.
PREFIX = "inputs-"
BUCKETS = 2**14
#: Tokens of a row that count: the first ones of a text, evenly spaced ones of a medium.
MAX_TOKENS = 64
#: Random projections of a token of a medium: tables of signs, and signs of a table.
TABLES, SIGNS = 2, 12
#: Bucket of a place without a feature.
NO_FEATURE = -1
#: Fraction of right answers among the calibrating rows above the threshold.
WANTED_PRECISION = 0.98
#: Two tasks share a domain if fewer of their rows, on average, fit the right one better. A coin
#: has 0.5, and 100 rows of each deviate by 0.035.
SAME_DOMAIN = 0.6
#: Divisors of the likelihood, of which the calibrating rows choose one: features are dependent.
TEMPERATURES = tuple(2.0 ** (n / 2) for n in range(15))
#: Added to every count: a feature that no row has is rare, not impossible.
ADDED_COUNT = 0.05


@dataclass(frozen=True)
class InputCounts:
    """Features of the rows of one task.

    Args:
        counts: (H,) rows' features in each bucket.
        rows: (B, F) buckets of rows that are not among the counts, ``NO_FEATURE`` at the end.
    """

    counts: np.ndarray
    rows: np.ndarray

    def save(self, path: Path) -> None:
        """Write the counts as a safetensors file."""
        parts = {"counts": self.counts, "rows": self.rows}
        # The reader of models takes floats only; these hold whole numbers below 2**24.
        save_tensors({name: torch.from_numpy(x.astype(np.float32)) for name, x in parts.items()},
                     path)  # fmt: skip


@dataclass(frozen=True)
class RoutedInput:
    """Tasks that answer an input.

    Args:
        tasks: all tasks of its domain; () if the router is unsure.
        confidence: probability of the domain, as calibrated.
        doubt: sentence for the user; "" if tasks answer.
    """

    tasks: tuple[str, ...]
    confidence: float
    doubt: str = ""


def name_counts(task: str) -> str:
    """Return the name of the file with the counts of a task."""
    return f"{PREFIX}{task}.safetensors"


def load_counts(path: Path) -> InputCounts:
    """Read the counts of a task.

    Args:
        path: file that :meth:`InputCounts.save` wrote.

    Raises:
        ValueError: the file is damaged, or holds other numbers.
    """
    found = {name: x.double().numpy() for name, x in load_tensors(path).items()}
    counts, rows = found.get("counts"), found.get("rows")
    if (
        counts is None
        or rows is None
        or counts.shape != (BUCKETS,)
        or rows.ndim != 2
        or (counts < 0).any()
        or not ((rows >= NO_FEATURE) & (rows < BUCKETS) & (rows == np.rint(rows))).all()
    ):
        raise ValueError(f"{path} holds no counts of inputs; export the model again")
    return InputCounts(counts, rows.astype(np.int64))


def count_features(counted: Iterable[np.ndarray], kept: Iterable[np.ndarray]) -> InputCounts:
    """Return the counts of a task.

    Args:
        counted: buckets (B, F) of batches of training rows.
        kept: buckets (B, F) of batches of other rows, which calibrate.
    """
    counts = np.zeros(BUCKETS)
    for buckets_BF in counted:
        counts += np.bincount(buckets_BF[buckets_BF != NO_FEATURE], minlength=BUCKETS)
    batches = list(kept)
    width = max((batch.shape[1] for batch in batches), default=0)
    rows = [
        np.pad(batch, ((0, 0), (0, width - batch.shape[1])), constant_values=NO_FEATURE)
        for batch in batches
    ]
    return InputCounts(counts, np.concatenate(rows) if rows else np.zeros((0, 0), np.int64))


# -- features ------------------------------------------------------------------------------


def find_buckets(model: TaskModel, plan: SkillPlan, batch: Batch) -> np.ndarray | None:
    """Return the buckets (B, F) of the rows of a batch; None if the model has no stem to ask.

    Args:
        model: its stems read media; texts need their tokens only.
        plan: names modality and stem.
        batch: input tensors of the modality.
    """
    if find_modality(plan.modality).reads_tokens:
        return hash_tokens(batch["tokens"].cpu().numpy())
    if not isinstance(model, SkillNet):
        return None
    stem = model.stems[plan.stem]
    some = next(stem.parameters())
    placed = {
        name: x.to(some.device, some.dtype if x.is_floating_point() else None)
        for name, x in batch.items()
    }
    with torch.no_grad():
        x_BTD, mask_BT = stem(placed, plan.modality)
    return hash_vectors(x_BTD, mask_BT)


def hash_tokens(tokens_BT: np.ndarray) -> np.ndarray:
    """Return the buckets (B, 2 T) of tokens and of pairs of adjacent ones.

    Args:
        tokens_BT: token ids; 0 is padding.
    """
    tokens = tokens_BT[:, :MAX_TOKENS].astype(np.uint64)
    before = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    # Number 2**20 is no token, so a token alone has another bucket than a pair.
    alone = _hash_pairs(np.full_like(tokens, 2**20), tokens)
    return _end_padded(np.stack([alone, _hash_pairs(before, tokens)], 2), tokens != 0)


def hash_vectors(x_BTD: Tensor, mask_BT: Tensor | None) -> np.ndarray:
    """Return the buckets of the tokens of a stem, by the signs of random projections.

    Args:
        x_BTD: tokens.
        mask_BT: which of them are real; None if all are.
    """
    T = x_BTD.shape[1]
    chosen = torch.linspace(0, T - 1, min(T, MAX_TOKENS)).long().unique()
    x = x_BTD[:, chosen].float().cpu()
    draw = torch.Generator().manual_seed(TABLES * SIGNS)
    projection = torch.randn(x.shape[2], TABLES * SIGNS, generator=draw)
    signs = (x @ projection > 0).reshape(*x.shape[:2], TABLES, SIGNS).numpy()
    codes = (signs * 2 ** np.arange(SIGNS)).sum(3).astype(np.uint64)
    tables = np.broadcast_to(np.arange(TABLES, dtype=np.uint64) + 2**21, codes.shape)
    real = None if mask_BT is None else mask_BT[:, chosen].cpu().numpy()
    is_real = np.ones(codes.shape[:2], bool) if real is None else real
    return _end_padded(_hash_pairs(tables, codes), is_real)


def _hash_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the buckets of pairs of numbers (Fibonacci hashing)."""
    key = first * np.uint64(2**21) + second
    return (key * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - 14)).astype(np.int64)


def _end_padded(buckets_BTN: np.ndarray, is_real_BT: np.ndarray) -> np.ndarray:
    masked = np.where(is_real_BT[:, :, None], buckets_BTN, NO_FEATURE)
    return masked.reshape(len(masked), -1)


# -- routing -------------------------------------------------------------------------------


class InputRouter:
    """Router of the tasks that read one modality, computed from their counts alone.

    Args:
        counts: task -> features of its rows. The order of the tasks has no influence.
    """

    def __init__(self, counts: Mapping[str, InputCounts]) -> None:
        tasks = sorted(counts)
        groups = self._find_domains([counts[task] for task in tasks])
        #: Tasks of each domain.
        self.domains = [tuple(tasks[i] for i in group) for group in groups]
        self._log_KH = _log_frequencies(
            np.stack([sum(counts[task].counts for task in domain) for domain in self.domains])
        )
        owner = np.concatenate(
            [[k] * len(counts[t].rows) for k, domain in enumerate(self.domains) for t in domain]
        ).astype(np.int64)
        rows = [row for domain in self.domains for t in domain for row in counts[t].rows]
        scores_RK = self._score(rows)
        self.temperature = _choose_temperature(scores_RK, owner)
        chosen, confidence = self._decide(scores_RK)
        self.threshold = _choose_threshold(confidence, chosen == owner)
        # An input that fits its best domain worse than every row of this domain is a foreign one.
        own = scores_RK[np.arange(len(owner)), owner] / _lengths(rows)
        self._lowest_K = [own[owner == k].min(initial=np.inf) for k in range(len(self.domains))]

    @staticmethod
    def _find_domains(counts: Sequence[InputCounts]) -> list[list[int]]:
        """Return groups of tasks that the likelihood cannot distinguish, by their numbers."""
        log_KH = _log_frequencies(np.stack([each.counts for each in counts]))
        # wins[a, b]: fraction of the rows of a that fit a better than b.
        wins = np.full((len(counts), len(counts)), 0.5)
        for a, each in enumerate(counts):
            if len(each.rows):
                found = _sum_features(log_KH, each.rows)
                gap = found[:, [a]] - found
                wins[a] = (gap > 0).mean(0) + (gap == 0).mean(0) / 2
        alike = (wins + wins.T) / 2 < SAME_DOMAIN
        groups: list[list[int]] = []
        for task in range(len(counts)):
            joined = [group for group in groups if alike[task, group].any()]
            groups = [group for group in groups if group not in joined]
            groups.append(sorted([task, *(each for group in joined for each in group)]))
        return sorted(groups)

    def route(self, buckets_F: np.ndarray) -> RoutedInput:
        """Return the tasks that answer an input, or the doubt.

        Args:
            buckets_F: features of the input, from :func:`find_buckets`.
        """
        if len(self.domains) == 1:
            return RoutedInput(self.domains[0], 1.0)
        scores_1K = self._score([buckets_F])
        (best,), (confidence,) = self._decide(scores_1K)
        names = [" and ".join(domain) for domain in self.domains]
        if scores_1K[0, best] / _lengths([buckets_F])[0] < self._lowest_K[best]:
            doubt = f"unlike the inputs of all tasks, nearest to {names[best]}; name the task"
        elif confidence < self.threshold:
            second = int(np.argsort(-scores_1K[0], kind="stable")[1])
            doubt = f"unsure between {names[best]} and {names[second]}; name the task"
        else:
            return RoutedInput(self.domains[best], float(confidence))
        return RoutedInput((), float(confidence), doubt)

    def _score(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Return the log likelihood (R, K) of rows in each domain."""
        found = [_sum_features(self._log_KH, row[None]) for row in rows]
        return np.concatenate([np.zeros((0, len(self.domains))), *found])

    def _decide(self, scores_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the best domain (R,) of rows, and its probability (R,)."""
        if not len(scores_RK):
            return np.zeros(0, np.int64), np.zeros(0)
        return scores_RK.argmax(1), np.exp(_log_softmax(scores_RK / self.temperature)).max(1)


def _log_frequencies(counts_KH: np.ndarray) -> np.ndarray:
    """Return the logarithm of smoothed frequencies, of each row for itself."""
    added_KH = counts_KH + ADDED_COUNT
    found: np.ndarray = np.log(added_KH / added_KH.sum(1, keepdims=True))
    return found


def _sum_features(log_KH: np.ndarray, rows_BF: np.ndarray) -> np.ndarray:
    """Return the sums (B, K) of the log frequencies of rows."""
    padded = np.concatenate([log_KH, np.zeros((len(log_KH), 1))], 1)
    # One row after the other: the bits of a sum must not depend on the other rows.
    return np.array([padded[:, row].sum(1) for row in rows_BF]).reshape(len(rows_BF), len(log_KH))


def _lengths(rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([max((row != NO_FEATURE).sum(), 1) for row in rows], float)


def _log_softmax(scores_RK: np.ndarray) -> np.ndarray:
    shifted = scores_RK - scores_RK.max(1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def _choose_temperature(scores_RK: np.ndarray, owner_R: np.ndarray) -> float:
    """Return the divisor with which the right domains are most probable."""
    if not len(owner_R):
        return 1.0
    rows = np.arange(len(owner_R))
    fits = [_log_softmax(scores_RK / t)[rows, owner_R].mean() for t in TEMPERATURES]
    return TEMPERATURES[int(np.argmax(fits))]


def _choose_threshold(confidence_R: np.ndarray, is_right_R: np.ndarray) -> float:
    """Return the lowest confidence above which enough rows are right, and at least 0.5."""
    order = np.argsort(-confidence_R, kind="stable")
    precision = np.cumsum(is_right_R[order]) / np.arange(1, len(order) + 1)
    enough = np.flatnonzero(precision >= WANTED_PRECISION)
    # Without rows nothing is known about the confidence.
    if not len(enough):
        return float("inf")
    return max(float(confidence_R[order[enough[-1]]]), 0.5)
