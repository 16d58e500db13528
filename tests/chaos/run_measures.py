"""What a disturbance cost a run: its weights, steps, seconds and metrics, read from its folder."""

import json
from pathlib import Path
from typing import Any


def tensors(run: Path, steps: int) -> dict[str, Any]:
    """All tensors of a run's checkpoint of that step: weights, their averages, optimiser state."""
    from safetensors.torch import load_file

    last = run / "checkpoints" / f"step-{steps:08d}"
    return {
        f"{path.name}:{name}": value
        for path in sorted(last.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal names, and equal tensors to the bit."""
    import torch

    return (
        bool(one)
        and one.keys() == other.keys()
        and all(torch.equal(one[name], other[name]) for name in one)
    )


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def recovery(progress: Path) -> tuple[int, float]:
    """(Steps done again, seconds until the run was where it had been) of a disturbed run."""
    lost, seconds, reached, last, since = 0, 0.0, -1, 0.0, 0.0
    for line in progress.read_text(encoding="utf-8").splitlines():
        reported = json.loads(line)
        if "losses" not in reported:
            continue
        if reported["losses"] == "" and last:
            lost += max(reached - reported["step"], 0)
            since = last
        if since and reported["step"] >= reached:
            seconds, since = seconds + reported["time"] - since, 0.0
        reached, last = max(reached, reported["step"]), reported["time"]
    return lost, round(seconds, 1)


def metrics(config: Any, run: Path, again: int) -> tuple[int, int]:
    """(Points that the tracker lacks, points too many) of a run."""
    from pipelines.training.runs.progress_log import read_metric_history
    from skillnet_platform import tracking
    from skillnet_platform.tracking import backend

    uri = config.tracking.uri
    tracking.send_leftover_spools(uri)
    run_id = json.loads((run / "run.json").read_text(encoding="utf-8"))["run_id"]
    client = backend.create_client(uri)
    lost = doubled = 0
    for name, points in read_metric_history(run / "progress.jsonl").items():
        reported = [point.step for point in client.get_metric_history(run_id, name)]
        lost += len({step for step, _ in points} - set(reported))
        # A repeated step is logged again, with its own time.
        doubled += max(len(reported) - len(set(reported)) - again, 0)
    return lost, doubled
