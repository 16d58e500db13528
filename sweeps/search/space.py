"""Search spaces: keys of a run with their values; checked before anything starts.

    space:
      training.lr: {loguniform: [3.0e-4, 3.0e-3]}
      model.skill_every: {choice: [1, 2]}
      model.tasks.text_to_video.towers.candidate.skills:
        choice: [[general, video, alignment], [general, image, video, alignment]]
      text tower:
        options:
          shared: {}
          own:
            model.skills: [general, text, image, sound, video, code, alignment, image_text]
            model.tasks.text_to_image.towers.query.skills: [general, image_text, alignment]

A dimension with ``options`` has a name that is not a key; each option sets several keys.

The module also gives the trials of a sweep for a plan of their memory: :func:`request_sweep`.
"""

import bisect
import functools
import itertools
import json
import operator
import typing
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from pipelines.training.config.resources import PlannedRun
from pipelines.training.config.run import FinetuneConfig
from skillnet_evidence.format import format_setting
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.cluster.resource_request import ResourceRequest
from skillnet_platform.config.schema import (
    check_keys,
    child_types,
    hint_at,
    nest_value,
    without_none,
)
from skillnet_platform.errors import UserError, check_known_names, suggest_name
from sweeps.config.space import SearchDimension
from sweeps.config.sweep import SweepConfig
from sweeps.config.trials import FixedCostConfig, request_run

if TYPE_CHECKING:
    import numpy as np

#: Random draws before the points of a space are listed.
NUM_DRAWS = 200

#: Value per dimension; for a dimension with options the name of the option.
SearchPoint = dict[str, Any]

#: Key that cannot be searched -> what to use instead.
UNSEARCHABLE_KEYS = {
    "name": "the sweep names its trials",
    "run_dir": "trials are stored in the sweep's directory",
    "seed": "use seeds",
    "data": "give run.data once for all trials",
    "evaluate": "trials are evaluated on the validation split",
    "tracking": "give tracking once for the sweep",
    "training.workers": "give run.training.workers once for all trials",
    "training.use_gpu": "give run.training.use_gpu once for all trials",
}


class SearchSpace:
    """The dimensions of a sweep over a base run.

    Args:
        dimensions: key (or a new name, for options) -> values.
        base: base run.

    Raises:
        UserError: an unknown key, a value of a wrong type, or an invalid range.
    """

    def __init__(self, dimensions: Mapping[str, SearchDimension], base: FinetuneConfig) -> None:
        self.dimensions, self.base = dict(dimensions), base
        self._tree = configuration.to_dict(base)
        self._owners: dict[str, str] = {}
        self._applied: dict[str, FinetuneConfig] = {}
        self._identities: dict[str, str] = {}
        for name, dimension in self.dimensions.items():
            dimension.check(f"space.{name}")
            self._check(name, dimension)

    # -- points ---------------------------------------------------------------------------------

    def grid_points(self) -> Iterator[SearchPoint]:
        """Yield every combination of the listed values."""
        names = list(self.dimensions)
        for name, dimension in self.dimensions.items():
            if dimension.range is not None:
                raise UserError(
                    f"space.{name}.{dimension.kind} is a range: search grid tries listed values; "
                    "give choice, or search: random"
                )
        for values in itertools.product(*(self.dimensions[name].values for name in names)):
            yield dict(zip(names, values, strict=True))

    def random_points(self, count: int, seed: int) -> Iterator[SearchPoint]:
        """Yield distinct random points, each with every value of the grids.

        Args:
            count: number of points without grids; a small space yields all that it has.
            seed: seed of the draws.
        """
        import numpy as np

        grids = {n: d.values for n, d in self.dimensions.items() if d.grid}
        random = np.random.default_rng(seed)
        seen: set[str] = set()
        for _ in range(max(count, 1)):
            point = self.draw_unseen(random, seen)
            if point is None:
                return
            seen.add(self.identify_point(point))
            for values in itertools.product(*grids.values()):
                complete = point | dict(zip(grids, values, strict=True))
                yield {name: complete[name] for name in self.dimensions}

    def draw_unseen(
        self, random: "np.random.Generator", seen: Container[str]
    ) -> SearchPoint | None:
        """Return a random point, without grids, whose run is new; None if none is left.

        Args:
            random: source of the draws.
            seen: identities of earlier points, see :meth:`identify_point`.
        """
        rest = {name: each for name, each in self.dimensions.items() if not each.grid}
        for _ in range(NUM_DRAWS):
            point = {name: each.value_at(float(random.random())) for name, each in rest.items()}
            if self.identify_point(point) not in seen:
                return point
        # Draws seldom meet the last points of a small space, so they are listed.
        left = [
            point for point in self._list_points(rest) if self.identify_point(point) not in seen
        ]
        return left[int(random.integers(len(left)))] if left else None

    def count_distinct(self, most: int) -> int:
        """Return how many distinct runs the space has, at most ``most``.

        Args:
            most: number at which counting ends.
        """
        if any(each.countable is None for each in self.dimensions.values()):
            return most
        seen: set[str] = set()
        for point in self._list_points(self.dimensions):
            seen.add(self.identify_point(point))
            if len(seen) >= most:
                break
        return len(seen)

    def identify_point(self, point: SearchPoint) -> str:
        """Return a text that points of equal runs share, such as skills in another order.

        Args:
            point: value per dimension; a dimension that is absent has the value of the base run.
        """
        key = json.dumps(point, sort_keys=True)
        if key not in self._identities:
            try:
                tree = configuration.to_dict(self.apply_point(point))
                self._identities[key] = json.dumps(tree, sort_keys=True)
            except UserError:
                # Such a point is reported when its run is built.
                self._identities[key] = key
        return self._identities[key]

    def latin_hypercube_points(self, count: int, seed: int) -> list[SearchPoint]:
        """Return points that cover every dimension (Latin hypercube, McKay et al. 1979).

        Each range is divided into ``count`` parts, and each part has one point. Grids are treated
        as lists.

        Args:
            count: number of points.
            seed: seed of the design.
        """
        from scipy.stats import qmc

        if not self.dimensions or count < 1:
            return []
        fractions = qmc.LatinHypercube(len(self.dimensions), rng=seed).random(count)
        return [
            {
                name: each.value_at(float(fraction))
                for (name, each), fraction in zip(self.dimensions.items(), row, strict=True)
            }
            for row in fractions
        ]

    def resolve_assignments(self, point: SearchPoint) -> dict[str, Any]:
        """Return the keys that a point sets, with their values."""
        assignments: dict[str, Any] = {}
        for name, value in point.items():
            options = self.dimensions[name].options
            assignments |= options[value] if options else {name: value}
        return assignments

    def apply_point(self, point: SearchPoint) -> FinetuneConfig:
        """Return the run of a point.

        Raises:
            UserError: the values are not compatible with each other.
        """
        key = json.dumps(point, sort_keys=True)
        if key in self._applied:
            return self._applied[key]
        try:
            run = self._applied[key] = self._build_run(self.resolve_assignments(point))
        except ValueError as error:
            raise UserError(f"{error} (with {describe_point(point)})") from None
        return run

    def _build_run(self, assignments: Mapping[str, Any]) -> FinetuneConfig:
        # A JSON round trip copies the tree faster than deepcopy.
        tree = json.loads(json.dumps(self._tree))
        for key, value in assignments.items():
            *path, last = key.split(".")
            functools.reduce(operator.getitem, path, tree)[last] = value
        return configuration.build_config(FinetuneConfig, tree)

    def has_key(self, key: str) -> bool:
        """Return whether a dimension, or one of its options, sets a key."""
        return key in self._owners

    def _list_points(self, dimensions: Mapping[str, SearchDimension]) -> Iterator[SearchPoint]:
        """Yield the points of some dimensions; none if one of them is not countable."""
        if not dimensions:
            yield {}
            return
        # Ranges of whole numbers may be huge: itertools.product would list them first.
        (name, first), *rest = dimensions.items()
        for value in first.countable or ():
            for point in self._list_points(dict(rest)):
                yield {name: value} | point

    # -- checks ---------------------------------------------------------------------------------

    def _check(self, name: str, dimension: SearchDimension) -> None:
        if not dimension.options:
            self._check_key(name, name)
            hint = without_none(hint_at(FinetuneConfig, name))
            low_high = dimension.range
            if low_high is not None:
                self._check_range(name, dimension, hint)
            for value in dimension.values if low_high is None else low_high:
                self._check_value(f"space.{name}.{dimension.kind}", {name: value})
            return
        if hint_at(FinetuneConfig, name) is not None and "." in name:
            raise UserError(f"space.{name}: options need a new name, not the name of a key")
        for option, keys in dimension.options.items():
            for key in keys:
                self._check_key(key, name, f"space.{name}.options.{option}")
            self._check_value(f"space.{name}.options.{option}", keys)

    def _check_key(self, key: str, owner: str, where: str = "space") -> None:
        for parent, instead in UNSEARCHABLE_KEYS.items():
            if key == parent or key.startswith(parent + "."):
                raise UserError(f"{where}: {key} cannot be searched: {instead}")
        # This reports the nearest field of a dataclass; keys of dictionaries are checked below.
        check_keys(FinetuneConfig, nest_value(key, None), where)
        hint = hint_at(FinetuneConfig, key)
        below = child_types(hint)
        if hint is None or (below is not None and "*" not in below):
            names = f": {', '.join(below)}" if below else ""
            raise UserError(f"{where}: {key} is not a single value; name a key below it{names}")
        node: Any = self._tree
        for part in key.split(".")[: None if hint is not typing.Any else -1]:
            if not isinstance(node, dict) or part not in node:
                known = list(node) if isinstance(node, dict) else []
                near = suggest_name(part, known)
                raise UserError(f"{where}: {key!r}: {part!r} does not exist{near}")
            node = node[part]
        # Two dimensions with one key would overwrite each other silently.
        if self._owners.setdefault(key, owner) != owner:
            raise UserError(f"space: {key} is set by both {self._owners[key]!r} and {owner!r}")

    def _check_range(self, name: str, dimension: SearchDimension, hint: Any) -> None:
        where = f"space.{name}.{dimension.kind}"
        if hint not in (int, float, typing.Any):
            raise UserError(f"{where}: {name} does not take numbers; give choice")
        if hint is int and not dimension.kind.endswith("integer"):
            other = "log_integer" if dimension.kind.startswith("log") else "integer"
            raise UserError(f"{where}: {name} takes whole numbers; use {other}")

    def _check_value(self, where: str, assignments: Mapping[str, Any]) -> None:
        """Raise UserError for a value of a wrong type; incompatible values pass."""
        try:
            self._build_run(assignments)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except ValueError:
            return
        if "system" in assignments:
            from skillnet.systems import system_names

            check_known_names([assignments["system"]], system_names(), where, "system")


def warn_about_small_space(key: str, found: int, wanted: int) -> None:
    """Warn that a space has fewer distinct configurations than are asked for.

    Args:
        key: dotted setting that the space varies.
        found: configurations that are trained.
        wanted: configurations that are asked for.
    """
    if found < wanted:
        console.print_warning(
            f"{key}: it has {found} distinct configurations, fewer than the {wanted} that are "
            "asked for. Each is trained once per seed; give more values for more."
        )


def describe_point(point: SearchPoint) -> str:
    """Return a point in words: ``model.dim 64, training.lr 0.001``."""
    return ", ".join(f"{name} {format_setting(value)}" for name, value in point.items())


#: Largest width that is tried.
MAX_WIDTH = 1 << 16


def compute_model_cost(
    config: FinetuneConfig, by: Literal["activated", "flops"] = "activated"
) -> float:
    """Return the mean cost over the evaluated tasks.

    The model is built on the meta device, without memory for its weights.

    Args:
        config: the run.
        by: activated parameters, or FLOPs per example.
    """
    import torch

    from skillnet.accounting import account_task
    from skillnet.systems import build_system

    config = config.joint()
    # The meta device allocates no weights, so that many widths can be tried.
    with torch.device("meta"):
        model = build_system(config.system, config.model, config.options)
    accounts = [account_task(model, task) for task in config.measured]
    return fmean(
        each.activated if by == "activated" else each.flops_per_example for each in accounts
    )


def fit_fixed_cost(config: FinetuneConfig, target: float, fixed: FixedCostConfig) -> FinetuneConfig:
    """Return the configuration with the width at which it costs ``target``.

    Args:
        config: the run.
        target: activated parameters or FLOPs per example, mean over tasks.
        fixed: the width to set, and the tolerance.

    Raises:
        UserError: no width is within the tolerance; the message lists the nearest widths.
    """
    if fixed.adjust is None:
        return config
    # The model width must be a multiple of the number of heads.
    step = config.model.num_heads if fixed.adjust == "dim" else 1

    def with_width(count: int) -> FinetuneConfig:
        changes = {str(fixed.adjust): count * step}
        return replace(config, model=replace(config.model, **changes))  # type: ignore[arg-type]

    costs: dict[int, float] = {}

    def cost(count: int) -> float:
        # The search asks for the same width several times, and each costs a model.
        if count not in costs:
            costs[count] = compute_model_cost(with_width(count), fixed.by)
        return costs[count]

    # The cost increases with the count, so the nearest one is at the place of the target.
    place = bisect.bisect_left(range(1, MAX_WIDTH // step), target, key=cost) + 1
    best = min((max(place - 1, 1), place), key=lambda count: abs(cost(count) - target))
    # Outside of the tolerance, a better score could come from the cost alone.
    if abs(cost(best) - target) > fixed.tolerance * target:
        nearest = ", ".join(
            f"{count * step} gives {costs[count]:,.0f}"
            for count in sorted(sorted(costs, key=lambda n: abs(costs[n] - target))[:2])
        )
        raise UserError(
            f"fixed_cost: no model.{fixed.adjust} comes within {100 * fixed.tolerance:g} % of "
            f"{target:,.0f}: {nearest}; adjust the other width, or raise fixed_cost.tolerance"
        )
    return with_width(best)


#: Function that sets the final width of a run.
ConfigFinisher = Callable[[FinetuneConfig], FinetuneConfig]


def prepare_search(config: SweepConfig, run: FinetuneConfig) -> tuple[SearchSpace, ConfigFinisher]:
    """Return the search space of a sweep, and the function that sets the width of its runs.

    Args:
        config: settings of the sweep.
        run: base run.

    Raises:
        UserError: the search space is invalid.
    """
    fixed, target = config.fixed_cost, 0.0
    space = SearchSpace(config.space, run)
    if space.has_key(f"model.{fixed.adjust}"):
        raise UserError(f"fixed_cost.adjust sets model.{fixed.adjust}; remove it from the space")
    if fixed.adjust is not None:
        target = fixed.target or compute_model_cost(run, fixed.by)
    return space, functools.partial(fit_fixed_cost, target=target, fixed=fixed)


def list_points(config: SweepConfig, space: SearchSpace) -> Iterator[SearchPoint]:
    """Yield the points of a sweep without Optuna, which proposes its points one by one."""
    if config.search == "grid":
        return space.grid_points()
    return space.random_points(config.samples, config.search_seed)


#: Points of the search space that are compared.
MAX_POINTS = 64


def request_sweep(config: SweepConfig) -> ResourceRequest:
    """Return the resources of one trial of a sweep."""
    one = request_run(config, config.run.training)
    return replace(one, list_runs=lambda: list_sweep_runs(config))


def list_sweep_runs(config: SweepConfig) -> list[PlannedRun]:
    """Return the runs of the points that a sweep tries. Optuna's points are not known before.

    Args:
        config: settings of the sweep.

    Raises:
        UserError: the search space is invalid.
    """
    space, finish = prepare_search(config, config.run)
    if config.search == "optuna":
        count = min(config.samples, MAX_POINTS)
        points = iter(space.latin_hypercube_points(count, config.search_seed))
    else:
        points = itertools.islice(list_points(config, space), MAX_POINTS)
    share = config.resources.gpus or 1.0
    return [
        PlannedRun(finish(space.apply_point(point)), describe_point(point), "run.", share)
        for point in points
    ]
