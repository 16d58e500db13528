"""Sound: log-mel frames, stacked to tokens.

Shapes: B batch, T tokens, D model width, N frames, M mel bins.
"""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from skillnet.config import SkillNetConfig
from skillnet.keyed_random import keyed_rng
from skillnet.modalities.tensors import (
    Batch,
    ModalityTensors,
    RowAugmentation,
    RowMasking,
    Tokens,
    build_stem_norm,
    draw_lengths,
    make_positions,
    sample_span_mask,
)


class LogMelStem(nn.Module):
    """Convolutional embedding of sound. Batch: ``log_mel`` (B, N, M), ``frames`` (B,) real frames.

    Two convolutions over time, as in Whisper's stem. The second one maps ``mel_stack`` frames to
    one token: T = ceil(N / mel_stack).
    """

    def __init__(self, config: SkillNetConfig) -> None:
        super().__init__()
        self.stack, self.max_frames = config.mel_stack, config.max_frames
        # An odd kernel is symmetric, so a token is centred on its frames.
        width = self.stack + (self.stack + 1) % 2
        self.first = nn.Conv1d(config.n_mels, config.dim, 3, padding=1)
        self.second = nn.Conv1d(
            config.dim, config.dim, width, stride=self.stack, padding=width // 2
        )
        self.position = make_positions(-(-config.max_frames // self.stack), config.dim)
        self.norm = build_stem_norm(config)

    def forward(self, batch: Batch, modality: str) -> Tokens:
        x_BNM, frames_B = batch["log_mel"], batch["frames"]
        N = x_BNM.shape[1]
        if self.max_frames < N:
            raise ValueError(
                f"audio of {N} frames is longer than model.max_frames {self.max_frames}; "
                "truncate it or raise model.max_frames"
            )
        # Padding is zeroed before each convolution, so a row does not depend on its batch.
        real_B1N = (torch.arange(N, device=x_BNM.device) < frames_B[:, None])[:, None]
        x = self.first(x_BNM.to(self.position.dtype).transpose(1, 2) * real_B1N)
        x = self.second(F.gelu(x) * real_B1N).transpose(1, 2)
        T = -(-N // self.stack)
        x_BTD = F.gelu(x[:, :T]) + self.position[:T]
        mask_BT = torch.arange(T, device=x.device) < token_lengths(frames_B, self.stack)[:, None]
        return self.norm(x_BTD), mask_BT


class SoundTensors(ModalityTensors):
    """Tensor half of sound: rows are padded, and a token is a stack of frames."""

    stem_class = LogMelStem
    # Rows of about 80 frames with augmentation (benchmarks/results/2026-11-25-stream.csv).
    seconds_per_element = 1 / 16_270 / 80

    def find_longest(self, config: SkillNetConfig) -> int:
        return config.max_frames

    def count_tokens(self, config: SkillNetConfig, length: Any = None) -> Any:
        return -(-(config.max_frames if length is None else length) // config.mel_stack)

    def count_values(self, config: SkillNetConfig) -> int:
        return config.mel_stack * config.n_mels

    def count_classes(self, config: SkillNetConfig) -> int:
        return config.sound_units

    def count_stem_flops(self, config: SkillNetConfig, stem: nn.Module, length: int | None) -> int:
        assert isinstance(stem, LogMelStem)
        frames = length or config.max_frames
        first = frames * config.n_mels * stem.first.kernel_size[0]
        second = self.count_tokens(config, frames) * config.dim * stem.second.kernel_size[0]
        return 2 * config.dim * (first + second)

    def make_example(
        self,
        config: SkillNetConfig,
        rows: int,
        length: int | None = None,
        draw: Generator | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> Batch:
        longest = length or config.max_frames
        shape = (rows, longest, config.n_mels)
        if draw is None:
            return {"log_mel": torch.zeros(shape), "frames": torch.full((rows,), longest)}
        values = torch.randn(shape, generator=draw)
        return {"log_mel": values, "frames": draw_lengths(longest, rows, draw)}

    def augment(
        self, values: np.ndarray, lengths: np.ndarray | None, change: RowAugmentation
    ) -> tuple[np.ndarray, np.ndarray | None]:
        assert lengths is not None
        longest = change.model.max_frames
        return augment_audio(
            values, lengths, change.settings, change.random, longest, change.deviation
        )

    def draw_mask(self, inputs: Batch, masking: RowMasking, random: Any) -> np.ndarray:
        """Return spans of tokens.

        A token with an incomplete stack at the end of the audio is masked only if it is the only
        token.
        """
        stack = masking.model.mel_stack
        complete_B = np.maximum(inputs["frames"].numpy() // stack, 1)
        tokens = self.count_tokens(masking.model, inputs["log_mel"].shape[1])
        chance = random.uniform("mask", self.count_tokens(masking.model))[:, :tokens]
        return sample_span_mask(chance, complete_B, masking.share, masking.settings.sound_span)

    def cut(self, x: Tensor, config: SkillNetConfig) -> Tensor:
        return stack_frames(x, config.mel_stack)

    def join(self, x_BTP: Tensor, shape: torch.Size, config: SkillNetConfig) -> Tensor:
        return unstack_frames(x_BTP, config.mel_stack, shape[1])

    def find_visible(self, inputs: Batch) -> Tensor:
        frames = torch.arange(inputs["log_mel"].shape[1])
        return (frames < inputs["frames"][:, None])[..., None]


def token_lengths(frames_B: Tensor, stack: int) -> Tensor:
    """Return the number of tokens of sound with a number of frames: ceil(frames / stack).

    Args:
        frames_B: real frames.
        stack: frames per token.
    """
    return (frames_B + stack - 1) // stack


def stack_frames(x_BNM: Tensor, stack: int) -> Tensor:
    """Join consecutive frames, (B, N, M) -> (B, T, stack*M), with zeros after the last frame.

    Args:
        x_BNM: log-mel frames.
        stack: frames per token.
    """
    B, N, M = x_BNM.shape
    return F.pad(x_BNM, (0, 0, 0, -N % stack)).reshape(B, -1, stack * M)


def unstack_frames(x_BTP: Tensor, stack: int, frames: int) -> Tensor:
    """Invert :func:`stack_frames`.

    Args:
        x_BTP: joined frames.
        stack: frames per token.
        frames: N, frames of the result.
    """
    return x_BTP.reshape(x_BTP.shape[0], x_BTP.shape[1] * stack, -1)[:, :frames]


def augment_audio(
    log_mel_BNM: np.ndarray,
    frames_B: np.ndarray,
    config: Any,
    random: Any,
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
        random: random numbers of these rows.
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
    config: Any,
    random: Any,
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
