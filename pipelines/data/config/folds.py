"""Configuration of rotating folds and the reserve; ``pipelines.data.shards.folds`` applies it."""

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

from annotated_types import Interval

from skillnet_platform.config import fixed_field
from skillnet_platform.config.bounds import require_bounds
from skillnet_platform.errors import UserError

#: Split of the units that no fold reads.
RESERVE_SPLIT = "reserve"


def is_reserve(split: str) -> bool:
    """Return whether a split belongs to the reserve: ``reserve``, or a part such as ``reserve_x``.

    Args:
        split: name of the split.
    """
    return split == RESERVE_SPLIT or split.startswith(f"{RESERVE_SPLIT}_")


@dataclass
class FoldConfig:
    """Rotating folds: held-out units are assigned to splits when a corpus is read.

    Args:
        count: folds of the rotation; each unit is tested in one of them. 0 takes the splits of the
            corpora.
        number: the fold whose units are tested, from 0.
        validation_share: share of the other units that are the validation split.
        reserve_part: reserve as many units of each corpus as a fold has; no fold reads them.
        reserve_units: corpus -> names of units that no fold reads; ``*`` stands for any text.
    """

    count: Annotated[int, Interval(ge=0, le=100)] = 0
    number: Annotated[int, Interval(ge=0, le=99)] = 0
    validation_share: Annotated[float, Interval(gt=0, le=0.5)] = 0.1
    reserve_part: bool = fixed_field(False)
    reserve_units: dict[str, list[str]] = fixed_field(dict)

    def __post_init__(self) -> None:
        require_bounds(self, "fold.")
        if self.count == 1:
            raise UserError("fold.count: 1 fold leaves no row for training; give 2 or more, or 0")
        if self.count and self.number >= self.count:
            raise UserError(
                f"fold.number: {self.number} is not one of {self.count} folds; give a number "
                f"from 0 to {self.count - 1}"
            )
        if not self.count and (self.number or self.reserve_part or self.reserve_units):
            raise UserError("fold.count: the other keys of fold need folds; give 2 or more")

    @property
    def test_to_train(self) -> float:
        """Units of the test split per unit of the training split."""
        return 1 / ((self.count - 1) * (1 - self.validation_share)) if self.count else 0.0

    def is_reserved_by_name(self, corpus: str, unit: str) -> bool:
        """Return whether ``reserve_units`` names a unit."""
        return any(fnmatchcase(unit, name) for name in self.reserve_units.get(corpus, ()))

    def find_split(self, corpus: str, unit: str) -> str:
        """Return the split of a unit: train, validation, test or reserve.

        It depends on these settings and the two names alone, so all systems read the same rows.

        Args:
            corpus: name of the corpus.
            unit: name of the unit.
        """
        if self.is_reserved_by_name(corpus, unit):
            return RESERVE_SPLIT
        # The part of a unit must not depend on the fold, or a unit would be tested twice or never.
        part = int(draw_unit("fold", corpus, unit) * (self.count + self.reserve_part))
        if part == self.count:
            return RESERVE_SPLIT
        if part == self.number:
            return "test"
        drawn = draw_unit(f"validation of fold {self.number}", corpus, unit)
        return "validation" if drawn < self.validation_share else "train"


def draw_unit(purpose: str, corpus: str, unit: str) -> float:
    """Return a number in [0, 1) that the names determine.

    Args:
        purpose: use of the number; numbers of other purposes are independent.
        corpus: name of the corpus.
        unit: name of the held-out unit.
    """
    digest = hashlib.sha256("\0".join((purpose, corpus, unit)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
