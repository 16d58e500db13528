"""What skills cost that no task of a run activates: nothing in a step, in memory or in a resume."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from tests.helpers.small_corpora import small_config

SEEN = Counter[str]()


class CountedName(str):
    """Name of a skill that counts how often anything looks at it."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        SEEN["names"] += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        SEEN["names"] += 1
        return str.__hash__(self)


def config_with(data: Path, further: int, **training: Any) -> FinetuneConfig:
    """Return a run whose model has further skills that no task activates."""
    config = small_config(data, **({"steps": 12, "precision": "fp32", "log_every": 99} | training))
    skills = (*config.model.skills, *(f"further{number}" for number in range(further)))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, skills=skills))


class StepCensus:
    """Callback that counts calls, names and walked parts of the model in some steps."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        """Nothing."""

    def on_step_start(self, step: int) -> None:
        """Count from the third step to the ninth: the first ones fill caches."""
        if step == 2:
            SEEN.clear()
            sys.setprofile(self._count)
        elif step == 9:
            sys.setprofile(None)
            self.found = Counter(SEEN)

    @staticmethod
    def _count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            SEEN["calls"] += 1


def _counted(method: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    def walk(*args: Any, **options: Any) -> Iterator[Any]:
        for each in method(*args, **options):
            SEEN["parts"] += 1
            yield each

    return walk


@pytest.mark.parametrize(("rank", "sharding"), [(0, "none"), (2, "none"), (0, "host")])
def test_a_step_looks_at_no_skill_that_its_task_does_not_activate(
    data: Path, rank: int, sharding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (nn.ParameterDict, nn.ModuleDict):
        for method in ("__iter__", "keys", "values", "items"):
            monkeypatch.setattr(kind, method, _counted(getattr(kind, method)))
    for method in ("named_parameters", "named_modules", "named_children", "named_buffers"):
        monkeypatch.setattr(nn.Module, method, _counted(getattr(nn.Module, method)))
    found = []
    for further in (0, 40):
        config = config_with(data, further, ema=0.9, sharding=sharding)
        names = tuple(CountedName(name) for name in config.model.skills)
        model = dataclasses.replace(config.model, skills=names, skill_rank=rank)
        census = StepCensus()
        train_model(ResolvedRun(dataclasses.replace(config, model=model)), callbacks=[census])
        found.append(census.found)
    assert found[0]["calls"] > 1000
    assert found[0]["names"] > 10
    assert found[1] == found[0]
