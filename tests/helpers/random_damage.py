"""Random damage for the fuzz lane: of bytes, and of values in trees such as JSON files hold."""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from skillnet_platform import cli
from tests.helpers.module_names import NAMES


def budget(short: int, long: int = 200) -> Callable[[Any], Any]:
    """Return the number of examples: in every test run, and in a round of ``make fuzz``."""
    chosen = long if settings.default is settings.get_profile("long") else short
    return settings(
        max_examples=chosen,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def named(action: Callable[[], object]) -> None:
    """Run an action that may succeed or raise a user error, but no other exception."""
    try:
        action()
    except Exception as error:
        said = cli.user_error_message(error)
        assert said, f"{type(error).__name__}: {error}"  # noqa: PT017
        assert len(said) < 2000


#: (kind of damage, where as a share of the length, a byte)
DAMAGE = st.tuples(
    st.sampled_from(["flip", "cut", "swap", "fill", "insert"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 255),
)


def damaged(data: bytes, wounds: list[tuple[str, float, int]]) -> bytes:
    """Those damages done one after the other."""
    out = bytearray(data)
    for kind, share, byte in wounds:
        at = int(share * len(out))
        if kind == "flip" and out:
            out[at] ^= byte
        elif kind == "cut":
            del out[at:]
        elif kind == "swap":
            out[at : at + byte], out[:byte] = out[:byte], out[at : at + byte]
        elif kind == "fill":
            out[at : at + byte] = bytes([byte]) * len(out[at : at + byte])
        else:
            out[at:at] = bytes([byte])
    return bytes(out)


WOUNDS = st.lists(DAMAGE, min_size=1, max_size=3)

#: Values that a hostile JSON or YAML may hold anywhere; the import of a named module ends the test.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "", ".", 2**63, -1, "NaN", *NAMES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


def replaced(tree: Any, path: list[int], value: Any) -> Any:
    """A copy of a tree with another value at some place in it."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not path or not keys:
        return value
    key = keys[path[0] % len(keys)]
    below = tree[key]
    inner = replaced(below, path[1:], value) if isinstance(below, (dict, list)) else value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[key] = inner
    return copy


PLACES = st.lists(st.integers(0, 30), max_size=6)
