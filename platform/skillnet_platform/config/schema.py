"""Checks of trees of plain values against dataclasses: keys, types and their names in errors."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from skillnet_platform.errors import UserError


def child_types(hint: Any) -> dict[str, Any] | None:
    """Return the types below a type: fields of a dataclass, ``{"*": V}`` of ``dict[str, V]``."""
    hint = without_none(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint)
        return {f.name: hints[f.name] for f in dataclasses.fields(hint) if f.init}
    if typing.get_origin(hint) in (dict, Mapping) and len(typing.get_args(hint)) == 2:
        return {"*": typing.get_args(hint)[1]}
    return None


def without_none(hint: Any) -> Any:
    """Return ``T`` for ``T | None``, and any other type unchanged."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def hint_at(cls: Any, key: str) -> Any:
    """Return the type at a dotted key, or ``None`` if the key does not exist."""
    hint = cls
    for part in key.split("."):
        known = child_types(hint)
        if known is None or (part not in known and "*" not in known):
            return None
        hint = known.get(part, known.get("*"))
    return hint


def all_keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a dataclass, without keys inside dictionaries."""
    for name, hint in (child_types(cls) or {}).items():
        if name != "*":
            yield prefix + name
            yield from all_keys(hint, f"{prefix}{name}.")


def check_keys(
    cls: Any, tree: dict[str, Any], source: str, prefix: str = "", root: Any = None
) -> Any:
    """Return the same tree after a check that its keys exist and hold mappings where required.

    Args:
        cls: type of the tree.
        tree: nested mappings.
        source: file or "command line", for the message.
        prefix: dotted key of the tree, with a dot at the end.
        root: type of the complete configuration, for suggestions.

    Raises:
        UserError: an unknown key, or a value where keys are expected.
    """
    root = root or cls
    known = child_types(cls)
    if known is None:
        return tree
    for key, value in tree.items():
        if key not in known and "*" not in known:
            full = f"{prefix}{key}"
            raise UserError(f"{source}: unknown key {full!r}{_hint(full, prefix, known, root)}")
        below = known.get(key, known.get("*"))
        if isinstance(value, dict):
            check_keys(below, value, source, f"{prefix}{key}.", root)
        elif value is not None and child_types(below) is not None:
            # jsonargparse would call the dataclass with the value.
            expected = describe_type(without_none(below))
            raise UserError(
                f"{source}: {prefix}{key}: expected {expected}, got {format_value(value)}"
            )
    return tree


def find_missing_keys(hint: Any, tree: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys that have no default and no value."""
    hint, known = without_none(hint), child_types(hint)
    if known is None or not isinstance(tree, Mapping):
        return
    if dataclasses.is_dataclass(hint):
        nothing = dataclasses.MISSING
        for f in dataclasses.fields(hint):
            required = f.default is nothing and f.default_factory is nothing
            if f.init and required and f.name not in tree:
                yield prefix + f.name
    for key, value in tree.items():
        yield from find_missing_keys(known.get(key, known.get("*")), value, f"{prefix}{key}.")


def find_invalid_nulls(hint: Any, tree: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys that are null although their type forbids it; jsonargparse accepts them."""
    known = child_types(hint)
    if known is None or not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        below = known.get(key, known.get("*"))
        if value is not None:
            yield from find_invalid_nulls(below, value, f"{prefix}{key}.")
        elif below not in (None, Any, object) and type(None) not in typing.get_args(below):
            yield prefix + key


def remove_null_entries(hint: Any, tree: Any) -> None:
    """Remove, in place, null entries from dictionaries of dataclasses.

    A null removes an entry, also if no lower layer has the entry.
    """
    known = child_types(hint)
    if known is None or not isinstance(tree, dict):
        return
    for key, value in list(tree.items()):
        below = known.get(key, known.get("*"))
        if value is None and key not in known and dataclasses.is_dataclass(below):
            del tree[key]
        else:
            remove_null_entries(below, value)


def _hint(full: str, prefix: str, known: Mapping[str, Any], root: Any) -> str:
    name = full.removeprefix(prefix)
    beside = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    if beside:
        return f"; did you mean {prefix + beside[0]!r}?"
    everywhere = list(all_keys(root))
    same = [k for k in everywhere if k.rpartition(".")[2] == full.rpartition(".")[2]]
    close = same or difflib.get_close_matches(full, everywhere, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {close[0]!r}?"
    place = prefix.rstrip(".") or "the top level"
    return f"; {place} has: {', '.join(sorted(known))}"


def nest_value(key: str, value: Any) -> dict[str, Any]:
    """Return a value below a dotted key: ``("a.b", 1) -> {"a": {"b": 1}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


def value_at(tree: Any, key: str) -> Any:
    """Return the value at a dotted key, or ``None`` if there is no value."""
    for part in key.split(".") if key else []:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def describe_type(hint: Any) -> str:
    """Return a type in words: "a whole number", "one of a, b", "a list, each text"."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else describe_type(a) for a in args)
    if origin is list or (origin is tuple and args[-1:] == (Ellipsis,)):
        return f"a list, each {describe_type(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(describe_type(a) for a in args)}"
    if child_types(hint) is not None:
        return "keys and values" if origin is dict else f"the keys of {hint.__name__}"
    return getattr(hint, "__name__", str(hint))


def describe_kind(value: Any) -> str:
    """Return the kind of a value in words."""
    names = {
        **{list: "a list", str: "text", int: "a whole number", float: "a number"},
        dict: "keys and values",
    }
    return names.get(type(value), type(value).__name__)


def format_value(value: Any) -> str:
    """Return a value for an error message, shortened, with its kind."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = str(value) if isinstance(value, (list, dict)) else repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '…'} ({describe_kind(value)})"
