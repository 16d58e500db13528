"""Figures of reconstructions: masked tokens are hidden, and show the predictions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.evaluation import reconstructions
from pipelines.training.evaluation.inference import InferenceRunner
from pipelines.training.loading.audio_units import find_sound_units
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loading.masking import VARIANCE_FLOOR, normalise_tokens
from skillnet.multitask_model import TaskModel
from skillnet.stems import cut_tubelets, patchify, stack_frames
from skillnet.systems import build_system
from tests.helpers.small_corpora import small_pretraining, write_corpora

UNITS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data", pretrain=20)


@pytest.fixture(scope="module")
def coloured_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coloured") / "data"
    return write_corpora(folder, rows=8, test_rows=8, pretrain=4, video_channels=3)


def run_of(data: Path, units: int = 0) -> tuple[FinetuneConfig, TaskModel]:
    config = small_pretraining(data, precision="fp32").joint()
    config = replace(config, model=replace(config.model, sound_units=units))
    return config, build_system("skillnet", config.model, {})


class Oracle:
    """Model that predicts the targets, or zeros, and records its batch."""

    def __init__(self, right: bool) -> None:
        self.right, self.batch = right, None

    def __call__(self, runner: InferenceRunner, batch: Batch) -> Tensor:
        self.batch = batch
        values = batch.targets["values"]
        if not values.is_floating_point():
            return torch.nn.functional.one_hot(values, UNITS).float()
        return values if self.right else torch.zeros_like(values)

    @property
    def masked_BT(self) -> Tensor:
        assert self.batch is not None
        return self.batch.targets["masked"]


def cut(config: FinetuneConfig, task: str, images: np.ndarray) -> Tensor:
    """Return displayed images, video or audio as the tokens of the model."""
    x = torch.from_numpy(images)
    if task == "masked_image":
        return patchify(x, config.model.patch_size)
    if task == "masked_video":
        return cut_tubelets(x, config.model.tubelet)
    return stack_frames(x.transpose(1, 2).nan_to_num(), config.model.mel_stack)


@pytest.mark.parametrize("task", ["masked_image", "masked_video", "masked_sound", "colour"])
def test_masked_tokens_are_restored_in_their_place(
    task: str, data: Path, coloured_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = run_of(coloured_data if task == "colour" else data)
    task = task.replace("colour", "masked_video")
    oracle = Oracle(right=True)
    monkeypatch.setattr(reconstructions, "predict_masked_tokens", oracle)
    original, hidden, restored = reconstructions.reconstruct_rows(config, model, task)
    assert original.shape == hidden.shape == restored.shape
    if config.data == str(coloured_data):
        assert np.ptp(original, axis=-1).max() > 0.1
        assert np.ptp(hidden, axis=-1).max() > 0.1
    assert np.allclose(restored, original, atol=1e-4, equal_nan=True)
    tokens, shown = cut(config, task, original), cut(config, task, hidden)
    changed_BT = ((tokens - shown).abs() > 1e-5).any(-1)
    assert oracle.masked_BT.any()
    assert torch.equal(changed_BT, oracle.masked_BT), "hidden there, and nowhere else"

    monkeypatch.setattr(reconstructions, "predict_masked_tokens", Oracle(right=False))
    _, _, nothing = reconstructions.reconstruct_rows(config, model, task)
    made = cut(config, task, nothing)
    assert torch.allclose(made[~oracle.masked_BT], tokens[~oracle.masked_BT], atol=1e-5)
    means = tokens.mean(-1, keepdim=True).expand_as(tokens)
    assert torch.allclose(made[oracle.masked_BT], means[oracle.masked_BT], atol=1e-4)


def test_a_sound_unit_is_drawn_as_the_mean_of_its_frames(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = run_of(data, UNITS)
    oracle = Oracle(right=True)
    monkeypatch.setattr(reconstructions, "predict_masked_tokens", oracle)
    original, _, restored = reconstructions.reconstruct_rows(config, model, "masked_sound")
    assert np.array_equal(np.isnan(original), np.isnan(restored)), "where a recording has ended"
    tokens, made = (cut(config, "masked_sound", x) for x in (original, restored))
    masked = oracle.masked_BT
    assert torch.equal(made[~masked], tokens[~masked])
    corpus = open_corpus(data / "syllables")
    units = find_sound_units(corpus, ("train",), config.model.mel_stack, UNITS)
    assert oracle.batch is not None
    means = normalise_tokens(units.centres_KP[oracle.batch.targets["values"]])
    asked = tokens[masked]
    spread = (asked.var(-1, keepdim=True, unbiased=False) + VARIANCE_FLOOR).sqrt()
    assert torch.allclose(made[masked], means * spread + asked.mean(-1, keepdim=True), atol=1e-4)
