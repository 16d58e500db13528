"""Augmentation makes the configured changes and no others.

Pixels travel to a GPU as stored and are changed there, as the loader's threads change them.

Random numbers of a rank: its part of the global sequence, without the other parts.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.training.config.data import AugmentConfig
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.dataloader import Batch, prefetch_batches
from pipelines.training.loop.resolved_run import ResolvedRun, build_joint_run
from skillnet.keyed_random import BatchRandom, draw_uniform, keyed_rng
from skillnet.modalities.sound import augment_audio
from skillnet.modalities.tokens import MASK_TOKEN, drop_tokens
from tests.helpers.pixel_rows import augment_pixels
from tests.helpers.small_corpora import small_config, small_pretraining, write_corpora

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


PIXELS = {"image": "pixels", "video": "frames"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data", pretrain=20)


@pytest.fixture(params=["finetune", "pretrain"])
def config(request: pytest.FixtureRequest, data: Path) -> FinetuneConfig:
    if request.param == "finetune":
        return small_config(data)
    return build_joint_run(replace(small_pretraining(data), views=True))


def tensors(batch: Batch) -> dict[str, Tensor]:
    found = {f"{t}/{k}": x for t, inputs in batch.towers.items() for k, x in inputs.items()}
    return found | batch.targets


def stored_pixels(config: FinetuneConfig, batch: Batch) -> list[Tensor]:
    towers = config.model.tasks[batch.task].towers
    return [
        batch.towers[name][PIXELS[plan.modality]]
        for name, plan in towers.items()
        if plan.modality in PIXELS
    ]


def assert_equal(sent: Batch, whole: Batch) -> None:
    assert not whole.changes
    moved = sent.to(torch.device("cpu"))
    assert not moved.changes
    found, expected = tensors(moved), tensors(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected), whole.task
    assert (sent.masked_counts is None) == (whole.masked_counts is None)


def test_a_gpu_gets_stored_pixels_and_makes_the_same_batch(config: FinetuneConfig) -> None:
    loader, seen = ResolvedRun(config).dataloader, set()
    for step in range(60):
        sent = loader.batch(step, 1, 2, for_gpu=True)
        pixels = stored_pixels(config, sent)
        assert all(x.dtype == torch.uint8 for x in pixels)
        assert len(sent.changes) == len(pixels)
        seen |= {sent.task} if pixels else set()
        assert_equal(sent, loader.batch(step, 1, 2))
    wanted = {"text_to_image", "text_to_video"}
    wanted = wanted if wanted & config.tasks.keys() else {"masked_image", "views_video"}
    assert wanted <= seen


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_batches_of_a_gpu_are_prefetched_with_stored_pixels(data, processes, monkeypatch):
    pinned: list[Tensor] = []

    def pin(x: Tensor) -> Tensor:
        pinned.append(x)
        return x

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    config = build_joint_run(replace(small_pretraining(data), views=True))
    loader = ResolvedRun(config).dataloader
    with prefetch_batches(loader, 3, 15, 0, 1, processes, for_gpu=True) as ahead:
        for step, sent in enumerate(ahead, 3):
            assert all(x.dtype == torch.uint8 for x in stored_pixels(config, sent))
            assert_equal(sent, loader.batch(step))
    if not processes:  # without a GPU, DataLoader pins nothing
        assert {x.dtype for x in pinned} >= {torch.uint8, torch.float32}


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 1001])
@pytest.mark.parametrize("count", [0, 1, 13, 64])
def test_a_part_equals_the_same_part_of_the_whole_sequence(start: int, count: int) -> None:
    whole = keyed_rng(3, "mask", 5).random(start + count, dtype=np.float32)
    assert np.array_equal(draw_uniform((3, "mask", 5), start, count), whole[start:])


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_ranks_draw_the_rows_of_one_batch(shape: tuple[int, ...]) -> None:
    whole = BatchRandom((1, 2), 10, slice(None)).uniform("crop", *shape)
    assert np.array_equal(whole, keyed_rng(1, 2, "crop").random((10, *shape), dtype=np.float32))
    parts = [slice(0, 3), slice(3, 3), slice(3, 10)]
    ranks = [BatchRandom((1, 2), 10, part).uniform("crop", *shape) for part in parts]
    assert np.array_equal(np.concatenate(ranks), whole)


def test_a_rank_draws_no_numbers_of_other_ranks() -> None:
    # The whole batch would take 4 TB.
    rows = 2**32
    last = BatchRandom((1, 2), rows, slice(rows - 2, rows)).uniform("mask", 256)
    assert last.shape == (2, 256)
