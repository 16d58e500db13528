"""What the benchmarks compare computes the same, and what they report follows from the times."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.encoders import DenseEncoder, LoopEncoder
from benchmarks.measure import Result, in_turns, machine, ratio, write
from benchmarks.training_step import Sizes, skillnet_step
from skillnet.encoder import Encoder
from tests.small_models import small_config

PLAN = ("general", "image", "text")


def test_the_loop_computes_what_skillnet_does() -> None:
    torch.manual_seed(0)
    ours = Encoder(small_config()).double()
    loop = LoopEncoder(small_config()).double()
    loop.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x, PLAN), loop(x, PLAN), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("torch_attention", [False, True])
def test_the_dense_encoder_computes_what_skillnet_does(torch_attention: bool) -> None:
    torch.manual_seed(0)
    config = small_config()
    ours = Encoder(config).double()
    dense = DenseEncoder(config, len(PLAN) * config.hidden, torch_attention).double()
    with torch.no_grad():
        for theirs, layer in zip(dense.layers, ours.layers, strict=True):
            attention, forward = layer.attention, layer.feedforward
            theirs["qkv"].copy_(attention.qkv.weight.merged(PLAN, torch.float64))
            theirs["out"].copy_(attention.out.weight.merged(PLAN, torch.float64))
            theirs["up"].copy_(forward.up.merged(PLAN, torch.float64))
            theirs["down"].copy_(forward.down.merged(PLAN, torch.float64))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x, PLAN), dense(x), rtol=1e-12, atol=1e-12)


def test_a_step_trains_the_active_skills_only() -> None:
    step = skillnet_step(Sizes(rows=2, tokens=3, dim=8, depth=1), 2)
    before = {name: p.detach().clone() for name, p in step.named}
    step()
    assert all(not torch.equal(p, before[name]) for name, p in step.named)
    skills = {name.rpartition(".")[2] for name, _ in step.named if ".weights." in name}
    assert skills == {"general", "text"}
    assert step.state_bytes() == sum(2 * p.numel() * 4 + 4 for _, p in step.named)


def test_contenders_take_turns() -> None:
    order: list[str] = []
    ticks = iter(range(100))
    seconds = in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        rounds=2,
        clock=lambda: float(next(ticks)),
        warmup=1,
    )
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_ratios_are_of_rounds_not_of_medians() -> None:
    assert ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == (2.0, 1.0, 3.0)


def test_results_say_whether_the_target_is_met(tmp_path: Path) -> None:
    results = [
        Result("a", "b", "ratio", 1.04, 1, 1.1, "<= 1.05"),
        Result("a", "c", "ratio", 2.4, 2, 2.6, ">= 2.5"),
        Result("a", "", "rows/s", 12345.678, 1, 2),
    ]
    path = write("some", results, 1, tmp_path)
    assert path.name.endswith("-some.csv")
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["met"] for row in rows] == ["yes", "no", ""]
    assert rows[2]["value"] == "12350.0"
    assert rows[0]["machine"] == machine()
    assert rows[0]["clock"] == "cpu"
