"""YAML of untrusted origin: plain values only, with limits on length, depth and number."""

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor

#: Far larger than any configuration; a text at the limits is read within seconds.
MAX_CHARACTERS = 512 * 2**10
MAX_DEPTH = 50
MAX_VALUES = 50_000


def load_plain_yaml(text: str) -> Any:
    """Return the value of a YAML text whose keys are text and unique.

    Raises:
        ValueError: not YAML, a tag that creates an object, a duplicate key, or a text above the
            limits (aliases count as often as they are used).
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters, more than {MAX_CHARACTERS}")
    try:
        try:
            value = _FastLoader(text).get_single_data()  # type: ignore[no-untyped-call]
        except yaml.YAMLError:
            # libyaml rejects `{a:[1]}`, and its messages quote nothing.
            value = _Loader(text).get_single_data()  # type: ignore[no-untyped-call]
        # Aliases share one object, so a short text can stand for a huge tree.
        check_tree_size(value, MAX_VALUES)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("a value holds itself") from None
    return value


def dump_plain_yaml(tree: Any) -> str:
    """Return the YAML text of plain values, which :func:`load_plain_yaml` reads back unchanged."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes a text if the loader would read it as a number."""


class _PlainRules(Composer, SafeConstructor):
    """Limits of a loader, and its check of keys."""

    depth = 0

    def __init__(self) -> None:
        self.flattened: dict[int, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node with its descendants, up to :data:`MAX_DEPTH` levels."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._problem(f"nested deeper than {MAX_DEPTH}", self.peek_event())  # type: ignore[attr-defined]  # of the parser
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        """Expand the merge keys of a mapping once; merged mappings may repeat its keys."""
        if id(node) in self.flattened:
            return
        # Keeps the node alive, because Python reuses the ids of removed objects.
        self.flattened[id(node)] = node
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                what = getattr(key, "value", "") if isinstance(key, yaml.ScalarNode) else "a list"
                raise self._problem(f"the key {what} is not text; put it in quotes", key)
            # PyYAML would silently keep only the last value.
            if key.value in seen:
                raise self._problem(f"the key {key.value!r} occurs twice", key)
            seen.add(key.value)
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise self._problem(f"more than {MAX_VALUES} keys merged", node)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Return the value of a node; add the line to Python's error about a number or a date."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, AttributeError) as error:
            raise self._problem(str(error), node) from None

    def _problem(self, words: str, place: Any) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=words, problem_mark=place.start_mark)


class _Loader(_PlainRules, yaml.SafeLoader):
    """Safe loader in Python: its messages quote the line."""

    def __init__(self, text: str) -> None:
        yaml.SafeLoader.__init__(self, text)
        _PlainRules.__init__(self)

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Limit open brackets: the scanner's lookahead gets slower with each of them."""
        super().fetch_flow_collection_start(token)  # type: ignore[no-untyped-call]
        if self.flow_level > MAX_DEPTH:
            raise self._problem(f"nested deeper than {MAX_DEPTH}", self.tokens[-1])


# Not every PyYAML is built with libyaml.
if yaml.__with_libyaml__:

    class _FastLoader(_PlainRules, yaml.CSafeLoader):
        """Loader of libyaml's events, five times faster.

        The nodes are made in Python: libyaml's own would be deeper than the limit.
        """

        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)
            _PlainRules.__init__(self)
else:
    _FastLoader = _Loader  # type: ignore[misc, assignment]


def resolve_exponents(*kinds: Any) -> None:
    """Make classes of PyYAML take ``1e-4`` for a number.

    PyYAML follows YAML 1.1, where it is text; JSON, YAML 1.2 and people mean the number.

    Args:
        kinds: loaders and dumpers.
    """
    for kind in kinds:
        kind.add_implicit_resolver(
            "tag:yaml.org,2002:float",
            re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z"),
            list("-+.0123456789"),
        )


def check_tree_size(tree: Any, most: int) -> None:
    """Raise ValueError if a tree holds more than ``most`` values, aliases expanded.

    Args:
        tree: plain values.
        most: largest number of them.
    """
    left = most

    def count(value: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {most} values, aliases written out")
        if isinstance(value, (dict, list, tuple, set)):
            for each in value.values() if isinstance(value, dict) else value:
                count(each)

    count(tree)


# A URI with a redacted secret is a subclass of str.
_Dumper.add_multi_representer(str, yaml.SafeDumper.represent_str)
resolve_exponents(_FastLoader, _Loader, _Dumper)
