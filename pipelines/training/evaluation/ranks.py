"""Ranks that evaluate a split together: each infers a part of the batches, all get all results.

The batches are those of one process, and rank r of W infers batches r, r + W, r + 2 W, … A result
therefore has the same bits at every number of ranks of equal devices.
:class:`pipelines.training.evaluation.inference.InferenceRunner` and
:mod:`pipelines.training.evaluation.masked` use the ranks; workers of a run create them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

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
