"""Masks: their fraction, their position, and their dependence on the row alone."""

import numpy as np
import pytest
import torch

from skillnet.config import SkillNetConfig
from skillnet.keyed_random import BatchRandom
from skillnet.modalities.pixels import cut_tubelets, patchify, sample_tube_mask
from skillnet.modalities.sound import stack_frames
from skillnet.modalities.tensors import Batch, normalise_tokens, sample_mask, sample_span_mask
from skillnet.modalities.tokens import FIRST_WORD, MASK_TOKEN
from skillnet.modality import find_modality
from tests.helpers.pixel_rows import make_masking, mask_pixels

MODEL = SkillNetConfig(
    dim=16,
    num_heads=2,
    vocab_size=60,
    max_tokens=24,
    max_frames=40,
    patch_size=8,
    tubelet=(2, 8, 8),
)


def draws(count: int, step: int = 0) -> BatchRandom:
    return BatchRandom((0, step), count, slice(0, count))


def hide(
    modality: str, inputs: Batch, random: BatchRandom, **changes: float
) -> tuple[Batch, Batch]:
    masking = make_masking(MODEL, modality, **changes)
    found: tuple[Batch, Batch] = find_modality(modality).tensor_half.mask(inputs, masking, random)
    return found


def test_mask_has_the_fraction_and_nothing_after_the_end() -> None:
    lengths = np.array([1, 2, 3, 10, 20])
    masked = sample_mask(np.random.default_rng(0).random((5, 20)), lengths, 0.15)
    assert masked.sum(1).tolist() == [1, 1, 1, 2, 3]
    assert not (masked & (np.arange(20) >= lengths[:, None])).any()
    many = sample_mask(np.random.default_rng(0).random((5, 20)), lengths, 0.99)
    assert many.sum(1).tolist() == [1, 1, 2, 9, 19]


def test_every_position_is_masked_equally_often() -> None:
    masked = sample_mask(np.random.default_rng(0).random((4000, 10)), np.full(4000, 10), 0.3)
    assert np.abs(masked.mean(0) - 0.3).max() < 0.04


def runs(row: np.ndarray) -> list[int]:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


def test_span_mask_has_the_fraction_in_runs() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 41, 300)
    masked = sample_span_mask(random.random((300, 40)), lengths, 0.5, 5)
    assert not (masked & (np.arange(40) >= lengths[:, None])).any()
    wanted = np.clip(np.rint(0.5 * lengths), 1, np.maximum(lengths - 1, 1))
    assert (masked.sum(1) == wanted).all()
    # One span of a row is cut where the share is reached; the others are whole or joined.
    long = [sorted(runs(row)) for row, n in zip(masked, lengths, strict=True) if n > 10]
    assert all(each >= 5 for found in long for each in found[1:])
    single = sample_span_mask(random.random((50, 40)), np.full(50, 40), 0.5, 1)
    assert np.mean([len(runs(row)) for row in single]) > 8


def test_tube_mask_is_equal_in_all_frames() -> None:
    masked = sample_tube_mask(np.random.default_rng(0).random((20, 16)), 4, 0.75).reshape(20, 4, 16)
    assert (masked == masked[:, :1]).all()
    assert (masked.sum(2) == 12).all()
    assert len({tuple(row[0]) for row in masked}) > 10


def test_tokens_are_masked_as_in_bert() -> None:
    B, T = 600, 20
    tokens = torch.full((B, T), 9)
    tokens[:, 16:] = 0
    shown, targets = hide("text", {"tokens": tokens}, draws(B), text=0.25)
    masked = targets["masked"]
    assert torch.equal(shown["places"], masked.flatten().nonzero()[:, 0])
    assert (masked.sum(1) == 4).all()
    assert not masked[:, 16:].any()
    assert (targets["values"] == 9).all()
    assert len(targets["values"]) == int(masked.sum())
    assert torch.equal(shown["tokens"][~masked], tokens[~masked])
    hidden = shown["tokens"][masked]
    assert abs((hidden == MASK_TOKEN).float().mean() - 0.8) < 0.03
    other = (hidden != MASK_TOKEN) & (hidden != 9)
    assert abs(other.float().mean() - 0.1) < 0.03
    assert int(hidden[other].min()) >= FIRST_WORD
    assert int(hidden[other].max()) < 60


def test_masked_patches_are_filled_and_their_pixels_are_targets() -> None:
    pixels = torch.randint(0, 256, (5, 48, 48, 3), dtype=torch.uint8)
    shown, targets = mask_pixels(make_masking(MODEL, "image", image=0.5), "image", pixels, draws(5))
    masked = targets["masked"]
    assert masked.shape == (5, 36)
    assert (masked.sum(1) == 18).all()
    cut = patchify(shown["pixels"], 8)
    whole = patchify(pixels.float() / 255, 8)
    assert torch.equal(cut[~masked], whole[~masked])
    for row in range(5):
        # Blank is the mean colour of what is left: it tells nothing of what is hidden.
        left = whole[row, ~masked[row]].view(-1, 3).mean(0)
        blank = cut[row, masked[row]].view(-1, 3)
        torch.testing.assert_close(blank, left.expand_as(blank))
    expected = normalise_tokens(whole * 2 - 1)[masked]
    torch.testing.assert_close(targets["values"], expected, rtol=1e-4, atol=1e-4)


def test_normalised_patches_have_no_mean_and_flat_ones_stay_flat() -> None:
    x = torch.cat([torch.randn(1, 3, 40) * 0.7 + 0.2, torch.full((1, 1, 40), 0.9)], 1)
    x[0, 3, 0] += 1e-3
    found = normalise_tokens(x)
    assert found.mean(-1).abs().max() < 1e-5
    assert (found[0, :3].std(-1, unbiased=False) - 1).abs().max() < 0.01
    assert found[0, 3].abs().max() < 0.1


@pytest.mark.parametrize(("tubes", "channels"), [(True, 1), (False, 1), (True, 3)])
def test_masked_tubelets_are_filled_and_their_pixels_are_targets(tubes, channels):
    frames = torch.randint(0, 256, (6, 8, 32, 32, channels), dtype=torch.uint8)
    masking = make_masking(MODEL, "video", video_tubes=tubes)
    shown, targets = mask_pixels(masking, "video", frames, draws(6))
    masked = targets["masked"]
    assert masked.shape == (6, 64)
    assert (masked.sum(1) == 48).all()
    places = masked.view(6, 4, 16)
    assert bool((places == places[:, :1]).all()) == tubes
    cut = cut_tubelets(shown["frames"], (2, 8, 8))
    whole = cut_tubelets(frames.float() / 255, (2, 8, 8))
    assert torch.equal(cut[~masked], whole[~masked])
    for row in range(6):
        left = whole[row, ~masked[row]].view(-1, channels).mean(0)
        blank = cut[row, masked[row]].view(-1, channels)
        torch.testing.assert_close(blank, left.expand_as(blank))
    assert targets["values"].shape == (6 * 48, 2 * 8 * 8 * 3)


def test_frames_are_masked_by_stacks_without_incomplete_stacks() -> None:
    mel, frames = torch.randn(4, 27, 80) + 5, torch.tensor([27, 17, 3, 8])
    mel[torch.arange(27) >= frames[:, None]] = 0
    shown, targets = hide("sound", {"log_mel": mel, "frames": frames}, draws(4), sound_span=2)
    masked = targets["masked"]
    assert masked.shape == (4, 7)
    assert masked.sum(1).tolist() == [3, 2, 1, 1]
    assert not masked[:, 6].any()
    assert not masked[1, 4]
    whole, cut = stack_frames(mel, 4), stack_frames(shown["log_mel"], 4)
    assert torch.equal(cut[~masked], whole[~masked])
    torch.testing.assert_close(targets["values"], normalise_tokens(whole)[masked])
    hidden = masked.repeat_interleave(4, 1)[:, :27]
    for row, real in enumerate(frames.tolist()):
        left = mel[row, :real][~hidden[row, :real]]
        mean = left.mean(0) if len(left) else torch.zeros(80)
        blank = shown["log_mel"][row][hidden[row]]
        torch.testing.assert_close(blank, mean.expand_as(blank))
    assert torch.equal(shown["frames"], frames)


def test_mask_of_a_row_depends_on_no_other_row() -> None:
    frames = torch.tensor([16, 40, 24, 9])
    mel = torch.randn(4, 40, 80)
    whole = hide("sound", {"log_mel": mel, "frames": frames}, draws(4))[1]["masked"]
    mine = BatchRandom((0, 0), 4, slice(2, 4))
    part = hide("sound", {"log_mel": mel[2:, :24], "frames": frames[2:]}, mine)[1]["masked"]
    assert torch.equal(part, whole[2:, :6])
