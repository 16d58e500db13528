"""The table of docs/reliability.md: which runs have the weights of a run on one rank.

``SKILLNET_WRITE_GOLDEN=1 pytest tests/integration/test_numbers_table.py`` writes it.
"""

import os
import platform
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.training.config.run import FinetuneConfig
from tests.helpers.small_corpora import small_config
from tests.integration.ranks import run_ranks, train_and_save
from tools.docs import page_marks

pytestmark = pytest.mark.integration

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
STEPS = 10
#: Largest difference of a weight in float64 that counts as rounding; weights are of the order of 1.
ROUNDING = 1e-10

#: Column -> parts of a run, each with its ranks and the step before which it stops.
COLUMNS: dict[str, list[tuple[int, int | None]]] = {
    "1 rank": [(1, None)],
    "2 ranks": [(2, None)],
    "4 ranks": [(4, None)],
    "1, then 4": [(1, 4), (4, None)],
    "4, then 2": [(4, 4), (2, None)],
}


@dataclass(frozen=True)
class Variant:
    """A row of the table: settings of the model and of the training beside those of a plain run.

    The run on one rank has those of ``schedule``, too.
    """

    training: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def make(self, data: Path, **training: Any) -> FinetuneConfig:
        config = small_config(data, steps=STEPS, **self.schedule, **training)
        for key, value in self.model.items():
            setattr(config.model, key, value)
        return config


VARIANTS = {
    "whole batches": Variant(),
    "parts of 2 rows, activations computed again": Variant(
        {"micro_batch_size": 2, "kept_tokens": 0}
    ),
    "stochastic depth, 0.3": Variant(model={"drop_path": 0.3}),
    "`sharding: full`": Variant({"sharding": "full"}),
    "`sharding: hybrid`, two ranks a node": Variant({"sharding": "hybrid"}),
    "`sharding: host`": Variant({"sharding": "host"}),
    "`tasks_per_step: 2`, an average": Variant(schedule={"tasks_per_step": 2, "ema": 0.9}),
    "`tasks_per_step: 4`, parts of 2 rows": Variant({"micro_batch_size": 2}, {"tasks_per_step": 4}),
}


def _train_rank(rank: int, world: int, *arguments: Any) -> None:
    platform.node = lambda: f"node-{rank // 2}"  # type: ignore[method-assign]
    train_and_save(rank, world, *arguments)


def _train(
    config: FinetuneConfig, parts: list[tuple[int, int | None]], folder: Path
) -> dict[str, torch.Tensor]:
    out = f"{folder}.safetensors"
    for world, stop in parts:
        part = deepcopy(config)
        if world == 1 and part.training.sharding in ("full", "hybrid"):
            part.training.sharding = "none"  # a single rank has nothing to divide
        run_ranks(world, _train_rank, part, str(folder), out, stop)
    return {name: x for name, x in load_file(out).items() if "." in name and ":" not in name}


def _compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """Return the cell of a run; raise AssertionError if it is not equal."""
    assert found.keys() == expected.keys()
    difference = max(float((found[name] - x).abs().max()) for name, x in expected.items())
    assert difference <= ROUNDING
    return "equal" if difference == 0 else "rounding"


@pytest.mark.slow("test_resume.py::test_a_run_in_parts_on_any_workers_equals_a_whole_one")
def test_the_table_of_numbers_is_true(data: Path, tmp_path: Path) -> None:
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for number, (name, variant) in enumerate(VARIANTS.items()):
        alone = _train(variant.make(data), COLUMNS["1 rank"], tmp_path / f"alone-{number}")
        cells = []
        for column, parts in COLUMNS.items():
            folder = tmp_path / f"{number}-{column}"
            found = _train(variant.make(data, **variant.training), parts, folder)
            cells.append(_compare(found, alone))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if os.environ.get("SKILLNET_WRITE_GOLDEN"):
        page_marks.put(PAGE, "numbers", "\n".join(lines))
    assert page_marks.between(PAGE, "numbers").splitlines() == lines
