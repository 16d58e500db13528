"""A run that stops and resumes, on any workers, ends like a run that never stopped."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from skillnet_platform.errors import UserError
from tests.chaos.run_measures import same
from tests.helpers.small_corpora import (
    add_linear_paths,
    small_config,
    small_pretraining,
    write_corpora,
)
from tests.helpers.small_models import drop_tokens
from tests.integration.ranks import run_ranks, train_and_save

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data", pretrain=20)


Parts = list[tuple[int, int | None]]
Weights = dict[str, torch.Tensor]


def train_parts(config: FinetuneConfig, folder: Path, parts: Parts) -> Weights:
    """Train in parts, each (number of workers, step to stop before); weights and last losses."""
    for world, stop in parts:
        given = (deepcopy(config), str(folder), f"{folder}.safetensors", stop)
        if world == 1:
            train_and_save(0, 1, *given)
        else:
            run_ranks(world, train_and_save, *given)
    return read_weights(Path(f"{folder}.safetensors"), losses=len(parts) == 1)


def read_weights(path: Path, losses: bool = False) -> Weights:
    found = load_file(path)
    del found["bytes_reduced"]
    return {name: x for name, x in found.items() if losses or ":" not in name}


def finetuning(data: Path, **training: Any) -> FinetuneConfig:
    return small_config(data, **({"steps": 14} | training))


def varied(data: Path, **training: Any) -> FinetuneConfig:
    # A batch of 3 clips over 4 workers leaves the last one without a row.
    config = add_linear_paths(small_config(data, steps=15, **training))
    config.model.drop_path = 0.3
    return config


def pretraining(data: Path, **training: Any) -> FinetuneConfig:
    config = small_pretraining(data, **({"steps": 12} | training))
    # A batch of one leaves the second worker without a row.
    config.tasks["masked_video"].batch_size = config.tasks["masked_text"].batch_size = 1
    config.model.drop_path = 0.3 if "ema" in training else 0.0
    return config.joint()


BF16 = {"precision": "bf16", "ema": 0.9}
#: A contrastive loss compares the rows of all parts of all workers.
IN_PARTS = {"micro_batch_size": 2, "kept_tokens": 0}
WHOLE: Parts = [(1, None)]


@pytest.fixture(scope="module")
def train_whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Weights]:
    """Return weights and last losses of an undisturbed run, which several cases compare with."""
    done: dict[str, Weights] = {}

    def train(config: FinetuneConfig, whole: Parts) -> Weights:
        key = f"{config} {whole}"
        if key not in done:
            done[key] = train_parts(config, tmp_path_factory.mktemp("whole") / "run", whole)
        return done[key]

    return train


@pytest.mark.parametrize(
    ("make", "whole", "parts", "settings", "extra"),
    [
        # In float32: test_faults.py, with kills in place of stops.
        *(
            pytest.param(finetuning, [(n, None)], [(n, 5), (n, 9), (n, None)], BF16, {})
            for n in (1, 2)
        ),
        pytest.param(pretraining, WHOLE, [(1, 4), (1, None)], BF16, {}),
        *(
            pytest.param(finetuning, WHOLE, [(a, 6), (b, None)], {}, {})
            for a, b in ((1, 2), (4, 1))
        ),
        *(pytest.param(varied, WHOLE, [(n, None)], {}, {}) for n in (2, 4)),
        pytest.param(varied, WHOLE, [(2, None)], {}, IN_PARTS),
        pytest.param(pretraining, WHOLE, [(2, None)], {}, {}),
    ],
)
def test_a_run_in_parts_on_any_workers_equals_a_whole_one(
    make: Callable[..., FinetuneConfig],
    whole: Parts,
    parts: Parts,
    settings: dict[str, Any],
    extra: dict[str, Any],
    data: Path,
    tmp_path: Path,
    train_whole: Callable[..., Weights],
) -> None:
    """To the bit with as many workers, in float64 with others."""
    expected = train_whole(make(data, **settings), whole)
    found = train_parts(make(data, **settings, **extra), tmp_path / "parts", parts)
    if len(parts) > 1:
        expected = {name: x for name, x in expected.items() if ":" not in name}
    assert found.keys() == expected.keys()
    exact = {} if "precision" not in settings else {"rtol": 0, "atol": 0}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **({"rtol": 1e-9, "atol": 1e-9} | exact))
    if len(parts) == 1:
        last = "masked_text/loss" if make is pretraining else "text_to_video/loss"
        assert any(name.endswith(last) for name in found)
        torch.manual_seed(0)
        fresh = build_model(make(data, **settings)).double()
        assert any(not torch.equal(x, found[name]) for name, x in fresh.named_parameters())


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
    assert load_file(plain)["bytes_reduced"] > 0
    assert same(read_weights(plain), read_weights(offloaded))
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
    assert same(whole.model.state_dict(), parts.model.state_dict())


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
    assert same(whole.model.state_dict(), parts.model.state_dict())


def watch_unused(rank: int, world: int, config: FinetuneConfig, run: str, stop: int | None) -> None:
    """Train, and write which private pages hold weights of skills that no task activates."""
    model = train_model(ResolvedRun(config, Path(run)), rank=rank, world=world, stop_at=stop).model
    used = model.required_files("text_classification")
    names = [n for n, _ in model.named_parameters() if model.file_of(n).startswith("skill-")]
    unused = [model.get_parameter(n) for n in names if model.file_of(n) not in used]
    assert unused
    for weight in unused:  # all pages are in memory
        weight.sum()
    dist.barrier()
    places = {weight.data_ptr() for weight in unused}
    pages: list[dict[str, Any]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and ":" not in words[0]:
            begin, end = (int(x, 16) for x in words[0].split("-"))
            held = [place for place in places if begin <= place < end]
            pages.append({"file": words[5] if len(words) > 5 else "", "held": len(held)})
        elif words[0] in ("Rss:", "Private_Clean:", "Private_Dirty:"):
            pages[-1][words[0]] = int(words[1])
    dist.barrier()
    found = [each for each in pages if each["held"]]
    assert sum(each["held"] for each in found) == len(places)
    Path(f"{run}-{rank}.json").write_text(json.dumps(found))


def test_workers_of_a_node_have_no_private_copy_of_unused_skills(
    data: Path, tmp_path: Path
) -> None:
    config = small_config(data, steps=4, precision="fp32")
    tasks = {"text_classification": config.model.tasks["text_classification"]}
    model = replace(config.model, tasks=tasks, dim=64, ffn_dim=128)
    trained = {"text_classification": config.tasks["text_classification"]}
    config = replace(config, model=model, tasks=trained)
    run = tmp_path / "run"
    for stop in (2, None):  # random weights, then those of the checkpoint
        run_ranks(2, watch_unused, config, str(run), stop)
        one, other = (json.loads(Path(f"{run}-{rank}.json").read_text()) for rank in (0, 1))
        assert {each["file"] for each in one} == {each["file"] for each in other}
        for each in (*one, *other):
            assert each["file"].startswith(str(run))
            assert each["Rss:"] > 0
            assert each["Private_Clean:"] + each["Private_Dirty:"] == 0, each
