"""A run that stops and resumes ends like a run that never stopped."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from skillnet_platform.errors import UserError
from tests.helpers.small_corpora import small_config
from tests.helpers.small_models import drop_tokens
from tests.integration.ranks import run_ranks, train_and_save

pytestmark = pytest.mark.integration


def parameters(path: Path) -> dict[str, torch.Tensor]:
    return {name: x for name, x in load_file(path).items() if ":" not in name and "_" != name[0]}


def run_to(
    data: Path, tmp_path: Path, name: str, parts: list[tuple[int, int | None]], **training: object
) -> dict[str, torch.Tensor]:
    """Train in ``parts``, each (number of workers, step to stop before)."""
    config = small_config(data, **({"steps": 14} | training))
    out = tmp_path / f"{name}.safetensors"
    for world, stop in parts:
        run_ranks(world, train_and_save, config, str(tmp_path / name), str(out), stop)
    found = parameters(out)
    found.pop("bytes_reduced")
    return found


@pytest.mark.parametrize("training", [{"precision": "fp32"}, {"precision": "bf16", "ema": 0.9}])
@pytest.mark.parametrize("world", [1, 2])
def test_the_same_to_the_bit_at_the_same_world_size(
    data: Path, tmp_path: Path, world: int, training: dict[str, object]
) -> None:
    whole = run_to(data, tmp_path, "whole", [(world, None)], **training)
    parts = run_to(data, tmp_path, "parts", [(world, 5), (world, 9), (world, None)], **training)
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


@pytest.mark.parametrize("worlds", [(1, 2), (4, 1)])
def test_the_same_in_float64_at_another_world_size(
    data: Path, tmp_path: Path, worlds: tuple[int, int]
) -> None:
    whole = run_to(data, tmp_path, "whole", [(1, None)])
    parts = run_to(data, tmp_path, "parts", [(worlds[0], 6), (worlds[1], None)])
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-9, msg=name)


def train_plain_and_offloaded(rank: int, world: int, data: Path, folder: Path) -> None:
    for place, stops in (("none", (None,)), ("host", (5, None))):
        name = "plain" if place == "none" else "offloaded"
        config = small_config(data, ema=0.9, sharding=place)
        for stop in stops:
            out = str(folder / f"{name}.safetensors")
            train_and_save(rank, world, config, str(folder / name), out, stop)


def test_the_same_to_the_bit_with_weights_in_the_host(data: Path, tmp_path: Path) -> None:
    run_ranks(2, train_plain_and_offloaded, data, tmp_path)
    plain, offloaded = (tmp_path / f"{name}.safetensors" for name in ("plain", "offloaded"))
    assert parameters(plain).pop("bytes_reduced") > 0
    whole, parts = parameters(plain), parameters(offloaded)
    for name in whole.keys() - {"bytes_reduced"}:
        assert torch.equal(whole[name], parts[name]), name
    last = "checkpoints/step-00000012"
    for path in (tmp_path / "plain" / last).iterdir():
        assert path.read_bytes() == (tmp_path / "offloaded" / last / path.name).read_bytes(), path


def test_dropout_does_not_depend_on_where_a_run_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_tokens(monkeypatch, 0.3)
    config = small_config(data, steps=8)
    config.model.drop_path = 0.3
    whole = train_model(ResolvedRun(config, tmp_path / "whole"))
    train_model(ResolvedRun(config, tmp_path / "parts"), stop_at=3)
    parts = train_model(ResolvedRun(config, tmp_path / "parts"))
    assert parts.resumed == 3
    for (name, one), (_, other) in zip(
        whole.model.named_parameters(), parts.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_another_configuration_is_refused(data: Path, tmp_path: Path) -> None:
    train_model(ResolvedRun(small_config(data, steps=4), tmp_path), stop_at=2)
    with pytest.raises(UserError, match="another configuration"):
        train_model(ResolvedRun(small_config(data, steps=4, lr=0.5), tmp_path))


def test_resumes_from_the_checkpoint_before_an_altered_one(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(data, steps=9, checkpoint_every=3)
    whole = train_model(ResolvedRun(config, tmp_path / "whole"))
    train_model(ResolvedRun(config, tmp_path / "parts"), stop_at=6)
    damaged = tmp_path / "parts" / "checkpoints" / "step-00000006" / "skill-general.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    parts = train_model(ResolvedRun(config, tmp_path / "parts"))
    assert parts.resumed == 3
    assert "skill-general.safetensors" in capsys.readouterr().err
    for (name, one), (_, other) in zip(
        whole.model.named_parameters(), parts.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
