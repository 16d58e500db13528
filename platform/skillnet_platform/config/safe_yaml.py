"""YAML of untrusted origin: plain values only, with limits on length, depth and number."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

#: Far larger than any configuration; a text at the limits is read within seconds.
MAX_CHARACTERS = 512 * 2**10
MAX_DEPTH = 50
MAX_VALUES = 50_000
#: Values of a record, aliases written out: ten times those of the largest kept study.
MAX_RECORD_VALUES = 1_000_000


def load_plain_yaml(text: str) -> Any:
    """Return the value of a YAML text whose keys are text and unique.

    Raises:
        ValueError: not YAML, a tag that creates an object, a duplicate key, or a text above the
            limits (aliases count as often as they are used).
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters, more than {MAX_CHARACTERS}")
    try:
        value = _Loader(text).get_single_data()  # type: ignore[no-untyped-call]
        # Aliases share one object, so a short text can stand for a huge tree.
        _count(value, [MAX_VALUES])
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("a value holds itself") from None
    return value


def dump_plain_yaml(tree: Any) -> str:
    """Return the YAML text of plain values, which :func:`load_plain_yaml` reads back unchanged."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def load_record_yaml(text: str) -> Any:
    """Return the value of a long YAML text that :func:`dump_record_yaml` wrote.

    libyaml reads it, which is ten times faster and limits the depth itself. Duplicate keys are not
    rejected.

    Raises:
        ValueError: not YAML, a tag that creates an object, or aliases that stand for a huge tree.
    """
    try:
        value = _RecordLoader(text).get_single_data()
        _count(value, [MAX_RECORD_VALUES])
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("a value holds itself") from None
    return value


def dump_record_yaml(tree: Any) -> str:
    """Return the YAML text of a record: objects that occur twice as aliases, lines as blocks."""
    text: str = yaml.dump(
        tree, Dumper=_RecordDumper, sort_keys=False, allow_unicode=True, default_flow_style=None,
        width=120,
    )  # fmt: skip
    return text


# Not every PyYAML is built with libyaml.
class _RecordLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe loader of records."""


class _RecordDumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Safe dumper that writes a text of several lines as a block."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Return the node of a text."""
        style = "|" if "\n" in text else None
        node: yaml.ScalarNode = self.represent_scalar("tag:yaml.org,2002:str", text, style)
        return node


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes a text if the loader would read it as a number."""


class _Loader(yaml.SafeLoader):
    """Safe loader with limits that rejects duplicate keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.flattened: dict[int, Any] = {}

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Limit open brackets: the scanner's lookahead gets slower with each of them."""
        super().fetch_flow_collection_start(token)  # type: ignore[no-untyped-call]
        if self.flow_level > MAX_DEPTH:
            raise self._problem(f"nested deeper than {MAX_DEPTH}")

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node with its descendants, up to :data:`MAX_DEPTH` levels."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._problem(f"nested deeper than {MAX_DEPTH}")
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

    def _problem(self, words: str, node: Any = None) -> yaml.MarkedYAMLError:
        mark = node.start_mark if node is not None else self.get_mark()  # type: ignore[no-untyped-call]
        return yaml.MarkedYAMLError(problem=words, problem_mark=mark)


def _count(value: Any, left: list[int]) -> None:
    """Raise ValueError if a tree holds more than ``left`` values, aliases expanded."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("too many values, aliases written out")
    below = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple, set)):
        for each in below:
            _count(each, left)


# A URI with a redacted secret is a subclass of str.
_Dumper.add_multi_representer(str, yaml.SafeDumper.represent_str)
_RecordDumper.add_multi_representer(str, _RecordDumper.represent_text)
_RecordDumper.add_representer(str, _RecordDumper.represent_text)
# PyYAML follows YAML 1.1, where 1e-4 is text; JSON, YAML 1.2 and people mean the number.
for _each in (_Loader, _Dumper, _RecordLoader, _RecordDumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z"),
        list("-+.0123456789"),
    )
