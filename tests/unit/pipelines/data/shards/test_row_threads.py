"""Rows shared among threads: each once, with the result of one thread."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipelines.data.shards import row_threads
from pipelines.data.shards.row_threads import map_row_slices
from pipelines.training.config.data import AugmentConfig
from skillnet.config import SkillNetConfig
from skillnet.keyed_random import BatchRandom
from tests.helpers.pixel_rows import augment_pixels, make_masking, mask_pixels


@pytest.fixture(params=[1, 3, 8])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Use a number of threads that does not depend on the machine."""
    row_threads._get_pool.cache_clear()
    monkeypatch.setattr(row_threads, "_count_threads", lambda: request.param)
    yield request.param
    row_threads._get_pool.cache_clear()


@pytest.mark.parametrize("count", [0, 1, 8, 9, 64, 65])
def test_every_row_is_processed_once(cores: int, count: int) -> None:
    seen = np.zeros(count, int)

    def mark(mine: slice) -> None:
        seen[mine] += 1

    map_row_slices(count, mark)
    assert (seen == 1).all()


def test_an_error_in_a_thread_is_raised(cores: int) -> None:
    def fail(mine: slice) -> None:
        if mine.stop == 64:
            raise ValueError("the last rows")

    with pytest.raises(ValueError, match="the last rows"):
        map_row_slices(64, fail)


def test_augmentation_does_not_depend_on_the_number_of_threads(cores: int) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (37, 20, 20, 3), np.uint8)
    frames = random.integers(0, 256, (37, 4, 12, 12, 1), np.uint8)
    config = AugmentConfig()
    for modality, rows in (("image", pixels), ("video", frames)):
        whole = augment_pixels(modality, rows, config, BatchRandom((1,), 37, slice(None)))
        one_by_one = [
            augment_pixels(
                modality, rows[n : n + 1], config, BatchRandom((1,), 37, slice(n, n + 1))
            )
            for n in range(37)
        ]
        assert torch.equal(whole, torch.cat(one_by_one))
        assert whole.is_contiguous()


def test_masked_pixels_do_not_depend_on_the_number_of_threads(cores: int) -> None:
    pixels = torch.randint(0, 256, (37, 16, 16, 3), dtype=torch.uint8)
    masker = make_masking(SkillNetConfig(image_size=16, patch_size=4), "image")
    whole, targets = mask_pixels(masker, "image", pixels, BatchRandom((1,), 37, slice(None)))
    parts = [
        mask_pixels(masker, "image", pixels[n : n + 1], BatchRandom((1,), 37, slice(n, n + 1)))
        for n in range(37)
    ]
    assert torch.equal(whole["pixels"], torch.cat([part["pixels"] for part, _ in parts]))
    assert torch.equal(targets["values"], torch.cat([found["values"] for _, found in parts]))
