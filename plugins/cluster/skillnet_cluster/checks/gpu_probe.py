"""Probe of the GPUs of a node, and a sum over two ranks, each in a process of its own.

``python -m skillnet_cluster.checks.gpu_probe devices`` prints observations as JSON, and
``… sum RANK WORLD ADDRESS BACKEND DEVICE`` takes part in a sum. A driver that crashes or hangs
ends only that process, and no CUDA context stays in a worker of Ray. :func:`probe_gpus` and
:func:`run_sum` start them; the probes of the nodes call both.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from skillnet_platform.errors import first_line

#: Seconds for the answer of a process: it imports torch and starts CUDA.
PROCESS_TIMEOUT_S = 120.0
#: Seconds that two ranks wait for each other.
RENDEZVOUS_TIMEOUT_S = 60.0
#: Width of the product of the probe. Sums of as many ones are exact in bf16.
PRODUCT_WIDTH = 256

RunProcess = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class GpuDevice:
    """One GPU as torch sees it.

    Args:
        name: identifier of the device, such as ``NVIDIA L4``.
        capability: compute capability.
        total_bytes: memory.
        free_bytes: free memory.
        product_problem: error of a product of bf16 matrices; empty if it is right.
    """

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    product_problem: str = ""


@dataclass(frozen=True)
class GpuProbe:
    """Build of torch on a node, and the GPUs that it finds.

    Args:
        build: version of torch with its local part, such as ``2.13.0+cu128``.
        cuda: version of CUDA that torch was built for; empty for a build without CUDA.
        driver: version of the driver; empty if ``nvidia-smi`` does not answer.
        devices: GPUs.
        problem: why torch finds no GPU, or why the probe failed; empty otherwise.
    """

    build: str = ""
    cuda: str = ""
    driver: str = ""
    devices: tuple[GpuDevice, ...] = ()
    problem: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GpuProbe":
        """Build a probe from plain values of another process."""
        devices = tuple(
            GpuDevice(**{**each, "capability": tuple(each["capability"])})
            for each in values.get("devices", ())
        )
        return cls(**{**values, "devices": devices})


def probe_gpus(run: "RunProcess | None" = None) -> GpuProbe:
    """Probe the GPUs of this node in a process of its own.

    Args:
        run: runs the process; for tests.
    """
    try:
        return GpuProbe.from_dict(json.loads((run or _run_process)(["devices"])))
    except (RuntimeError, ValueError, OSError) as error:
        return GpuProbe(problem=first_line(error))


def run_sum(
    rank: int, world: int, address: str, backend: str, device: int, run: "RunProcess | None" = None
) -> str:
    """Take part in a sum over several processes; return the error or "".

    Args:
        rank: index of this process among the workers, from 0.
        world: number of ranks.
        address: ``HOST:PORT`` of rank 0.
        backend: ``nccl`` or ``gloo``.
        device: number of the GPU for ``nccl``.
        run: runs the process; for tests.
    """
    words = ["sum", str(rank), str(world), address, backend, str(device)]
    try:
        answer = json.loads((run or _run_process)(words))
    except (RuntimeError, ValueError, OSError) as error:
        return first_line(error)
    return str(answer["problem"])


def _run_process(words: Sequence[str]) -> str:
    """Run this module in another process; return the last line of its output.

    Raises:
        RuntimeError: it failed or did not end in time.
    """
    # Ray hides the GPUs from a task that reserves none, and the probe must not wait for a free one.
    environment = {key: x for key, x in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    # -P: the working directory may hold a file with the name of a library.
    command = [sys.executable, "-P", "-m", "skillnet_cluster.checks.gpu_probe", *words]
    paths = [each for each in sys.path if each]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROCESS_TIMEOUT_S, env=environment
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {PROCESS_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(lines[-1])
    return done.stdout.strip().rsplit("\n", 1)[-1]


def list_devices() -> dict[str, Any]:
    """Return the observations of a :class:`GpuProbe` as plain values, from this process."""
    import torch

    found: dict[str, Any] = {
        "build": str(torch.__version__),
        "cuda": torch.version.cuda or "",
        "driver": _driver_version(),
        "devices": [],
        "problem": "",
    }
    try:
        torch.cuda.init()
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            found["devices"].append(
                {
                    "name": torch.cuda.get_device_name(number),
                    "capability": torch.cuda.get_device_capability(number),
                    "total_bytes": total,
                    "free_bytes": free,
                    "product_problem": multiply_ones(f"cuda:{number}"),
                }
            )
    # torch raises several types, AssertionError for a build without CUDA.
    except Exception as error:
        found["problem"] = first_line(error)
    return found


def multiply_ones(device: str) -> str:
    """Multiply bf16 matrices of ones on a device; return the error or "".

    Args:
        device: such as ``cuda:0`` or ``cpu``.
    """
    import torch

    try:
        ones = torch.ones(PRODUCT_WIDTH, PRODUCT_WIDTH, dtype=torch.bfloat16, device=device)
        product = (ones @ ones).float()
        wrong = int((product != PRODUCT_WIDTH).sum())
    except Exception as error:
        return first_line(error)
    return f"{wrong} wrong numbers in a product of bf16 matrices" if wrong else ""


def sum_ranks(rank: int, world: int, address: str, backend: str, device: int) -> str:
    """Add up a tensor over the ranks of a new process group; return the error or "".

    Args:
        rank: index of this process among the workers, from 0.
        world: number of ranks.
        address: ``HOST:PORT`` of rank 0.
        backend: ``nccl`` or ``gloo``.
        device: number of the GPU for ``nccl``.
    """
    import torch
    import torch.distributed as dist

    try:
        place = torch.device("cuda", device) if backend == "nccl" else torch.device("cpu")
        if place.type == "cuda":
            torch.cuda.set_device(place)
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT_S),
        )
        x = torch.full((1024,), float(rank + 1), device=place)
        dist.all_reduce(x)
        expected = world * (world + 1) / 2
        problem = "" if bool((x == expected).all()) else f"the sum is {x[0]:g}, not {expected:g}"
        dist.barrier()
    except Exception as error:
        return first_line(error)
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    return problem


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def answer_request(words: Sequence[str]) -> dict[str, Any]:
    """Return the observations that the arguments of this module request.

    Args:
        words: ``devices``, or ``sum`` with its arguments.
    """
    if words[0] == "devices":
        return list_devices()
    rank, world, address, backend, device = words[1:]
    return {"problem": sum_ranks(int(rank), int(world), address, backend, int(device))}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(answer_request(sys.argv[1:])) + "\n")
