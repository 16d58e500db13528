"""Training steps and inference on fake CUDA tensors: devices, host waits, copies, operations.

Each case has its numbers in ``tests/golden/fake_cuda.json``. They may only get smaller:
``SKILLNET_WRITE_GOLDEN=1 pytest tests/unit/pipelines/training/loop/test_fake_cuda.py`` writes
smaller numbers and new cases, and rejects larger ones. Decision 48 lists the waits that remain.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_cuda.library import build_library
from tests.helpers.small_corpora import write_corpora

ROOT = Path(__file__).parents[5]
GOLDEN = ROOT / "tests" / "golden" / "fake_cuda.json"

Census = dict[str, dict[str, Any]]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Census:
    """All cases, measured in a process of its own: the fake device would stay in this one."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("no Linux or no g++, which compiles the fake device")
    folder = tmp_path_factory.mktemp("fake-cuda")
    library, out = build_library(folder), folder / "census.json"
    corpora = write_corpora(folder / "corpora", pretrain=20)
    command = [sys.executable, "-m", "tests.helpers.fake_cuda.census", library, corpora, out]
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: Census = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def census(report: Census) -> Census:
    """The cases of the table."""
    others = ("waiting on purpose", "offloaded")
    return {name: case for name, case in report.items() if not name.startswith(others)}


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, int]]:
    """Case -> its largest numbers."""
    stored: dict[str, dict[str, int]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return stored


def count(name: str, case: dict[str, Any]) -> dict[str, int]:
    numbers = {"waits": sum(case["waits"].values()), "operations": case["operations"]}
    # Of small models, the bytes of activations would hide those of weights.
    return numbers | ({"megabytes": case["megabytes"]} if "at base size" in name else {})


def test_waits_are_seen(report: Census) -> None:
    case = report["waiting on purpose"]
    reasons = {place.split(" at ")[0]: count for place, count in case["waits"].items()}
    assert reasons == {
        "item()": 1,
        "index by a mask": 1,
        "index_put by a mask": 1,
        "nonzero()": 1,
        "bincount": 2,
        "copy to the host": 1,
    }
    assert len(case["blocking_copies"]) == 1


def test_devices_do_not_mix(census: Census) -> None:
    """torch's fake tensors reject an operation on two devices, as a GPU does."""
    assert {name: case["error"] for name, case in census.items() if "error" in case} == {}
    # An operation on tensors of the CPU means that a tensor has not moved with its model or batch.
    on_host = {name: case["cpu_operations"] for name, case in census.items()}
    assert {name: found for name, found in on_host.items() if found} == {}


def test_memory_follows_the_active_skills(report: Census) -> None:
    """With ``training.sharding`` host, on eight ranks."""
    small, large = (report[f"offloaded with {count} skills"] for count in (7, 200))
    assert large.pop("weight_bytes") > 20 * small.pop("weight_bytes")
    assert large["peak_bytes"] == small["peak_bytes"] > 0
    for case in (small, large):
        assert not any(case[key] for key in ("waits", "blocking_copies", "cpu_operations"))


def test_copies_to_the_device_are_asynchronous(census: Census) -> None:
    found = {name: case["blocking_copies"] for name, case in census.items()}
    assert {name: places for name, places in found.items() if places} == {}


def test_padded_rows_take_flash_attention(census: Census) -> None:
    """Other kernels take a bias: in fp32, in inference, and in the encoders of libraries."""
    biased = {name for name, case in census.items() if case["biased"]}
    others = ("specialist", "skillnet text_to_image fp32")
    steps = {name for name in biased if "inference" not in name and not name.startswith(others)}
    assert steps == set()
    assert "skillnet text_classification inference" in biased


def test_waits_and_operations_only_decrease(census, table):
    found = {name: count(name, case) for name, case in census.items()}
    larger = {
        name: (numbers, table[name], census[name]["waits"])
        for name, numbers in found.items()
        # Libraries change the operations of their encoders a little from version to version.
        if name in table
        and (
            numbers["waits"] > table[name]["waits"]
            or any(numbers[key] > 1.02 * table[name][key] for key in numbers.keys() - {"waits"})
        )
    }
    assert larger == {}
    if os.environ.get("SKILLNET_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    assert found.keys() == table.keys()
    smaller = {n: found[n]["waits"] for n in found if found[n]["waits"] < table[n]["waits"]}
    assert smaller == {}, "fewer waits: write the table again"


def test_all_systems_wait_equally(table: dict[str, dict[str, int]]) -> None:
    """A comparison of systems must not compare how well they are programmed."""
    for name, numbers in table.items():
        _, case = name.split(" ", 1)
        if f"skillnet {case}" in table:
            assert numbers["waits"] == table[f"skillnet {case}"]["waits"], name


def test_steps_wait_only_in_the_kernel_of_ctc(table: dict[str, dict[str, int]]) -> None:
    """Results of inference go to the host."""
    waiting = [name for name, numbers in table.items() if numbers["waits"]]
    assert [n for n in waiting if "inference" not in n and "speech_recognition" not in n] == []
