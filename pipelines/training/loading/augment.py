"""Random augmentation of training rows, a batch at a time.

Every function takes random numbers of its rows (:class:`BatchRandom`), so that a row gets the same
change for any number of workers. :mod:`pipelines.training.loading.pixel_changes` changes images and
videos.
Shapes: B rows, T tokens, N frames, M mel bins.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from pipelines.training.config.data import AugmentConfig
from pipelines.training.loading.rng import draw_uniform, keyed_rng

MASK_TOKEN = 2


class BatchRandom:
    """Random numbers of one global batch; a rank sees those of its rows.

    Args:
        key: seed, purpose and step, which determine the numbers.
        count: rows of the global batch.
        part: this rank's rows among them.
    """

    def __init__(self, key: Sequence[int | str], count: int, part: slice) -> None:
        self._key, self._count, self._part = tuple(key), count, part

    def branch(self, name: str) -> "BatchRandom":
        """Return independent random numbers of the same rows, for a second change of them."""
        return BatchRandom((*self._key, name), self._count, self._part)

    def uniform(self, name: str, *shape: int) -> np.ndarray:
        """Return (B, *shape) float32 in [0, 1). ``shape`` must not depend on the rank's rows."""
        start, stop, _ = self._part.indices(self._count)
        each = math.prod(shape)
        # The numbers of other ranks' rows are skipped, so that the cost is that of these rows.
        numbers = draw_uniform((*self._key, name), start * each, (stop - start) * each)
        return numbers.reshape(stop - start, *shape)


def drop_tokens(
    tokens_BT: np.ndarray, lengths_B: np.ndarray, share: float, random: BatchRandom, longest: int
) -> np.ndarray:
    """Replace a fraction of the tokens by the mask token; the last real token of a row stays.

    Args:
        tokens_BT: token ids.
        lengths_B: real tokens of each row.
        share: fraction to replace.
        random: random numbers of these rows, keyed by seed, step and row.
        longest: largest number of tokens of any row; it does not depend on the batch.

    Returns:
        (B, T) token ids.
    """
    if share <= 0:
        return tokens_BT
    width = tokens_BT.shape[1]
    chance = random.uniform("tokens", longest)[:, :width]
    hit = (chance < share) & (np.arange(width) < lengths_B[:, None] - 1)
    return np.where(hit, MASK_TOKEN, tokens_BT)


def augment_audio(
    log_mel_BNM: np.ndarray,
    frames_B: np.ndarray,
    config: AugmentConfig,
    random: BatchRandom,
    longest: int,
    deviation: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Pad with silence, change level, add noise and mask spans of log-mel audio.

    Noise adds to the power: log(exp(speech) + exp(noise)). Silence is the quietest value of the
    audio per mel bin. Masks are those of SpecAugment (Park et al. 2019), filled with silence.

    Args:
        log_mel_BNM: natural log of power divided by ``deviation``, minus a constant; zero after
            the end of a row.
        frames_B: (B,) real frames.
        config: largest changes.
        random: random numbers of these rows, keyed by seed, step and row.
        longest: largest number of frames that the model reads.
        deviation: divisor of the log of power in the corpus.

    Returns:
        (B, N', M) float32 and (B,) frames, silence included.
    """
    real = np.arange(log_mel_BNM.shape[1]) < frames_B[:, None]
    quiet_BM = np.min(log_mel_BNM, axis=1, where=real[..., None], initial=np.inf)
    level = random.uniform("sound", 5)
    front = np.floor(level[:, 0] * (config.sound_pad + 1)).astype(np.int64)
    behind = np.floor(level[:, 1] * (config.sound_pad + 1)).astype(np.int64)
    # Padding must not push the end of the audio out of the model's limit.
    front = np.minimum(front, np.maximum(longest - frames_B, 0))
    total = np.minimum(frames_B + front + behind, longest)
    width = int(total.max())
    source = np.arange(width) - front[:, None]
    inside = (source >= 0) & (source < frames_B[:, None])
    rows = np.arange(len(frames_B))[:, None]
    x = log_mel_BNM[rows, np.clip(source, 0, log_mel_BNM.shape[1] - 1)]
    np.copyto(x, quiet_BM[:, None], where=~inside[..., None])
    if config.sound_gain:
        x += config.sound_gain * (2 * level[:, 2, None, None] - 1)
    if config.sound_noise:
        # A window of a fixed noise signal. Its level is uniform over the 30 dB below the loudest
        # level, relative to the mean log power of the audio.
        mean_B = np.where(inside, x.mean(2), 0).sum(1) / np.maximum(inside.sum(1), 1)
        loudness_B = mean_B * deviation + np.log(config.sound_noise) - 6.9 * level[:, 3]
        bank = _noise(x.shape[2])
        start_B = np.floor(level[:, 4] * (len(bank) - longest)).astype(np.int64)
        noise = bank[start_B[:, None] + np.arange(width)] + loudness_B[:, None, None]
        x = _add_powers(x, noise.astype(np.float32), deviation)
    _mask_spans(x, total, config, random, quiet_BM)
    x[np.arange(width) >= total[:, None]] = 0
    return x.astype(np.float32, copy=False), total


@lru_cache(maxsize=4)
def _noise(bins: int) -> np.ndarray:
    """(4096, bins) natural log of the power of white noise of mean power 1."""
    power = keyed_rng("noise").standard_exponential((4096, bins), dtype=np.float32)
    return np.log(power + 1e-3)


def _add_powers(x: np.ndarray, noise: np.ndarray, deviation: float) -> np.ndarray:
    # The kernel of torch is ten times as fast as that of numpy.
    total = torch.logaddexp(torch.from_numpy(x) * deviation, torch.from_numpy(noise))
    return (total / deviation).numpy()


def _mask_spans(
    x_BNM: np.ndarray,
    frames_B: np.ndarray,
    config: AugmentConfig,
    random: BatchRandom,
    fill_BM: np.ndarray,
) -> None:
    """Silence random spans of frames and bands of bins, in place."""
    bins = np.arange(x_BNM.shape[2])
    frames = np.arange(x_BNM.shape[1])
    hit = np.zeros(x_BNM.shape, dtype=bool)
    for index in range(config.time_masks):
        draw = random.uniform(f"time{index}", 2)
        span = draw[:, 0] * np.minimum(config.time_mask_frames, frames_B / 5)
        start = draw[:, 1] * (frames_B - span)
        inside = (frames >= start[:, None]) & (frames < np.floor(start + span)[:, None])
        hit |= inside[..., None]
    for index in range(config.frequency_masks):
        draw = random.uniform(f"frequency{index}", 2)
        span = draw[:, 0] * config.frequency_mask_bins
        start = draw[:, 1] * (len(bins) - span)
        inside = (bins >= start[:, None]) & (bins < np.floor(start + span)[:, None])
        hit |= inside[:, None]
    np.copyto(x_BNM, fill_BM[:, None], where=hit)
