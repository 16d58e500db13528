"""Configuration of the claims of a study: what is asked, with which margins, in which order.

The preset ``claims/paper`` has the claims of the paper. ``skillnet_studies.analysis.claims``
evaluates them.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from skillnet_platform.config.bounds import UnitFraction, require_bounds
from skillnet_platform.errors import UserError, check_known_names

#: Name of the mean score among the tasks of a claim.
MEAN_TASK = "mean"


@dataclass
class ClaimPart:
    """A comparison of two systems; a claim is shown if all of its parts are.

    Args:
        system: label of the system that the claim is about.
        against: label of the other system.
        test: "higher": the score is higher; "not_lower": it is lower by less than the margin.
        tasks: tasks on each of which it must be shown, or mean; empty takes all common tasks.
        flops_at_most: largest FLOPs per example of the system, as a multiple of the other's.
    """

    system: str
    against: str
    test: Literal["higher", "not_lower"] = "higher"
    tasks: list[str] = field(default_factory=list)
    flops_at_most: Annotated[float, Interval(gt=0, le=1000)] | None = None

    def __post_init__(self) -> None:
        require_bounds(self, "claims.stated.NAME.parts.")
        if self.system == self.against:
            raise UserError(f"claims: {self.system!r} is compared with itself; name two systems")


@dataclass
class StatedClaim:
    """A claim: all of its parts together.

    Args:
        text: the claim as a sentence.
        parts: comparisons that must all be shown.
    """

    text: str
    parts: list[ClaimPart]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError(f"claims: {self.text!r} has no parts; state what it compares")


@dataclass
class ClaimsConfig:
    """Claims of a study.

    Args:
        stated: name -> claim.
        order: gatekeeping: claims that are tested one after the other, each only if all before it
            are shown. The others are corrected by Holm's method together.
        alpha: level of the claims; intervals cover 1 - alpha, and each side is tested at half.
        margin: margin of not_lower, as a fraction (0.02 is two points).
        margins: task -> margin, where it is not ``margin``.
    """

    stated: dict[str, StatedClaim] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    margin: UnitFraction = 0.02
    margins: dict[str, UnitFraction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_bounds(self, "claims.")
        check_known_names(self.order, list(self.stated), "claims.order", "claim")
        if len(set(self.order)) < len(self.order):
            raise UserError(f"claims.order: names must differ, got {', '.join(self.order)}")

    def find_margin(self, task: str) -> float:
        """Return the margin of a task."""
        return self.margins.get(task, self.margin)

    def check_names(self, systems: Collection[str], tasks: Collection[str]) -> None:
        """Check that the claims are about known systems and tasks.

        Args:
            systems: labels of the study.
            tasks: names of its tasks.

        Raises:
            UserError: a name is unknown.
        """
        check_known_names(list(self.margins), [*tasks, MEAN_TASK], "claims.margins", "task")
        for name, part in self._parts():
            key = f"claims.stated.{name}"
            check_known_names([part.system, part.against], list(systems), key, "system")
            check_known_names(part.tasks, [*tasks, MEAN_TASK], key, "task")

    def _parts(self) -> Iterator[tuple[str, ClaimPart]]:
        for name, claim in self.stated.items():
            for part in claim.parts:
                yield name, part
