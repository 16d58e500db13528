"""Stochastic depth: which rows of a step compute which residual branches (Huang et al. 2016).

A step keeps a fixed number of its rows for each branch, in the form of DINOv2. The draw is one of
the whole step: seed and position of a row decide, and not the rank or the micro-batch that computes
it. :func:`place_rows` states the position. The encoder calls :func:`draw_kept_rows`.

Shapes: B rows of a forward pass, L layers, N rows of the step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skillnet.gpu_kernels import uses_gpu_kernels

#: Largest ``model.drop_path`` at which GPUs compute dropped rows too and give them the weight 0: up
#: to here, leaving rows out costs more in copies than it saves (the limit of DINOv2).
MASKED_DROP_PATH = 0.1


class StepRows(NamedTuple):
    """Position of a forward pass in its step.

    Args:
        generator: source of random numbers of the step, on the host; each tower draws from it in
            turn.
        total: rows N of all ranks and micro-batches.
        first: position of the first row.
    """

    generator: np.random.Generator
    total: int
    first: int


class KeptRows(NamedTuple):
    """Rows that compute a residual branch, and the factor of their result.

    Args:
        rows: (kept,) row numbers, int64.
        scale: N / kept rows of the step. It is 0 if the step keeps none of these rows; then one of
            them is computed, so that its rank takes part in all collective operations.
    """

    rows: Tensor
    scale: float


#: Draw of one layer: the rows of both branches, or weights (2, B, 1, 1) of all rows.
LayerDraw = tuple[KeptRows, KeptRows] | Tensor

_step_rows: ContextVar[StepRows | None] = ContextVar("step_rows", default=None)


@contextmanager
def place_rows(seed: int, total: int, first: int) -> Iterator[None]:
    """State which rows of a step the forward passes inside the block compute.

    Args:
        seed: start of the random numbers of the step, equal on all ranks.
        total: rows of all ranks and micro-batches.
        first: position of the first row.
    """
    token = _step_rows.set(StepRows(np.random.default_rng(seed), total, first))
    try:
        yield
    finally:
        _step_rows.reset(token)


def draw_kept_rows(
    x_BTD: Tensor, layers: int, drop_path: float, is_masked: bool | None = None
) -> list[LayerDraw] | None:
    """Draw the rows that compute the residual branches of each layer.

    Outside of :func:`place_rows` the rows are a step of their own, drawn by torch's generator.

    Args:
        x_BTD: tokens.
        layers: number of layers.
        drop_path: probability of dropping a branch of a row.
        is_masked: compute dropped rows too, and give them the weight 0; None does so on GPUs up to
            :data:`MASKED_DROP_PATH`.

    Returns:
        None if no row is dropped.
    """
    B = x_BTD.shape[0]
    step = _step_rows.get()
    total, first = (B, 0) if step is None else (step.total, step.first)
    kept = count_kept_rows(total, drop_path)
    if kept == total:
        return None
    # The host draws, so it knows the numbers of rows, and devices agree. The order of random
    # numbers is a random order, so the step keeps exactly `kept` rows.
    generator = np.random.default_rng(_draw_seed()) if step is None else step.generator
    ranks_L2N = generator.random((layers, 2, total), dtype=np.float32).argsort(-1)
    kept_L2B = (ranks_L2N < kept)[..., first : first + B]
    scale = total / kept
    if is_masked is None:
        is_masked = drop_path <= MASKED_DROP_PATH and uses_gpu_kernels(x_BTD)
    if is_masked:
        weights_L2B11 = torch.from_numpy(kept_L2B[..., None, None] * scale)
        return list(_move(weights_L2B11, x_BTD).to(x_BTD.dtype).unbind())
    return [
        (_select(attention_B, scale, x_BTD), _select(feedforward_B, scale, x_BTD))
        for attention_B, feedforward_B in kept_L2B
    ]


def _draw_seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_())


def _select(kept_B: np.ndarray, scale: float, x_BTD: Tensor) -> KeptRows:
    (rows,) = kept_B.nonzero()
    if not len(rows):
        rows, scale = np.zeros(1, dtype=np.int64), 0.0
    return KeptRows(_move(torch.from_numpy(rows), x_BTD), scale)


def _move(values: Tensor, x_BTD: Tensor) -> Tensor:
    """Copy a small tensor of the host to the device of the tokens, without a wait on GPUs."""
    if x_BTD.device.type == "cuda":
        values = values.pin_memory()
    return values.to(x_BTD.device, non_blocking=True)


def count_kept_rows(rows: int, drop_path: float) -> int:
    """Return the number of rows that keep a branch: at least one, so that its weights learn.

    Args:
        rows: number of rows in the step.
        drop_path: probability of dropping a branch of a row.
    """
    return max(round(rows * (1 - drop_path)), 1)
