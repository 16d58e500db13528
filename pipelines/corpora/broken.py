"""What stands in the place of a record that cannot be read."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Broken:
    """Stands for a record that cannot be read.

    Args:
        reason: short; rows are counted by it.
        rest: the file cannot be read on: nobody knows how many records are lost with this one.
    """

    reason: str
    rest: bool = False


#: A bad line without an end can only be the last one of its file.
CUT = Broken("the file is cut short in the midst of a line", rest=True)
#: A compressed file that ends or breaks.
PACKED = Broken("the compressed file is cut short or damaged", rest=True)
#: Of what such a record says nobody knows which is meant; most readers take the last.
TWICE = Broken("a field that stands twice in its record")
#: (Number of the line or record in its file, from 1; the record).
Found = tuple[int, "dict[str, Any] | Broken"]
