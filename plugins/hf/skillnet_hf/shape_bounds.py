"""Bounds of a library's configuration, checked before the library reads it.

A saved model and a checkpoint carry the configuration of their encoders, and both can come from
anyone. The libraries trust it: a number of labels becomes a dictionary of that size, a number of
positions becomes a table, and both exist before the first weight is counted.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from skillnet.bounds import MAX_LAYERS, MAX_SIZE

#: Characters of a text.
MAX_TEXT = 256
#: Numbers in a table of fixed positions. The largest VideoMAE has 2.2 million.
MAX_TABLE = 2**23


def check_shape(where: str, shape: Any, known: Collection[str] | None = None) -> None:
    """Check that a configuration has known keys, short texts and bounded numbers only.

    Args:
        where: key of the configuration, for the message.
        shape: the configuration.
        known: keys that the library documents for the model; None accepts any.

    Raises:
        ValueError: names the key.
    """
    if not isinstance(shape, Mapping):
        raise ValueError(f"{where}: expected keys and values, got {type(shape).__name__}")
    for key, value in shape.items():
        name = str(key)[:MAX_TEXT]
        if known is not None and key not in known:
            raise ValueError(f"{where}: {name!r} is no setting of this model")
        _check_value(f"{where}.{name}", value)


def check_table(where: str, positions: float, width: float) -> None:
    """Check the size of a table of fixed positions, which no file of weights contains.

    Args:
        where: key of the configuration, for the message.
        positions: number of rows.
        width: numbers of a row.

    Raises:
        ValueError: the table is too large.
    """
    if not 0 < positions * width <= MAX_TABLE:
        raise ValueError(
            f"{where}: a table of {positions:.0f} positions of width {width:.0f}; at most "
            f"{MAX_TABLE} numbers are supported"
        )


def _check_value(where: str, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        if len(value) > MAX_LAYERS:
            raise ValueError(f"{where}: a list of {len(value)} values; at most {MAX_LAYERS}")
        for each in value:
            if isinstance(each, (list, tuple)):
                raise ValueError(f"{where}: lists in a list are not supported")
            _check_value(where, each)
    elif isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f"{where}: a text of {len(value)} characters; at most {MAX_TEXT}")
    elif isinstance(value, (int, float)):
        # The number of layers is the length of lists that exist before the layers.
        is_depth = where.endswith(("layers", ".depth", ".reg_tokens"))
        limit = MAX_LAYERS if is_depth else MAX_SIZE
        # A huge integer is no float, so it is compared first.
        if abs(value) > limit or not math.isfinite(value):
            raise ValueError(f"{where} must be at most {limit}, got {str(value)[:40]}")
    elif value is not None:
        raise ValueError(f"{where}: expected a text, a number or a list")
