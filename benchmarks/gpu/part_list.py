"""Parts of ``make gpu``, in the order of their worth: what is lost with an hour is at the end."""

from functools import partial

from benchmarks.gpu import device_parts, rank_parts, run_parts, step_parts
from benchmarks.gpu.bench import GpuBench, MeasuredPart

#: Presets whose tasks are measured; see :meth:`GpuBench.read_preset`.
PRESETS = ("base", "paper")


def list_parts(devices: int, bench: GpuBench) -> dict[str, MeasuredPart]:
    """Return name -> part.

    Args:
        devices: GPUs of this machine.
        bench: device and sizes.
    """
    parts: dict[str, MeasuredPart] = {
        "rates": device_parts.measure_rates,
        "launches": device_parts.measure_launches,
        "parity": device_parts.compare_devices,
        "waits": device_parts.measure_waits,
    }
    tasks = {preset: list(bench.read_preset(preset).trained) for preset in PRESETS}
    eager = {
        f"steps/{preset}/eager/{task}": partial(step_parts.measure_steps, preset=preset, task=task)
        for preset in PRESETS
        for task in tasks[preset]
    }
    compiled = {
        name.replace("eager", "compiled"): partial(part, is_compiled=True)
        for name, part in eager.items()
    }
    parts |= eager | {"traces": partial(step_parts.trace_steps, preset="base")} | compiled
    parts |= {
        "loader": run_parts.measure_loader,
        "checkpoints": run_parts.measure_checkpoints,
        "runs": run_parts.measure_runs,
        "swaps": run_parts.measure_swaps,
        "restart": run_parts.measure_restart,
    }
    counts = [each for each in (1, 2, 4, 8) if each <= devices]
    if devices > 1:
        parts["sums"] = partial(rank_parts.measure_sums, world=devices)
        for world in counts:
            for sharding in ("none", "full", "hybrid")[: 1 if world == 1 else 3]:
                for precision in ("fp32", "bf16"):
                    parts[f"sharding/{world}/{sharding}/{precision}"] = partial(
                        rank_parts.measure_training,
                        world=world,
                        sharding=sharding,
                        precision=precision,
                    )
    for task in bench.read_preset("pretraining").trained:
        parts[f"steps/pretraining/eager/{task}"] = partial(
            step_parts.measure_steps, preset="pretraining", task=task
        )
    return parts | {"demo": run_parts.run_demo}
