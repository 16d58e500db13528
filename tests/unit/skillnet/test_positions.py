"""Positions of images and videos of another size."""

import pytest
import torch

from skillnet.skill_copies import (
    IMAGE_POSITIONS,
    VIDEO_POSITIONS,
    position_grids,
    resize_positions,
)
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
