"""What the benchmarks compare computes the same, and what they report follows from the times."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch

from benchmarks import reading
from benchmarks.measure import (
    Result,
    in_turns,
    machine,
    ratio,
    rounds_of,
    side,
    timed,
    tree_cpu_time,
    write,
)
from benchmarks.training_step import DenseEncoder, LoopEncoder, Sizes, skillnet_step
from pipelines.data.shards.jpeg import encode_jpeg
from skillnet.encoder import Encoder
from tests.helpers.processes import make_counting
from tests.helpers.small_models import small_config
from tests.helpers.waiting import wait_until

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
    dense = DenseEncoder(config, len(PLAN) * config.ffn_dim, torch_attention).double()
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


def test_cpu_time_is_that_of_processes_started_and_ended_too() -> None:
    """A child that computes for 0.4 s of CPU, and is waited for, counts; one left out does not."""
    burn = "import time\nwhile time.process_time() < 0.4: pass"

    def work() -> None:
        subprocess.run([sys.executable, "-c", burn], check=True)

    took = timed(work)
    assert took.cpu >= 0.3
    assert took.wall >= 0.3

    begin = tree_cpu_time(["left out"])
    with subprocess.Popen(
        [sys.executable, "-c", f"{burn}\ninput()", "left out"], stdin=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        burned = psutil.Process(child.pid)
        wait_until(lambda: sum(burned.cpu_times()[:2]) >= 0.15, 60, pause=0.02)
        assert tree_cpu_time(["left out"]) - begin < 0.15
        # Sums of clock ticks of 0.01 s are not exact in binary.
        assert tree_cpu_time() - begin > 0.14
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.wait()


def test_an_epoch_of_every_contender_has_every_row(tmp_path: Path) -> None:
    """What reading compares gives the same pictures: ours and datasets', any order."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, reading.SHAPE, np.uint8) for _ in range(6)]
    cells = [encode_jpeg(picture) for picture in pictures]
    entries = reading.write_shards(cells, tmp_path)
    files = [pa.ipc.open_file(pa.memory_map(str(tmp_path / e["file"]))) for e in entries]
    ours = pa.concat_tables([file.read_all() for file in files])
    found = []
    for batches in (
        reading.shard_batches(ours, 0),
        reading.dataset_batches(reading.as_dataset(cells)),
    ):
        rows = {}
        for pixels, labels in batches:
            rows |= {int(label): each.numpy() for label, each in zip(labels, pixels, strict=True)}
        found.append(rows)
    assert sorted(found[0]) == sorted(found[1]) == list(range(6))
    assert all(np.array_equal(found[0][n], found[1][n]) for n in range(6))


def test_each_side_is_a_process_of_its_own() -> None:
    mine = [1]
    with side(make_counting, mine) as one, side(make_counting, mine) as other:
        took = rounds_of({"one": one, "other": other}, 2, 0.4)
    assert mine == [1], "what a side does to its arguments is nobody else's"
    assert {name: len(each) for name, each in took.items()} == {"one": 2, "other": 2}
    # What the other side computes meanwhile, or has computed before, is not in it.
    assert all(0.3 < took.cpu < 0.8 for each in took.values() for took in each)
