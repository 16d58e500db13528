"""Positions of images and videos of another size.

Cutting inputs into tokens and joining them again.
"""

import pytest
import torch

from skillnet.config import SkillNetConfig
from skillnet.modalities.pixels import PatchStem, TubeletStem, cut_tubelets, join_tubelets, patchify
from skillnet.modalities.sound import stack_frames, unstack_frames
from skillnet.modality import find_modality, modality_names
from skillnet.objectives.masked import MaskedHead
from skillnet.skill_copies import (
    IMAGE_POSITIONS,
    VIDEO_POSITIONS,
    position_grids,
    resize_positions,
)
from skillnet.skills import Task, masked_tasks
from tests.helpers.small_models import small_config, small_model, towers_of

SMALL = small_config()
LARGE = small_config(image_size=16, video_frames=8, video_size=16)


def ramp(grid: tuple[int, ...], axis: int) -> torch.Tensor:
    """Return positions (T, 3) whose value grows along an axis from -1 to 1, at cell centres."""
    size = grid[axis]
    line = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    shape = [1] * len(grid)
    shape[axis] = size
    return line.reshape(shape).expand(grid).reshape(-1, 1).repeat(1, 3)


@pytest.mark.parametrize("name", [IMAGE_POSITIONS, VIDEO_POSITIONS])
def test_a_direction_of_the_grid_keeps_its_direction(name: str) -> None:
    old, new = position_grids(SMALL)[name], position_grids(LARGE)[name]
    for axis in range(len(old)):
        resized, changes = resize_positions({name: ramp(old, axis)}, SMALL, LARGE)
        assert changes == {name: f"{'x'.join(map(str, old))} to {'x'.join(map(str, new))}"}
        values = resized[name][:, 0].reshape(new)
        lines = values.movedim(axis, 0).flatten(1)
        assert lines.shape[0] == new[axis]
        assert torch.allclose(lines, lines[:, :1].expand_as(lines))
        assert (lines.diff(dim=0) >= -1e-9).all()
        assert lines[-1, 0] - lines[0, 0] > 0.9


def test_equal_sizes_and_other_weights_stay() -> None:
    weights = {IMAGE_POSITIONS: torch.rand(4, 8), "heads.a.weight": torch.rand(2, 2)}
    same, changes = resize_positions(weights, SMALL, small_config(max_tokens=99))
    assert not changes
    assert all(same[name] is weights[name] for name in weights)


def test_a_larger_model_starts_from_a_smaller_one() -> None:
    trained = small_model(torch.float32)
    larger = small_model(torch.float32, seed=1, image_size=16, video_frames=8, video_size=16)
    weights, changes = resize_positions(
        dict(trained.named_parameters()), trained.config, larger.config
    )
    assert changes.keys() == {IMAGE_POSITIONS, VIDEO_POSITIONS}
    assert larger.load_partial(weights) == []
    for task in ("text_to_image", "text_to_video"):
        outputs = larger(task, towers_of(task, larger.config))
        assert torch.isfinite(outputs["candidate"]).all()


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
