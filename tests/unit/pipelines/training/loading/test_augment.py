"""Augmentation makes the configured changes and no others."""

import numpy as np
import torch

from pipelines.training.config.data import AugmentConfig
from skillnet.keyed_random import BatchRandom
from skillnet.modalities.sound import augment_audio
from skillnet.modalities.tokens import MASK_TOKEN, drop_tokens
from tests.helpers.pixel_rows import augment_pixels

NONE = AugmentConfig(**dict.fromkeys(vars(AugmentConfig()), 0))


def draws(count: int, step: int = 0) -> BatchRandom:
    return BatchRandom((0, step), count, slice(0, count))


def test_nothing_changes_when_all_is_off() -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    found = augment_pixels("image", pixels, NONE, draws(3))
    assert torch.equal(found, torch.from_numpy(pixels).float() / 255)
    frames = random.integers(0, 256, (3, 2, 8, 8, 1), dtype=np.uint8)
    found = augment_pixels("video", frames, NONE, draws(3))
    assert torch.equal(found, torch.from_numpy(frames).float() / 255)
    mel = random.standard_normal((2, 5, 4), dtype=np.float32)
    mel[1, 3:] = 0
    out, lengths = augment_audio(mel, np.array([5, 3]), NONE, draws(2), longest=9)
    assert np.array_equal(out, mel)
    assert lengths.tolist() == [5, 3]
    tokens = np.array([[4, 5, 6]])
    assert np.array_equal(drop_tokens(tokens, np.array([3]), 0.0, draws(1), 20), tokens)


def test_image_shifts_by_the_configured_pixels() -> None:
    pixels = np.full((200, 21, 21, 3), 255, dtype=np.uint8)
    pixels[:, 10, 10] = 0
    config = AugmentConfig(**(vars(NONE) | {"image_shift": 3.0}))
    dark = 1 - augment_pixels("image", pixels, config, draws(200))[..., 0]
    centre = (dark.sum(2) * torch.arange(21)).sum(1) / dark.sum((1, 2))
    assert 2.5 < float((centre - 10).abs().max()) <= 3.0 + 1e-3
    assert abs(float((centre - 10).mean())) < 0.4


def test_frames_of_a_video_shift_together() -> None:
    frames = np.zeros((4, 3, 16, 16, 1), dtype=np.uint8)
    frames[:, :, 5:9, 5:9] = 255
    config = AugmentConfig(**(vars(NONE) | {"video_shift": 2.0, "video_scale": 0.1}))
    found = augment_pixels("video", frames, config, draws(4))
    assert torch.equal(found[:, 0], found[:, 2])
    assert not torch.equal(found[0], found[1])


def test_share_of_dropped_tokens_and_the_last_one_stays() -> None:
    tokens = np.full((400, 20), 9)
    lengths = np.full(400, 15)
    tokens[:, 15:] = 0
    found = drop_tokens(tokens, lengths, 0.2, draws(400), 20)
    assert set(np.unique(found)) == {0, MASK_TOKEN, 9}
    assert (found[:, 15:] == 0).all()
    assert (found[:, 14] == 9).all()
    assert abs((found[:, :14] == MASK_TOKEN).mean() - 0.2) < 0.02
    single = drop_tokens(np.array([[7]]), np.array([1]), 0.99, draws(1), 20)
    assert single.tolist() == [[7]]


def test_audio_is_padded_with_silence_and_noise_adds_to_power() -> None:
    random = np.random.default_rng(0)
    mel = random.standard_normal((50, 20, 6), dtype=np.float32)
    frames = np.full(50, 20)
    config = AugmentConfig(**(vars(NONE) | {"sound_pad": 5}))
    out, lengths = augment_audio(mel, frames, config, draws(50), longest=40)
    assert 20 <= lengths.min() <= 22
    assert 28 <= lengths.max() <= 30
    for row in range(50):
        real = out[row, : lengths[row]]
        assert np.allclose(real.min(0), mel[row].min(0))
        start = int(np.flatnonzero((real == mel[row, 0]).all(1))[0])
        assert np.array_equal(real[start : start + 20], mel[row])
    loud = AugmentConfig(**(vars(NONE) | {"sound_noise": 0.5}))
    noisy, _ = augment_audio(mel, frames, loud, draws(50), longest=40)
    assert (noisy >= mel - 1e-5).all()
    assert (noisy > mel + 0.01).mean() > 0.3
    cut, lengths = augment_audio(mel, frames, config, draws(50), longest=22)
    assert lengths.max() == cut.shape[1] == 22


def test_masks_silence_spans() -> None:
    mel = np.ones((60, 30, 10), dtype=np.float32)
    mel[:, 0] = -1
    config = AugmentConfig(
        **(vars(NONE) | {"time_masks": 1, "time_mask_frames": 6, "frequency_masks": 0})
    )
    out, _ = augment_audio(mel, np.full(60, 30), config, draws(60), longest=30)
    silent = (out == -1).all(2).sum(1) - 1
    assert 0 <= silent.min() <= silent.max() <= 6
    assert silent.max() >= 4
