"""Units of sound: what masked sound may be asked for in place of frames.

A unit is the nearest of K mean stacks of log-mel frames, found by k-means over the recordings
that pretraining reads (source: HuBERT, Hsu et al. 2021, whose first units are 100 clusters of
MFCCs; log-mel frames are what our shards hold). Frames regressed by squared error ask above all
for what is loud; units ask which kind of sound it is, as CTC will.

The units hang on the corpus alone, so every run, rank and evaluation finds the same.
Shapes: N stacks, T tokens, P values of a stack, K units.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines.shards.columns import RaggedColumn, open_column
from skillnet.stems import stack_frames
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.shards.dataset import PreparedCorpus

#: Stacks that the means are found from at most, spread evenly over the recordings.
MOST_STACKS = 100_000
ROUNDS = 50
SEED = 0


class SoundUnits:
    """The mean stacks of the units, and which unit is nearest to a stack.

    Args:
        centres_KP: mean stacks, float32.
    """

    def __init__(self, centres_KP: Tensor) -> None:
        self.centres_KP = centres_KP
        self._squares_K = centres_KP.square().sum(1)

    def __call__(self, x_BTP: Tensor) -> Tensor:
        """(B, T) number of the nearest unit of each stack of frames."""
        x = x_BTP.to(self.centres_KP.dtype)
        return (self._squares_K - 2 * x @ self.centres_KP.T).argmin(-1)


_known: dict[tuple[str, int, int], SoundUnits] = {}


def units_of(
    corpus: "PreparedCorpus", splits: tuple[str, ...], stack: int, count: int
) -> SoundUnits:
    """The units of a corpus of recordings; found once in a process.

    Args:
        corpus: opened.
        splits: its splits that pretraining reads.
        stack: frames joined into one token.
        count: number of units, K.

    Raises:
        UserError: its recordings have fewer whole stacks than that.
    """
    key = (corpus.digest, stack, count)
    if key not in _known:
        stacks_NP = _stacks(corpus, splits, stack)
        if len(stacks_NP) < count:
            raise UserError(
                f"corpus {corpus.name} has {len(stacks_NP)} tokens of sound in {'+'.join(splits)}: "
                f"too few for {count} units; lower model.sound_units"
            )
        _known[key] = SoundUnits(torch.from_numpy(_means(stacks_NP, count)))
    return _known[key]


def _stacks(corpus: "PreparedCorpus", splits: tuple[str, ...], stack: int) -> np.ndarray:
    """(N, P) whole stacks of the recordings, at most ``MOST_STACKS``."""
    parts = []
    for split in splits:
        column = open_column(corpus.splits[split].table(), "log_mel", f"{corpus.name}/{split}")
        assert isinstance(column, RaggedColumn)
        total = int((column.lengths() // stack).sum())
        every = max(1, -(-total // MOST_STACKS))
        for rows in np.array_split(np.arange(len(column))[::every], max(1, len(column) // 256)):
            if len(rows):
                frames, lengths = column.take(rows)
                cut = stack_frames(torch.from_numpy(frames), stack).numpy()
                whole = np.arange(cut.shape[1]) < (lengths // stack)[:, None]
                parts.append(cut[whole])
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


def _means(stacks_NP: np.ndarray, count: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # One thread: sums of several, in another order each time, would differ in the last digits.
    with threadpool_limits(1):
        found = KMeans(count, n_init=1, max_iter=ROUNDS, random_state=SEED).fit(stacks_NP)
    return found.cluster_centers_.astype(np.float32)
