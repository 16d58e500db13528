"""Random changes of training rows, whole batches at once.

Every function takes draws made for its rows (see ``Draws``), so that a row gets the same change
however the global batch is cut over workers. Shapes: B rows, T tokens, N frames, H height,
W width, C channels, M mel bins.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.config.data import AugmentConfig
from pipelines.loading.rng import keyed_rng
from pipelines.shards.row_threads import map_row_slices

MASK_TOKEN = 2


class Draws:
    """Random numbers of one global batch, of which a rank sees those of its rows.

    Args:
        key: what the numbers hang on: seed, task and step.
        count: rows of the global batch.
        mine: this rank's rows among them.
    """

    def __init__(self, key: Sequence[int | str], count: int, mine: slice) -> None:
        self._key, self._count, self._mine = tuple(key), count, mine

    def branch(self, name: str) -> "Draws":
        """Further draws of the same rows, for a second change of them."""
        return Draws((*self._key, name), self._count, self._mine)

    def uniform(self, name: str, *shape: int) -> np.ndarray:
        """(B, *shape) float32 in [0, 1). ``shape`` must not hang on the rank's rows."""
        random = keyed_rng(*self._key, name)
        return random.random((self._count, *shape), dtype=np.float32)[self._mine]


def drop_tokens(
    tokens_BT: np.ndarray, lengths_B: np.ndarray, share: float, draws: Draws, longest: int
) -> np.ndarray:
    """Replace a share of the tokens by the mask token; a row's last real token stays.

    ``longest`` is the most tokens that any row may have; it does not hang on the batch.
    """
    if share <= 0:
        return tokens_BT
    width = tokens_BT.shape[1]
    chance = draws.uniform("tokens", longest)[:, :width]
    hit = (chance < share) & (np.arange(width) < lengths_B[:, None] - 1)
    return np.where(hit, MASK_TOKEN, tokens_BT)


def pictures(pixels_BHWC: np.ndarray, config: AugmentConfig, draws: Draws) -> Tensor:
    """Shift, resize and tint pictures. uint8 in, float32 in [0, 1] out."""
    B, H, W, C = pixels_BHWC.shape
    place = _places(config.image_shift, config.image_scale, draws)
    tint = None
    if config.image_colour:
        tint = torch.from_numpy(1 + config.image_colour * (2 * draws.uniform("colour", 3) - 1))
    out_BHWC = torch.empty((B, H, W, C))

    def some(mine: slice) -> None:
        x_BCHW = torch.from_numpy(pixels_BHWC[mine]).permute(0, 3, 1, 2).float() / 255
        if place is not None:
            x_BCHW = _shift_and_scale(x_BCHW, *place, mine)
        if tint is not None:
            x_BCHW = (x_BCHW * tint[mine][:, :, None, None]).clamp_(0, 1)
        out_BHWC[mine] = x_BCHW.permute(0, 2, 3, 1)

    map_row_slices(B, some)
    return out_BHWC


def clips(frames_BNHWC: np.ndarray, config: AugmentConfig, draws: Draws) -> Tensor:
    """Shift and resize clips, all frames alike. uint8 in, float32 in [0, 1] out."""
    B, N, H, W, C = frames_BNHWC.shape
    place = _places(config.video_shift, config.video_scale, draws)
    out_BNHWC = torch.empty((B, N, H, W, C))

    def some(mine: slice) -> None:
        x = torch.from_numpy(frames_BNHWC[mine]).permute(0, 1, 4, 2, 3)
        x = x.reshape(-1, N * C, H, W).float() / 255
        if place is not None:
            x = _shift_and_scale(x, *place, mine)
        out_BNHWC[mine] = x.view(-1, N, C, H, W).permute(0, 1, 3, 4, 2)

    map_row_slices(B, some)
    return out_BNHWC


def _places(shift: float, scale: float, draws: Draws) -> tuple[Tensor, float, float] | None:
    """(B, 3) draws in [-1, 1] of size and place, with how much they change; none if nothing."""
    if not shift and not scale:
        return None
    return torch.from_numpy(2 * draws.uniform("place", 3) - 1), shift, scale


def _shift_and_scale(
    x_BCHW: Tensor, draw_B3: Tensor, shift: float, scale: float, mine: slice
) -> Tensor:
    B, _, H, W = x_BCHW.shape
    draw = draw_B3[mine]
    size = (1 + scale * draw[:, :1]).reciprocal()
    # Pixel centres in [-1, 1], as grid_sample counts them with align_corners=False.
    across_BW = size * ((2 * torch.arange(W) + 1) / W - 1) + draw[:, 1:2] * 2 * shift / W
    down_BH = size * ((2 * torch.arange(H) + 1) / H - 1) + draw[:, 2:] * 2 * shift / H
    grid = torch.stack(
        [across_BW[:, None].expand(B, H, W), down_BH[:, :, None].expand(B, H, W)], dim=-1
    )
    return F.grid_sample(x_BCHW, grid, padding_mode="border", align_corners=False)


def recordings(
    log_mel_BNM: np.ndarray,
    frames_B: np.ndarray,
    config: AugmentConfig,
    draws: Draws,
    longest: int,
    deviation: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Pad with silence, change level, add noise and mask spans of log-mel recordings.

    Noise adds to the power: log(exp(speech) + exp(noise)). Silence is the recording's quietest
    value per mel bin. Masks are SpecAugment's (Park et al. 2019), filled with silence.

    Args:
        log_mel_BNM: natural log of power over ``deviation``, less a constant; zero where a row
            has ended.
        frames_B: (B,) real frames.
        config: how much.
        draws: of these rows.
        longest: frames that the model reads at most.
        deviation: what the corpus divided the log of power by.

    Returns:
        (B, N', M) float32 and (B,) frames, silence included.
    """
    real = np.arange(log_mel_BNM.shape[1]) < frames_B[:, None]
    quiet_BM = np.min(log_mel_BNM, axis=1, where=real[..., None], initial=np.inf)
    level = draws.uniform("sound", 5)
    front = np.floor(level[:, 0] * (config.sound_pad + 1)).astype(np.int64)
    behind = np.floor(level[:, 1] * (config.sound_pad + 1)).astype(np.int64)
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
        # A window of a fixed piece of noise, at one of levels spread evenly over 30 dB below
        # the loudest, relative to the recording's mean log power.
        mean_B = np.where(inside, x.mean(2), 0).sum(1) / np.maximum(inside.sum(1), 1)
        loudness_B = mean_B * deviation + np.log(config.sound_noise) - 6.9 * level[:, 3]
        bank = _noise(x.shape[2])
        start_B = np.floor(level[:, 4] * (len(bank) - longest)).astype(np.int64)
        noise = bank[start_B[:, None] + np.arange(width)] + loudness_B[:, None, None]
        x = _add_powers(x, noise.astype(np.float32), deviation)
    _mask(x, total, config, draws, quiet_BM)
    x[np.arange(width) >= total[:, None]] = 0
    return x.astype(np.float32, copy=False), total


@lru_cache(maxsize=4)
def _noise(bins: int) -> np.ndarray:
    """(4096, bins) natural log of the power of white noise of mean power 1."""
    power = keyed_rng("noise").standard_exponential((4096, bins), dtype=np.float32)
    return np.log(power + 1e-3)


def _add_powers(x: np.ndarray, noise: np.ndarray, deviation: float) -> np.ndarray:
    # torch's kernel is ten times as fast as numpy's.
    total = torch.logaddexp(torch.from_numpy(x) * deviation, torch.from_numpy(noise))
    return (total / deviation).numpy()


def _mask(
    x_BNM: np.ndarray,
    frames_B: np.ndarray,
    config: AugmentConfig,
    draws: Draws,
    fill_BM: np.ndarray,
) -> None:
    """Silence random spans of frames and bands of bins in place."""
    bins = np.arange(x_BNM.shape[2])
    frames = np.arange(x_BNM.shape[1])
    hit = np.zeros(x_BNM.shape, dtype=bool)
    for index in range(config.time_masks):
        draw = draws.uniform(f"time{index}", 2)
        span = draw[:, 0] * np.minimum(config.time_mask_frames, frames_B / 5)
        start = draw[:, 1] * (frames_B - span)
        inside = (frames >= start[:, None]) & (frames < np.floor(start + span)[:, None])
        hit |= inside[..., None]
    for index in range(config.frequency_masks):
        draw = draws.uniform(f"frequency{index}", 2)
        span = draw[:, 0] * config.frequency_mask_bins
        start = draw[:, 1] * (len(bins) - span)
        inside = (bins >= start[:, None]) & (bins < np.floor(start + span)[:, None])
        hit |= inside[:, None]
    np.copyto(x_BNM, fill_BM[:, None], where=hit)
