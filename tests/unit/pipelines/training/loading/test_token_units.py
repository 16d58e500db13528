"""Units of sound: deterministic, computed once, and used as targets instead of frames."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.training.config.data import MaskConfig
from pipelines.training.config.run import TaskTraining
from pipelines.training.loading import task_dataset
from pipelines.training.loading.task_dataset import TaskDataset, TokenUnits, find_token_units
from skillnet.config import SkillNetConfig
from skillnet.keyed_random import BatchRandom
from skillnet.modalities.sound import stack_frames
from skillnet.modalities.tensors import RowMasking
from skillnet.modality import find_modality
from skillnet.skills import find_task, masked_tasks
from skillnet_platform.errors import UserError
from tests.helpers import small_corpora

STACK, COUNT = 4, 6
MODEL = SkillNetConfig(
    dim=16, num_heads=2, max_frames=40, mel_stack=STACK, sound_units=COUNT, tasks=masked_tasks()
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    folder = tmp_path_factory.mktemp("corpora")
    small_corpora.write_corpora(folder)
    return open_corpus(folder / "syllables")


def test_units_are_deterministic(corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_token_units(corpus, ("train",), MODEL)
    assert find_token_units(corpus, ("train",), MODEL) is first
    monkeypatch.setattr(task_dataset, "_units_by_key", {})
    again = find_token_units(corpus, ("train",), MODEL)
    assert again is not first
    assert torch.equal(first.centres_KP, again.centres_KP)
    assert first.centres_KP.shape == (COUNT, STACK * 80)


def test_a_stack_belongs_to_the_nearest_mean() -> None:
    random = torch.Generator().manual_seed(0)
    centres, x = torch.randn(5, 8, generator=random), torch.randn(3, 7, 8, generator=random)
    assert torch.equal(TokenUnits(centres)(x), torch.cdist(x, centres[None]).argmin(-1))


def test_targets_of_masked_sound_are_units() -> None:
    random = torch.Generator().manual_seed(0)
    log_mel, frames = torch.randn(3, 40, 80, generator=random), torch.tensor([40, 20, 9])
    units = TokenUnits(torch.randn(COUNT, STACK * 80, generator=random))
    asked = {}
    for name, given in (("frames", None), ("units", units)):
        masking = RowMasking(MODEL, MaskConfig(), 0.5, vocab_size=60, longest=24, units=given)
        draws = BatchRandom((0, 0), 3, slice(0, 3))
        batch = {"log_mel": log_mel, "frames": frames}
        inputs, asked[name] = find_modality("sound").tensor_half.mask(batch, masking, draws)
        asked[name + " shown"] = inputs
    masked = asked["units"]["masked"]
    assert torch.equal(masked, asked["frames"]["masked"])
    assert torch.equal(asked["units shown"]["log_mel"], asked["frames shown"]["log_mel"])
    assert torch.equal(asked["units"]["values"], units(stack_frames(log_mel, STACK))[masked])


def test_validation_rows_use_the_units_of_training(corpus: PreparedCorpus) -> None:
    units = find_token_units(corpus, ("train",), MODEL)
    task = find_task("masked_sound", MODEL.tasks)
    rows = TaskDataset("masked_sound", task, corpus, MODEL, TaskTraining("syllables", split="test"))
    numbers = np.arange(4)
    _, targets, _ = rows.load(numbers, BatchRandom((0, 0), 4, slice(0, 4)))
    whole = stack_frames(rows.load_inputs(numbers)["log_mel"], STACK)
    wanted = units(whole)[:, : targets["masked"].shape[1]][targets["masked"]]
    assert torch.equal(targets["values"], wanted)


def test_too_few_stacks_for_the_units_are_rejected(corpus: PreparedCorpus) -> None:
    with pytest.raises(UserError, match=r"too few for 1000000 units; lower model\.sound_units"):
        find_token_units(corpus, ("train",), replace(MODEL, sound_units=1_000_000))


def test_units_do_not_depend_on_the_location_of_shards(corpus, tmp_path):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in corpus.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert find_token_units(open_corpus(copy), ("train",), MODEL) is find_token_units(
        corpus, ("train",), MODEL
    )
