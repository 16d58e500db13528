"""Search strategies of a sweep: all combinations, random draws, or Optuna.

A configuration is trained once per seed, and its score is the mean over seeds. Optuna proposes a
configuration, all seeds are trained, and Optuna receives the mean, so that seed noise does not
count as a difference. ASHA judges each *trial* separately: a configuration with stopped trials
counts with their last scores.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from pipelines.training.config.run import FinetuneConfig
from skillnet_platform.errors import UserError
from sweeps.search.space import ConfigFinisher, SearchPoint, SearchSpace
from sweeps.trials.trial import PROPOSALS, Trial, TrialOutcome

#: Points that are built as a check before Optuna starts, at least.
NUM_PROBES = 8

#: Proposals of Optuna for one configuration, before a new point is drawn at random.
NUM_ASKS = 16

#: Proposals at random, before Optuna uses the scores.
NUM_RANDOM_PROPOSALS = 8

#: Splits on which trials are evaluated.
SPLITS = ("validation",)


@dataclass(frozen=True)
class CandidateConfiguration:
    """A point of the search space and its run.

    Args:
        name: short name; the group of its trials.
        point: value per dimension.
        config: the run; each trial sets its seed.
        settings: flat key -> value of everything that distinguishes it.
    """

    name: str
    point: SearchPoint
    config: FinetuneConfig
    settings: dict[str, Any]

    def make_trials(self, seeds: Sequence[int]) -> list[Trial]:
        """Return one trial per seed."""
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


def build_candidate(
    space: SearchSpace, index: int, point: SearchPoint, finish: ConfigFinisher
) -> CandidateConfiguration:
    """Return the configuration of a point.

    Args:
        space: the search space.
        index: number of the configuration, from which its name is made.
        point: value per dimension.
        finish: sets the final width of the run.

    Raises:
        UserError: the values are not compatible, or no width has the fixed cost.
    """
    plain = space.apply_point(point)
    config = finish(plain)
    settings = dict(point)
    for width in ("ffn_dim", "dim"):
        key = f"model.{width}"
        # A width set by ``finish`` is part of what distinguishes the configuration.
        if getattr(config.model, width) != getattr(plain.model, width):
            settings[key] = getattr(config.model, width)
    return CandidateConfiguration(f"{index:03d}", point, config, settings)


def configurations_from_points(
    space: SearchSpace, points: Iterable[SearchPoint], finish: ConfigFinisher
) -> list[CandidateConfiguration]:
    """Return the configurations of points that are known from the start, equal runs once.

    Args:
        space: the search space.
        points: value per dimension of each point.
        finish: sets the final width of a run.

    Raises:
        UserError: a configuration cannot be built; nothing has started yet.
    """
    candidates: list[CandidateConfiguration] = []
    seen: set[str] = set()
    for point in points:
        identity = space.identify_point(point)
        if identity not in seen:
            seen.add(identity)
            candidates.append(build_candidate(space, len(candidates), point, finish))
    if not candidates:
        raise UserError("the space is empty: give it at least one key with a value")
    return candidates


class OptunaSource:
    """A source of trials that Optuna proposes (Akiba et al. 2019), through ask and tell.

    A proposal depends on the seed, its number and the earlier outcomes, and on nothing else. So a
    resumed sweep proposes the points that an uninterrupted one would have proposed. A point that
    was proposed before is not trained again: Optuna proposes another one, or it is drawn.

    Args:
        space: the search space.
        count: number of configurations; a small space has fewer.
        seeds: seeds of each configuration.
        seed: seed of the sampler.
        finish: sets the final width of a run.
        folder: directory of the trials; proposals are stored there.
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
        self._space, self._seeds, self._finish = space, list(seeds), finish
        self.num_configurations = space.count_distinct(count)
        self._proposals_path = folder / PROPOSALS
        self._study, self._distributions, self._categories = _build_study(space)
        self._seed = seed
        self._candidates: dict[str, CandidateConfiguration] = {}
        self._stored_points = _read_proposals(self._proposals_path)
        self._queue: list[Trial] = []
        self._scores: dict[str, list[float | None]] = {}
        self._seen: set[str] = set()
        self._numbers: dict[str, int] = {}
        self.total = self.num_configurations * len(self._seeds)
        self.example = self._probe()

    def next_trial(self) -> Trial | None:
        """Return the next trial: first of stored proposals, then of new ones."""
        if not self._queue and len(self._candidates) < self.num_configurations:
            self._queue = self._propose().make_trials(self._seeds)
        return self._queue.pop(0) if self._queue else None

    def is_exhausted(self) -> bool:
        """Return whether all configurations have been proposed."""
        return not self._queue and len(self._candidates) >= self.num_configurations

    def record_outcome(self, outcome: TrialOutcome) -> None:
        """Report the mean score to Optuna when the last seed of a configuration has ended."""
        scores = self._scores.setdefault(outcome.group, [])
        # A failed seed counts as ended; otherwise Optuna would wait for it forever.
        scores.append(outcome.score if outcome.status != "failed" else None)
        # Optuna gets one mean for a configuration and not the noise of each seed (decision 13).
        if len(scores) < len(self._seeds):
            return
        good = [score for score in scores if score is not None and math.isfinite(score)]
        number = self._numbers[str(outcome.group)]
        if good:
            self._study.tell(number, fmean(good))
        else:
            self._study.tell(number, state=TrialState.FAIL)

    def count_repeats(self, group: str) -> int:
        """Return the number of trials of a configuration, which differ in their seeds."""
        return len(self._seeds)

    def _propose(self) -> CandidateConfiguration:
        index = len(self._candidates)
        name = f"{index:03d}"
        if index < len(self._stored_points):
            point = self._stored_points[index]
            # Asked for again, so that this study has the same trials as the one before the kill.
            self._numbers[name] = self._ask_for(point)
        else:
            self._study.sampler = _seed_sampler(self._seed, index)
            self._numbers[name], point = self._ask_new(index)
            # Stored before any trial starts, so that a killed sweep repeats the same points.
            with self._proposals_path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(point, ensure_ascii=False) + "\n")
        self._seen.add(self._space.identify_point(point))
        self._candidates[name] = build_candidate(self._space, index, point, self._finish)
        return self._candidates[name]

    def _ask_for(self, point: SearchPoint) -> int:
        """Return the number of a trial of Optuna's study with a given point."""
        self._study.enqueue_trial(self._encode_point(point))
        return self._study.ask(self._distributions).number

    def _ask_new(self, index: int) -> tuple[int, SearchPoint]:
        """Return the number of a trial of Optuna's study, and its point, which is new."""
        for _ in range(NUM_ASKS):
            trial = self._study.ask(self._distributions)
            point = self._decode_point(trial.params)
            if self._space.identify_point(point) not in self._seen:
                return trial.number, point
            # Optuna ignores a failed trial; the score of this point counts once.
            self._study.tell(trial, state=TrialState.FAIL)
        random = np.random.default_rng([self._seed, index])
        drawn = self._space.draw_unseen(random, self._seen)
        # The space has at least as many distinct points as configurations.
        assert drawn is not None
        return self._ask_for(drawn), drawn

    def _probe(self) -> Trial:
        """Build some points before anything starts, because Optuna may propose any point."""
        first: Trial | None = None
        # With twice as many points as values, a Latin hypercube contains every listed value.
        longest = max((len(d.values) for d in self._space.dimensions.values()), default=0)
        points = self._space.latin_hypercube_points(max(NUM_PROBES, 2 * longest), 0)
        for index, point in enumerate(points):
            candidate = build_candidate(self._space, index, point, self._finish)
            first = first or candidate.make_trials(self._seeds)[0]
        if first is None:
            raise UserError("the space is empty: give it at least one key with a value")
        return first

    def _encode_point(self, point: SearchPoint) -> dict[str, Any]:
        return {
            # Optuna stores plain categories only; an index stands for lists and dictionaries too.
            name: self._categories[name].index(value) if name in self._categories else value
            for name, value in point.items()
        }

    def _decode_point(self, suggestion: dict[str, Any]) -> SearchPoint:
        return {
            name: self._categories[name][suggestion[name]]
            if name in self._categories
            else suggestion[name]
            for name in self._space.dimensions
        }


def _build_study(
    space: SearchSpace,
) -> tuple[optuna.Study, dict[str, BaseDistribution], dict[str, list[Any]]]:
    """Return an empty study, its distributions, and the values that Optuna knows by index only."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, BaseDistribution] = {}
    categories: dict[str, list[Any]] = {}
    for name, dimension in space.dimensions.items():
        # A grid promises that every value is tried, which a sampler cannot keep.
        if dimension.grid:
            raise UserError(f"space.{name}.grid: Optuna chooses all values itself; give choice")
        if dimension.range is None:
            categories[name] = dimension.values
            distributions[name] = CategoricalDistribution(list(range(len(dimension.values))))
            continue
        low, high = dimension.range
        log = dimension.kind.startswith("log")
        if dimension.kind.endswith("integer"):
            distributions[name] = IntDistribution(int(low), int(high), log=log)
        else:
            distributions[name] = FloatDistribution(float(low), float(high), log=log)
    return optuna.create_study(direction="maximize"), distributions, categories


def _seed_sampler(seed: int, index: int) -> optuna.samplers.TPESampler:
    """Return the sampler of one proposal.

    A sampler has a random state that a killed process loses. With one sampler for the whole sweep
    a resumed sweep would draw the first points again.

    Args:
        seed: seed of the search.
        index: number of the proposal.
    """
    own = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    return optuna.samplers.TPESampler(
        seed=own, n_startup_trials=NUM_RANDOM_PROPOSALS, multivariate=False
    )


def _read_proposals(path: Path) -> list[SearchPoint]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    # Half a line would be read as another point, or not at all.
    complete = text[: text.rfind("\n") + 1]
    if complete != text:  # the driver was killed during a write
        path.write_text(complete, encoding="utf-8")
    return [json.loads(line) for line in complete.splitlines()]
