"""Units that a split holds out, as numbers per row.

The column ``unit`` of a shard names the unit of each row (a module, a speaker); a row without a
name is a unit by itself. :func:`read_unit_numbers` is called by everything that evaluates a split.
"""

import numpy as np
import pyarrow as pa

from skillnet_evidence.units import number_units
from skillnet_platform.errors import UserError

UNIT_COLUMN = "unit"


def read_unit_numbers(table: pa.Table, where: str) -> np.ndarray:
    """Return the number of each row's unit, in the order of the units' first rows, (N,) int64.

    Args:
        table: rows of a split.
        where: names the split in error messages.

    Raises:
        UserError: the column is missing.
    """
    if UNIT_COLUMN not in table.column_names:
        raise UserError(f"{where}: no column {UNIT_COLUMN!r}. Prepare the corpus again.")
    codes = table.column(UNIT_COLUMN).combine_chunks().dictionary_encode().indices
    known = codes.fill_null(-1).to_numpy().astype(np.int64)
    # Negative numbers cannot be those of a name.
    return number_units(np.where(known < 0, -1 - np.arange(len(known)), known))
