"""YAML from anyone: plain values only, and what would explode is refused instead of loaded."""

from collections.abc import Hashable
from typing import Any

import yaml

#: Far beyond any configuration, and read within seconds.
LONGEST = 512 * 2**10
DEEPEST = 50
MOST_VALUES = 50_000


def load_plain_yaml(text: str) -> Any:
    """The value of a YAML text; keys are text and occur once.

    Raises:
        ValueError: not YAML, a tag that would make an object, a key that occurs twice, or a text
            that is longer, deeper or (with its aliases written out) larger than configurations are.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters, more than {LONGEST}")
    try:
        value = _Loader(text).get_single_data()  # type: ignore[no-untyped-call]
        _count(value, [MOST_VALUES])
    except yaml.YAMLError as problem:
        raise ValueError(" ".join(str(problem).split())) from None
    except RecursionError:
        raise ValueError("a value holds itself") from None
    return value


class _Loader(yaml.SafeLoader):
    """The safe loader, with limits, that takes no key twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.flattened: dict[int, Any] = {}

    def fetch_flow_collection_start(self, token: Any) -> None:
        """The scanner looks far ahead, and ever more slowly, where brackets are open."""
        super().fetch_flow_collection_start(token)  # type: ignore[no-untyped-call]
        if self.flow_level > DEEPEST:
            raise self._problem(f"nested deeper than {DEEPEST}")

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node and all below it."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise self._problem(f"nested deeper than {DEEPEST}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        """Write out the merge keys of a mapping, once: what is merged may repeat its keys."""
        if id(node) in self.flattened:
            return
        self.flattened[id(node)] = node
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                what = getattr(key, "value", "") if isinstance(key, yaml.ScalarNode) else "a list"
                raise self._problem(f"the key {what} is not text; put it in quotes", key)
            if key.value in seen:
                raise self._problem(f"the key {key.value!r} occurs twice", key)
            seen.add(key.value)
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise self._problem(f"more than {MOST_VALUES} keys merged", node)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node; what Python says about a number or a date gets its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, AttributeError) as problem:
            raise self._problem(str(problem), node) from None

    def _problem(self, words: str, node: Any = None) -> yaml.MarkedYAMLError:
        mark = node.start_mark if node is not None else self.get_mark()  # type: ignore[no-untyped-call]
        return yaml.MarkedYAMLError(problem=words, problem_mark=mark)


def _count(value: Any, left: list[int]) -> None:
    """ValueError if a tree holds more values than are left; aliases count as often as used."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"more than {MOST_VALUES} values, aliases written out")
    below = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple, set)):
        for each in below:
            _count(each, left)
