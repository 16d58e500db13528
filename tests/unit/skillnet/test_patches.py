"""Cutting inputs into tokens and joining them again."""

import pytest
import torch

from skillnet.config import SkillNetConfig
from skillnet.modalities.image import PatchStem
from skillnet.modalities.pixels import cut_tubelets, join_tubelets, patchify
from skillnet.modalities.sound import stack_frames, unstack_frames
from skillnet.modalities.video import TubeletStem
from skillnet.modality import find_modality, modality_names
from skillnet.objectives.masked import MaskedHead
from skillnet.skills import Task, masked_tasks


def test_a_patch_is_a_square() -> None:
    x = torch.randn(2, 12, 12, 3)
    cut = patchify(x, 4)
    assert cut.shape == (2, 9, 48)
    assert torch.equal(cut[1, 5].view(4, 4, 3), x[1, 4:8, 8:12])


def test_clips_come_back_and_a_tubelet_is_a_box() -> None:
    x = torch.randn(2, 4, 8, 8, 3)
    cut = cut_tubelets(x, (2, 4, 4))
    assert cut.shape == (2, 8, 96)
    assert torch.equal(cut[1, 6].view(2, 4, 4, 3), x[1, 2:4, 4:8, 0:4])
    assert torch.equal(join_tubelets(cut, (2, 4, 4), 4, 8), x)


@pytest.mark.parametrize("frames", [1, 8, 10])
def test_recordings_come_back_and_the_rest_is_zero(frames: int) -> None:
    x = torch.randn(2, frames, 5)
    cut = stack_frames(x, 4)
    assert cut.shape == (2, -(-frames // 4), 20)
    assert torch.equal(unstack_frames(cut, 4, frames), x)
    assert (cut.reshape(2, -1, 5)[:, frames:] == 0).all()


def test_stems_and_targets_lie_on_one_grid() -> None:
    config = SkillNetConfig(
        dim=16, num_heads=2, patch_size=12, tubelet=(1, 16, 16), video_motion=False
    )
    pixels = torch.rand(2, 48, 48, 3)
    assert torch.equal(PatchStem(config).patches(pixels), patchify(pixels * 2 - 1, 12))
    frames = torch.rand(2, 8, 32, 32, 3)
    cut = TubeletStem(config).tubelets(frames)
    assert torch.equal(cut, cut_tubelets(frames * 2 - 1, (1, 16, 16)))
    assert cut.shape[2] == find_modality("video").tensor_half.count_values(config)


@pytest.mark.parametrize("modality", modality_names())
def test_a_head_gives_what_a_token_stands_for(modality: str) -> None:
    config = SkillNetConfig(dim=16, num_heads=2, vocab_size=30)
    head = MaskedHead(config, masked_tasks()[f"masked_{modality}"])
    embedding = torch.randn(30, 16) if head.tied else None
    width = head(torch.randn(7, 16), embedding).shape[1]
    assert width == {"text": 30, "code": 30, "image": 192, "video": 384, "sound": 320}[modality]


def test_a_masked_task_reads_one_tower() -> None:
    tasks = masked_tasks()
    assert tasks["masked_sound"].skills == ("general", "sound")
    with pytest.raises(ValueError, match=r"a masked task has the towers \['input'\]"):
        Task("masked", {"query": tasks["masked_text"].towers["input"]})
