"""Values that name a module, as an author of a configuration or of a file may write them."""

from typing import Any

PLANTED = "tests.helpers.planted_module"
#: Spellings of class paths in Python, entry points, Hydra, SQLAlchemy and our own options.
NAMES = (
    f"{PLANTED}:X",
    f"{PLANTED}.X",
    PLANTED,
    f"{PLANTED}:X:/path",
    f"{PLANTED}:/path",
    f"{PLANTED}:X=/path",
    f"py://{PLANTED}:X",
    f"{PLANTED}+driver://host/path",
)
#: The same as a list and as mappings, of which some keys are names themselves.
VALUES: tuple[Any, ...] = (
    *NAMES,
    list(NAMES),
    {"a": NAMES[0], "b": {"name": NAMES[1]}},
    {NAMES[0]: NAMES[0], "planted_module": NAMES[3]},
    [{"name": NAMES[0]}],
)
