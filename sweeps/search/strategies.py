"""How a sweep walks through its space: every combination, random draws, or Optuna.

A configuration is run once per seed, and its score is the mean over its seeds. Optuna proposes a
configuration, all its seeds are run, and then it is told the mean: it never takes the noise of
seeds for a difference. With halving each *trial* is judged by itself; a configuration some of
whose trials were stopped counts with the scores they had when they were stopped.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.config.run import FinetuneConfig
from skillnet_platform.errors import UserError
from sweeps.search.space import SearchPoint, SearchSpace
from sweeps.trials.source import PROPOSALS
from sweeps.trials.trial import Trial, TrialOutcome

#: Points that are tried for fit before Optuna starts.
NUM_PROBES = 8

SPLITS = ("validation",)


@dataclass(frozen=True)
class CandidateConfiguration:
    """A point of the space and the run that it means.

    Args:
        name: short; names the group of its trials.
        point: value per dimension.
        config: the run; its seed is set per trial.
        settings: flat key -> value of all that sets it apart.
    """

    name: str
    point: SearchPoint
    config: FinetuneConfig
    settings: dict[str, Any]

    def make_trials(self, seeds: Sequence[int]) -> list[Trial]:
        """One trial per seed."""
        return [
            Trial(
                f"{self.name}-seed{seed}",
                replace(self.config, seed=seed),
                splits=SPLITS,
                group=self.name,
                settings=self.settings,
                brief=True,
            )
            for seed in seeds
        ]


#: Gives the run of a point its final width.
ConfigFinisher = Callable[[FinetuneConfig], FinetuneConfig]


def build_candidate(
    space: SearchSpace, index: int, point: SearchPoint, finish: ConfigFinisher
) -> CandidateConfiguration:
    """The configuration of a point.

    Raises:
        UserError: values that do not go together, or no width at the fixed cost.
    """
    plain = space.apply_point(point)
    config = finish(plain)
    settings = dict(point)
    for width in ("ffn_dim", "dim"):
        key = f"model.{width}"
        if getattr(config.model, width) != getattr(plain.model, width):
            settings[key] = getattr(config.model, width)
    return CandidateConfiguration(f"{index:03d}", point, config, settings)


def configurations_from_points(
    space: SearchSpace, points: Iterable[SearchPoint], finish: ConfigFinisher
) -> list[CandidateConfiguration]:
    """The configurations of points that are known from the start.

    Raises:
        UserError: one of them cannot be built; nothing has started yet.
    """
    made = [build_candidate(space, index, point, finish) for index, point in enumerate(points)]
    if not made:
        raise UserError("the space is empty: give it at least one key with a value")
    return made


class OptunaSource:
    """A source that Optuna guides (Akiba et al. 2019), through Tune's adapter.

    Args:
        space: of the sweep.
        count: configurations in all.
        seeds: of each configuration.
        seed: of the sampler.
        finish: see :func:`build_candidate`.
        folder: of the sweep; what was proposed is kept there.
    """

    def __init__(
        self,
        space: SearchSpace,
        count: int,
        seeds: Sequence[int],
        seed: int,
        finish: ConfigFinisher,
        folder: Path,
    ) -> None:
        self._space, self._num_configurations, self._seeds, self._finish = (
            space,
            count,
            list(seeds),
            finish,
        )
        self._proposals_path = folder / PROPOSALS
        self._search, self._categories = _build_optuna_search(space, seed)
        self._candidates: dict[str, CandidateConfiguration] = {}
        self._stored_points = _read_proposals(self._proposals_path)
        self._queue: list[Trial] = []
        self._scores: dict[str, list[float | None]] = {}
        #: Configurations of this process, which Optuna itself asked to be run.
        self._proposed_here: set[str] = set()
        self.total = count * len(self._seeds)
        self.example = self._probe()

    def next_trial(self) -> Trial | None:
        """The next trial: of what was proposed before the driver was killed, then of new ones."""
        if not self._queue and len(self._candidates) < self._num_configurations:
            self._queue = self._propose().make_trials(self._seeds)
        return self._queue.pop(0) if self._queue else None

    def is_exhausted(self) -> bool:
        """Whether all configurations have been proposed."""
        return not self._queue and len(self._candidates) >= self._num_configurations

    def record_outcome(self, outcome: TrialOutcome) -> None:
        """Optuna hears of a configuration when the last of its seeds has ended."""
        scores = self._scores.setdefault(outcome.group, [])
        scores.append(outcome.score if outcome.status != "failed" else None)
        if len(scores) < len(self._seeds):
            return
        good = [score for score in scores if score is not None]
        name = outcome.group
        if name in self._proposed_here:
            told = {"score": fmean(good)} if good else None
            self._search.on_trial_complete(name, told, error=not good)
        elif good:
            self._search.add_evaluated_point(
                self._encode_point(self._candidates[name].point), fmean(good)
            )

    def _propose(self) -> CandidateConfiguration:
        index = len(self._candidates)
        name = f"{index:03d}"
        if index < len(self._stored_points):
            point = self._stored_points[index]
        else:
            point = self._decode_point(self._search.suggest(name))
            self._proposed_here.add(name)
            with self._proposals_path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(point, ensure_ascii=False) + "\n")
        self._candidates[name] = build_candidate(self._space, index, point, self._finish)
        return self._candidates[name]

    def _probe(self) -> Trial:
        """Try some points before anything starts: Optuna may propose any of the space."""
        first: Trial | None = None
        for index, point in enumerate(self._space.random_points(NUM_PROBES, 0)):
            made = build_candidate(self._space, index, point, self._finish)
            first = first or made.make_trials(self._seeds)[0]
        if first is None:
            raise UserError("the space is empty: give it at least one key with a value")
        return first

    def _encode_point(self, point: SearchPoint) -> dict[str, Any]:
        return {
            name: self._categories[name].index(value) if name in self._categories else value
            for name, value in point.items()
        }

    def _decode_point(self, given: dict[str, Any]) -> SearchPoint:
        return {
            name: self._categories[name][given[name]] if name in self._categories else given[name]
            for name in self._space.dimensions
        }


def _build_optuna_search(space: SearchSpace, seed: int) -> tuple[Any, dict[str, list[Any]]]:
    """Tune's Optuna search over the space, and the values that it knows by their number only."""
    try:
        from optuna.distributions import (
            BaseDistribution,
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )
        from optuna.logging import WARNING, set_verbosity
        from optuna.samplers import TPESampler
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as problem:  # pragma: no cover - a dependency
        raise UserError(f"search optuna needs the package optuna: {problem}") from None
    set_verbosity(WARNING)
    distributions: dict[str, BaseDistribution] = {}
    codes: dict[str, list[Any]] = {}
    for name, dimension in space.dimensions.items():
        if dimension.grid:
            raise UserError(f"space.{name}.grid: Optuna chooses every value itself; give choice")
        if dimension.range is None:
            codes[name] = dimension.values
            distributions[name] = CategoricalDistribution(list(range(len(dimension.values))))
            continue
        low, high = dimension.range
        log = dimension.kind.startswith("log")
        if dimension.kind.endswith("integer"):
            distributions[name] = IntDistribution(int(low), int(high), log=log)
        else:
            distributions[name] = FloatDistribution(float(low), float(high), log=log)
    sampler = TPESampler(seed=seed, n_startup_trials=8, multivariate=False)
    return OptunaSearch(distributions, metric="score", mode="max", sampler=sampler), codes


def _read_proposals(path: Path) -> list[SearchPoint]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # the driver was killed while it wrote
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
