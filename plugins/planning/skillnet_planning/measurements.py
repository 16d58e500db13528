"""Rates and steps of a GPU that ``make gpu`` has measured, for plans of runs on it.

The labels below connect the rows of ``benchmarks.gpu`` with :func:`read_measurements`. A step is
found again by :func:`describe_step`: the sizes of its model and its rows decide its time.
"""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines.training.config.run import FinetuneConfig
from skillnet_platform.cluster.gpu_types import GpuType
from skillnet_platform.config import digest_config, to_dict
from skillnet_platform.errors import UserError

#: Rows with rates of products and copies, of launches in a step, and of sums over GPUs.
PRODUCTS, COPIES = "products in ", "copies, "
LAUNCH, SUMS = "launch in a step", "sums over "
#: Fields of ``GpuType`` that are measured.
RATES = ("bf16_tflops", "fp32_tflops", "bandwidth_gb_s", "link_gb_s")
#: Columns that a file of measurements has.
_COLUMNS = ("part", "measured", "unit", "value", "setting")


def describe_step(
    config: FinetuneConfig, task: str, rows: int, part: int | None, is_compiled: bool
) -> str:
    """Return what decides the time of a step: the digest of its model and task, and its rows.

    Args:
        config: settings of the run.
        task: name of the task.
        rows: rows of the worker.
        part: rows that are computed at a time; None, or not fewer, computes all at once.
        is_compiled: whether the model is compiled.
    """
    model = to_dict(config.model)
    plan = model.pop("tasks", {}).get(task)
    kept = config.training.kept_tokens
    sizes = [config.system, model, plan, config.tasks[task].max_length, kept]
    at_once = rows if part is None else min(part, rows)
    kind = "compiled" if is_compiled else "eager"
    return f"{digest_config({'sizes': sizes})[:12]}, {rows} rows, {at_once} at a time, {kind}"


@dataclass(frozen=True)
class Measurements:
    """What was measured on a card.

    Args:
        path: file of the rows.
        rates: fields of ``GpuType`` -> measured rate.
        launch_s: seconds of the host per operation of a step; None if it was not measured.
        steps: see :func:`describe_step` -> seconds of the step.
    """

    path: Path
    rates: Mapping[str, float] = field(default_factory=dict)
    launch_s: float | None = None
    steps: Mapping[str, float] = field(default_factory=dict)

    def apply(self, gpu: GpuType) -> GpuType:
        """Return a type of GPU with the measured rates in place of those of its data sheet."""
        known = {name: self.rates.get(name, getattr(gpu, name)) for name in RATES}
        return replace(gpu, **known)


def read_measurements(path: Path) -> Measurements:
    """Read a CSV of ``make gpu``. The median of several rows of one thing counts.

    Args:
        path: the file.

    Raises:
        UserError: it is missing, no such file, or has no rates.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows, columns = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--measurements {path}: cannot be read: {error}") from None
    if absent := [each for each in _COLUMNS if each not in columns]:
        raise UserError(
            f"--measurements {path}: it has no column {absent[0]!r}. Give a file of make gpu"
        )
    found: dict[str, list[float]] = defaultdict(list)
    steps: dict[str, list[float]] = defaultdict(list)
    for number, row in enumerate(rows, 2):
        try:
            value = float(row["value"])
        except (TypeError, ValueError):
            raise UserError(
                f"--measurements {path}, line {number}: {row['value']!r} is no number"
            ) from None
        if not 0 < value < math.inf:
            continue
        if row["unit"] == "s per step":
            steps[row["setting"]].append(value)
        elif name := _find_rate(row["measured"]):
            found[name].append(value)
    launches = found.pop("launch", None)
    rates = {name: _choose_rate(name, values) for name, values in found.items()}
    if not rates:
        raise UserError(
            f"--measurements {path}: it has no rates. Measure them: python -m benchmarks.gpu rates"
        )
    return Measurements(
        path,
        rates,
        None if launches is None else statistics.median(launches) * 1e-6,
        {setting: statistics.median(values) for setting, values in steps.items()},
    )


def _find_rate(measured: str) -> str | None:
    """Return the field of ``GpuType`` that a row measures, or ``launch``; None for another row."""
    if measured.startswith(SUMS):
        return "link_gb_s"
    return {
        f"{PRODUCTS}bfloat16": "bf16_tflops",
        f"{PRODUCTS}float32": "fp32_tflops",
        f"{COPIES}device": "bandwidth_gb_s",
        LAUNCH: "launch",
    }.get(measured)


def _choose_rate(name: str, values: Sequence[float]) -> float:
    # Small sums are slower, and those of a step are joined to large ones.
    return max(values) if name == "link_gb_s" else statistics.median(values)
