"""Units of sound: discrete targets of masked sound, as an alternative to frames.

A unit is the nearest of K mean stacks of log-mel frames, found by k-means over the audio of
pretraining (source: HuBERT, Hsu et al. 2021, whose first units are 100 clusters of MFCCs; our
shards hold log-mel frames). Regression of frames by squared error rewards loud parts most; units
identify the kind of sound, as CTC does later.

The units depend only on the corpus, so every run, rank and evaluation has the same.
Shapes: N stacks, T tokens, P values of a stack, K units.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines.data.shards.columns import RaggedColumn, open_column
from skillnet.stems import stack_frames
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus

#: Largest number of stacks for k-means, spread evenly over the audio.
MAX_STACKS = 100_000
KMEANS_ITERATIONS = 50
KMEANS_SEED = 0


class SoundUnits:
    """Mean stacks of the units, and assignment of stacks to them.

    Args:
        centres_KP: mean stacks, float32.
    """

    def __init__(self, centres_KP: Tensor) -> None:
        self.centres_KP = centres_KP
        self._squares_K = centres_KP.square().sum(1)

    def __call__(self, x_BTP: Tensor) -> Tensor:
        """Return the (B, T) number of the nearest unit of each (B, T, P) stack of frames."""
        x = x_BTP.to(self.centres_KP.dtype)
        return (self._squares_K - 2 * x @ self.centres_KP.T).argmin(-1)


_units_by_key: dict[tuple[str, int, int], SoundUnits] = {}


def find_sound_units(
    corpus: "PreparedCorpus", splits: tuple[str, ...], stack: int, count: int
) -> SoundUnits:
    """Return the units of an audio corpus, computed once per process.

    Args:
        corpus: opened.
        splits: its splits that pretraining reads.
        stack: frames joined into one token.
        count: number of units, K.

    Raises:
        UserError: the audio has fewer complete stacks than that.
    """
    key = (corpus.digest, stack, count)
    if key not in _units_by_key:
        stacks_NP = _stacks(corpus, splits, stack)
        if len(stacks_NP) < count:
            raise UserError(
                f"corpus {corpus.name} has {len(stacks_NP)} tokens of sound in {'+'.join(splits)}: "
                f"too few for {count} units; lower model.sound_units"
            )
        _units_by_key[key] = SoundUnits(torch.from_numpy(_means(stacks_NP, count)))
    return _units_by_key[key]


def _stacks(corpus: "PreparedCorpus", splits: tuple[str, ...], stack: int) -> np.ndarray:
    """(N, P) complete stacks of the audio, at most ``MAX_STACKS``."""
    parts = []
    for split in splits:
        column = open_column(corpus.splits[split].table(), "log_mel", f"{corpus.name}/{split}")
        assert isinstance(column, RaggedColumn)
        total = int((column.lengths() // stack).sum())
        every = max(1, -(-total // MAX_STACKS))
        for rows in np.array_split(np.arange(len(column))[::every], max(1, len(column) // 256)):
            if len(rows):
                frames, lengths = column.take(rows)
                cut = stack_frames(torch.from_numpy(frames), stack).numpy()
                is_complete = np.arange(cut.shape[1]) < (lengths // stack)[:, None]
                parts.append(cut[is_complete])
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


def _means(stacks_NP: np.ndarray, count: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # One thread: the sums of several threads have varying order, and differ in the last bits.
    with threadpool_limits(1):
        kmeans = KMeans(count, n_init=1, max_iter=KMEANS_ITERATIONS, random_state=KMEANS_SEED).fit(
            stacks_NP
        )
    return kmeans.cluster_centers_.astype(np.float32)
