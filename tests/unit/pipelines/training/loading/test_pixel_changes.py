"""Pixels travel to a GPU as stored and are changed there, as the loader's threads change them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading import pixel_changes
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loading.prefetch import prefetch_batches
from pipelines.training.loop.resolved_run import ResolvedRun, build_joint_run
from tests.helpers.small_corpora import small_config, small_pretraining, write_corpora

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
def test_batches_of_a_gpu_are_prefetched_with_stored_pixels(
    data: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_gpu_changes_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[slice] = []
    rows = torch.empty(5, 1, 4, 4, 3, device="meta")
    monkeypatch.setattr(pixel_changes, "SLICE_BYTES", 2 * 4 * 4 * 4 * 3)
    pixel_changes._map_slices(rows, seen.append)
    assert seen == [slice(0, 2), slice(2, 4), slice(4, 5)]
    monkeypatch.setattr(pixel_changes, "SLICE_BYTES", 1)
    seen.clear()
    pixel_changes._map_slices(rows, seen.append)
    assert len(seen) == 5
