"""GPUs of nodes: probes in processes of their own, findings about them, and sums by gloo."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

from plugins.cluster.tests.test_cluster_checks import ONE, TWO
from skillnet_cluster.checks import cluster as cluster_checks
from skillnet_cluster.checks import gpu_probe
from skillnet_cluster.checks.cluster import (
    SumRole,
    add_up_on_node,
    check_gpu_memory,
    check_gpus,
    check_sums,
    gpu_nodes,
    pair_nodes,
)
from skillnet_cluster.checks.gpu_probe import GpuDevice, GpuProbe, multiply_ones, probe_gpus
from skillnet_platform.cluster.gpu_types import GpuType, NodeType
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.errors import UserError
from tests.helpers.ports import free_port

L4 = GpuDevice("NVIDIA L4", (8, 9), 24_152_899_584, 23_000_000_000)
PROBE = GpuProbe("2.13.0+cu128", "12.8", "570.86", (L4,))
FIRST = replace(ONE, gpu=PROBE, free_port=1000)
SECOND = replace(TWO, gpu=PROBE, free_port=1001)
ASKED = ResourceRequest(2, 2)


def node(address: str, gpus: float) -> dict[str, Any]:
    return {"NodeManagerAddress": address, "Resources": {"CPU": 8, "GPU": gpus}}


def test_sound_gpus_are_one_finding() -> None:
    (finding,) = check_gpus([FIRST, SECOND], ASKED)
    assert finding.level == "ok"
    assert finding.seen == (
        "1 NVIDIA L4 with 22.5 GiB (21.4 GiB free), compute capability 8.9, driver 570.86, "
        "torch 2.13.0+cu128 on 2 nodes"
    )
    assert check_gpus([], ASKED) == []
    assert gpu_nodes([node("10.0.0.2", 1), node("10.0.0.1", 0)], [FIRST, SECOND]) == [SECOND]


def test_different_builds_of_torch_are_one_message() -> None:
    third = replace(SECOND, node="10.0.0.3")
    other = replace(SECOND, gpu=replace(PROBE, build="2.13.0+cu126"))
    (finding,) = check_gpus([FIRST, other, third], ASKED)
    assert (finding.check, finding.level) == ("torch build", "error")
    assert finding.seen == (
        "torch 2.13.0+cu128 on 10.0.0.1, 10.0.0.3; torch 2.13.0+cu126 on 10.0.0.2"
    )
    assert "one build of torch" in finding.advice


@pytest.mark.parametrize(
    ("probe", "level", "words"),
    [
        (
            GpuProbe("2.13.0+cpu", problem="Torch not compiled with CUDA enabled"),
            "error",
            "torch 2.13.0+cpu finds no GPU (Torch not compiled with CUDA enabled; no driver)",
        ),
        (
            replace(PROBE, devices=(), problem="the driver is too old"),
            "error",
            "finds no GPU (the driver is too old; driver 570.86)",
        ),
        (
            replace(PROBE, devices=(replace(L4, product_problem="3 wrong numbers"),)),
            "error",
            "10.0.0.1, GPU 0: 3 wrong numbers",
        ),
        (
            replace(PROBE, devices=(replace(L4, name="Tesla T4", capability=(7, 5)),)),
            "warning",
            "Tesla T4 has no bf16 products; precision auto is fp32",
        ),
    ],
)
def test_a_gpu_that_cannot_train_is_named(probe: GpuProbe, level: str, words: str) -> None:
    finding = check_gpus([replace(ONE, gpu=probe)], ASKED)[0]
    assert finding.level == level
    assert words in finding.seen


def test_the_run_must_fit_the_smallest_gpu_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GpuType] = []

    def problem(runs: list[str], gpu: GpuType) -> tuple[str, str] | None:
        assert runs == ["a run"]
        asked.append(gpu)
        return None if gpu.memory_gb > 20 else ("a needs 30 GB", "--training.micro_batch_size 8")

    def install(planner: Callable[[list[str], GpuType], tuple[str, str] | None]) -> None:
        entry = SimpleNamespace(load=lambda: planner)
        monkeypatch.setattr(cluster_checks, "find_entries", lambda group: {"memory": entry})

    install(problem)
    request = replace(ASKED, list_runs=lambda: ["a run"])
    (finding,) = check_gpu_memory([FIRST], [], request)
    assert finding.level == "ok"
    small = NodeType("gpu", {"GPU": 1}, 2, "g4dn.xlarge")
    (finding,) = check_gpu_memory([FIRST], [small, NodeType("data", {"CPU": 8}, 4)], request)
    assert (finding.level, finding.seen) == ("error", "a needs 30 GB")
    assert finding.advice == "use --training.micro_batch_size 8; see `skillnet plan`"
    assert [each.name for each in asked] == ["L4", "T4"]
    assert check_gpu_memory([], [], request) == check_gpu_memory([FIRST], [], ASKED) == []

    def unknown(runs: list[str], gpu: GpuType) -> tuple[str, str] | None:
        raise UserError("system moe: its operations depend on the data")

    install(unknown)
    (finding,) = check_gpu_memory([FIRST], [], request)
    assert finding.level == "warning"


def test_probes_survive_the_transfer_and_processes_that_die() -> None:
    sent = json.dumps(asdict(PROBE))
    assert probe_gpus(lambda words: sent) == PROBE

    def dies(words: Sequence[str]) -> str:
        raise RuntimeError("CUDA driver crashed")

    assert probe_gpus(dies).problem == "CUDA driver crashed"
    assert probe_gpus(lambda words: "not JSON").problem
    assert gpu_probe.run_sum(0, 2, "a:1", "gloo", 0, dies) == "CUDA driver crashed"


def test_a_product_is_compared_number_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert multiply_ones("cpu") == ""
    assert "nothing" in multiply_ones("nothing")
    monkeypatch.setattr(gpu_probe, "PRODUCT_WIDTH", 257)  # bf16 has no 257
    assert "wrong numbers" in multiply_ones("cpu")


def test_pairs_of_nodes_are_disjoint_and_complete() -> None:
    third = replace(ONE, node="10.0.0.3", gpu=PROBE, free_port=1002)
    assert pair_nodes([FIRST, SECOND], "nccl") == [
        {
            "10.0.0.1": SumRole((0,), "10.0.0.1:1000", "nccl", "10.0.0.2"),
            "10.0.0.2": SumRole((1,), "10.0.0.1:1000", "nccl", "10.0.0.1"),
        }
    ]
    rounds = pair_nodes([FIRST, SECOND, third], "gloo")
    assert [sorted(each) for each in rounds] == [["10.0.0.1", "10.0.0.2"], ["10.0.0.1", "10.0.0.3"]]
    assert pair_nodes([FIRST], "nccl") == pair_nodes([ONE], "gloo") == []
    two = replace(FIRST, gpu=replace(PROBE, devices=(L4, L4)))
    assert pair_nodes([two], "nccl")[0]["10.0.0.1"].ranks == (0, 1)


def test_a_failed_sum_names_both_nodes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("10.0.0.1", 1), node("10.0.0.2", 1)]
    answers = {"10.0.0.1": "timed out", "10.0.0.2": "timed out"}
    monkeypatch.setattr(cluster_checks, "run_on_nodes", lambda *_: (answers, []))
    (finding,) = check_sums(None, nodes, [FIRST, SECOND], ASKED)
    assert (finding.level, finding.seen) == (
        "error",
        "nccl between 10.0.0.1 and 10.0.0.2: timed out",
    )
    answers |= {"10.0.0.1": "", "10.0.0.2": ""}
    (finding,) = check_sums(None, nodes, [FIRST, SECOND], ASKED)
    assert finding.seen == "nccl: pairs of ranks add up on 2 nodes"
    without = [node("10.0.0.1", 0), node("10.0.0.2", 0)]
    (finding,) = check_sums(None, without, [ONE, TWO], ResourceRequest(2))
    assert finding.seen.startswith("gloo")
    assert check_sums(None, without, [ONE, TWO], ResourceRequest(1)) == []


@pytest.mark.integration
@pytest.mark.slow("test_gpu_checks.py::test_a_failed_sum_names_both_nodes_once")
def test_two_real_ranks_add_up_and_a_real_process_reports_its_torch() -> None:
    address = f"127.0.0.1:{free_port()}"
    role = SumRole((0, 1), address, "gloo", "127.0.0.1")
    assert add_up_on_node("127.0.0.1", {"127.0.0.1": role}) == ""
    import torch

    found = probe_gpus()
    assert found.build == torch.__version__
    assert bool(found.devices) == torch.cuda.is_available()
    assert found.devices or found.problem
