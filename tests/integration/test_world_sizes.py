"""Several workers exchange only what they need; ``test_resume.py`` compares their weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from tests.helpers.small_corpora import small_config
from tests.integration.ranks import run_ranks, train_and_save

pytestmark = pytest.mark.integration


def weights_of(config: FinetuneConfig, world: int, out: Path) -> dict[str, torch.Tensor]:
    run_ranks(world, train_and_save, config, None, str(out))
    return load_file(out)


def count_rows(rank: int, world: int, config: FinetuneConfig, out: str) -> None:
    result = train_model(ResolvedRun(config), rank=rank, world=world)
    Path(f"{out}-{world}-{rank}.json").write_text(json.dumps(result.tasks))


def test_all_workers_count_the_rows_that_cannot_be_aligned(data: Path, tmp_path: Path) -> None:
    config = small_config(data, steps=15)
    # Recordings of one or two tokens with two symbols each.
    config.model = replace(config.model, mel_stack=28)
    for world in (1, 2):
        run_ranks(world, count_rows, config, str(tmp_path / "counts"))
    counts = [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert len(counts) == 3
    assert counts[0] == counts[1] == counts[2]
    speech = counts[0]["speech_recognition"]
    assert 0 < speech["unalignable_rows"] < speech["rows"]


def test_only_active_gradients_go_on_the_wire(data: Path, tmp_path: Path) -> None:
    config = small_config(data, steps=15)
    found = weights_of(config, 2, tmp_path / "two.safetensors")
    model, stream = build_model(config).double(), ResolvedRun(config).dataloader
    gradients = sum(
        parameter.numel()
        for step in range(15)
        for _, parameter in model.active_parameters(stream.batch_spec(step).task)
    )
    expected = 8 * (gradients + 15)  # and a flag in the last bucket of each step
    assert int(found["bytes_reduced"]) == expected
    everything = 15 * 8 * sum(parameter.numel() for parameter in model.parameters())
    assert expected < 0.6 * everything


def test_workers_exchange_only_the_gradients_of_files_that_train(
    data: Path, tmp_path: Path
) -> None:
    only = ["skill-video", "head-text_to_video"]
    config = small_config(data, steps=6, trainable=only)
    config.tasks = {"text_to_video": config.tasks["text_to_video"]}
    alone = weights_of(config, 1, tmp_path / "one.safetensors")
    two = weights_of(config, 2, tmp_path / "two.safetensors")
    fresh = build_model(config).double()
    size = 0
    for name, parameter in fresh.named_parameters():
        if fresh.file_of(name) in only:
            size += parameter.numel()
            torch.testing.assert_close(two[name], alone[name], rtol=1e-9, atol=1e-9, msg=name)
            assert not torch.equal(two[name], parameter)
        else:
            assert torch.equal(two[name], parameter), name
    assert int(two["bytes_reduced"]) == 6 * 8 * (size + 1)
