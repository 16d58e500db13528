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
from skillnet.config import SkillNetConfig
from skillnet.modality import find_modality
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.shards.dataset import PreparedCorpus

#: Largest number of tokens for k-means, spread evenly over the rows.
MAX_TOKENS = 100_000
KMEANS_ITERATIONS = 50
KMEANS_SEED = 0


class TokenUnits:
    """Mean values of the units, and assignment of tokens to them.

    Args:
        centres_KP: mean values, float32.
    """

    def __init__(self, centres_KP: Tensor) -> None:
        self.centres_KP = centres_KP
        self._squares_K = centres_KP.square().sum(1)

    def __call__(self, x_BTP: Tensor) -> Tensor:
        """Return the (B, T) number of the nearest unit of each token of (B, T, P) values."""
        x = x_BTP.to(self.centres_KP.dtype)
        return (self._squares_K - 2 * x @ self.centres_KP.T).argmin(-1)


_units_by_key: dict[tuple[str, int, int], TokenUnits] = {}


def find_token_units(
    corpus: "PreparedCorpus", splits: tuple[str, ...], model: SkillNetConfig
) -> TokenUnits:
    """Return the units of a corpus, computed once per process.

    Args:
        corpus: opened.
        splits: its splits that pretraining reads.
        model: grid of tokens, and the number of units, K.

    Raises:
        UserError: the rows have fewer complete tokens than that.
    """
    half = find_modality(corpus.modality).tensor_half
    count = half.count_classes(model)
    key = (corpus.digest, half.count_values(model), count)
    if key not in _units_by_key:
        tokens_NP = _collect_tokens(corpus, splits, model)
        if len(tokens_NP) < count:
            raise UserError(
                f"corpus {corpus.name} has {len(tokens_NP)} tokens of {corpus.modality} in "
                f"{'+'.join(splits)}: too few for {count} units; lower model.sound_units"
            )
        _units_by_key[key] = TokenUnits(torch.from_numpy(_means(tokens_NP, count)))
    return _units_by_key[key]


def _collect_tokens(
    corpus: "PreparedCorpus", splits: tuple[str, ...], model: SkillNetConfig
) -> np.ndarray:
    """(N, P) values of complete tokens of padded rows, at most about ``MAX_TOKENS``."""
    modality, parts = find_modality(corpus.modality), []
    half = modality.tensor_half
    for split in splits:
        table = corpus.splits[split].table()
        column = open_column(table, modality.column, f"{corpus.name}/{split}")
        assert isinstance(column, RaggedColumn)
        every = max(1, -(-int(half.count_tokens(model, column.lengths()).sum()) // MAX_TOKENS))
        for rows in np.array_split(np.arange(len(column))[::every], max(1, len(column) // 256)):
            if len(rows):
                batch = half.make_batch(*column.take(rows))
                x = batch[modality.column]
                is_real = half.find_visible(batch).expand(x.shape).to(x.dtype)
                is_complete = half.cut(is_real, model).amin(-1) == 1
                parts.append(half.cut(x, model)[is_complete].numpy())
    return np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


def _means(tokens_NP: np.ndarray, count: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # One thread: the sums of several threads have varying order, and differ in the last bits.
    with threadpool_limits(1):
        kmeans = KMeans(count, n_init=1, max_iter=KMEANS_ITERATIONS, random_state=KMEANS_SEED).fit(
            tokens_NP
        )
    return kmeans.cluster_centers_.astype(np.float32)
