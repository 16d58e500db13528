"""Checks of trees of plain values against dataclasses: keys, types and their names in errors."""

import dataclasses
import difflib
import functools
import json
import operator
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Annotated, Any

from skillnet_platform.errors import UserError

#: Keys by which jsonargparse, Hydra and Lightning create objects from a configuration.
INSTANTIATION_KEYS = frozenset(
    {"class_path", "init_args", "dict_kwargs", "__path__", "_target_", "_args_", "_partial_"}
)

#: Mark of a field that files may set and the command line may not.
FIXED = "skillnet_fixed"


def child_types(hint: Any, with_bounds: bool = False) -> dict[str, Any] | None:
    """Return the types below a type: fields of a dataclass, ``{"*": V}`` of ``dict[str, V]``."""
    hint = without_none(hint)
    if isinstance(hint, type):
        return field_types(hint, with_bounds) if dataclasses.is_dataclass(hint) else None
    if typing.get_origin(hint) in (dict, Mapping) and len(typing.get_args(hint)) == 2:
        return {"*": typing.get_args(hint)[1]}
    return None


def type_below(hint: Any, part: str | int, with_bounds: bool = False) -> Any:
    """Return the type of a key or of an item of a list; None if there is none."""
    if isinstance(part, str):
        known = child_types(hint, with_bounds) or {}
        return known.get(part, known.get("*"))
    args = typing.get_args(without_none(hint))
    if typing.get_origin(without_none(hint)) not in (list, tuple, Sequence):
        return None
    return args[min(part, len(args) - 1)] if args[-1] is not Ellipsis else args[0]


def list_parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return the entries of a mapping, or the numbered items of a list; of others none."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def join_key(key: str, part: str | int) -> str:
    """Return the key of an entry or an item: ``("a", "b") -> "a.b"``, ``("a", 1) -> "a[1]"``."""
    return f"{key}[{part}]" if isinstance(part, int) else f"{key}.{part}".removeprefix(".")


@functools.cache
def field_types(cls: type, with_bounds: bool = False) -> dict[str, Any]:
    """Return field name -> type of a dataclass, for the fields of its constructor.

    Args:
        cls: the dataclass.
        with_bounds: keep the ``Annotated`` types, which have bounds.
    """
    hints = typing.get_type_hints(cls, include_extras=with_bounds)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def without_none(hint: Any) -> Any:
    """Return ``T`` for ``T | None``, and any other type unchanged."""
    # Most types are plain classes, and a configuration asks a thousand times.
    if not isinstance(hint, type) and typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return rest[0] if len(rest) == 1 else hint
    return hint


def hint_at(cls: Any, key: str) -> Any:
    """Return the type at a dotted key, or ``None`` if the key does not exist."""
    return functools.reduce(type_below, split_key(cls, key), cls)


def is_fixed(cls: Any, key: str) -> bool:
    """Return whether a dotted key is, or is below, a field that only files may set."""
    hint = cls
    for part in split_key(cls, key):
        owner = without_none(hint)
        fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
        if any(f.name == part and FIXED in f.metadata for f in fields):
            return True
        hint = type_below(hint, part)
    return False


def split_key(hint: Any, key: str) -> list[str]:
    """Return the parts of a dotted key. The name of an entry that has keys may have dots.

    Such a name ends before the first part that is a key of the entry: the parts of
    ``space.training.lr.loguniform`` are ``space``, ``training.lr`` and ``loguniform``.

    Args:
        hint: type that has the key.
        key: dotted key.
    """
    first, *rest = parts = key.split(".")
    known = child_types(hint)
    if known is None or not rest:
        return parts
    below = child_types(type_below(hint, first))
    end = 1
    # A value without keys of its own stays an error: `options.a.b` is no option named `a.b`.
    if "*" in known and below is not None and "*" not in below:
        own = (number for number in range(1, len(parts)) if parts[number] in below)
        # A wrong key is the last part.
        end = next(own, len(parts) - 1)
    name = ".".join(parts[:end])
    return [name, *split_key(type_below(hint, name), ".".join(parts[end:]))]


def all_keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield every option of a dataclass as a dotted key, without keys inside dictionaries."""
    for name, hint in (child_types(cls) or {}).items():
        if name != "*" and not is_fixed(cls, name):
            yield prefix + name
            yield from all_keys(hint, f"{prefix}{name}.")


def check_keys(cls: Any, tree: dict[str, Any], source: str) -> Any:
    """Return the same tree after a check that its keys exist and hold mappings where required.

    Args:
        cls: type of the tree.
        tree: nested mappings.
        source: file or "command line", for the message; "" if it is unknown.

    Raises:
        UserError: an unknown key, a value where keys are expected, or a key that would create an
            object.
    """
    problem = find_instantiation_key(tree) or _find_wrong_key(cls, tree, "", cls)
    if problem:
        raise UserError(f"{source}: {problem}" if source else problem)
    return tree


def _find_wrong_key(hint: Any, tree: Any, key: str, root: Any) -> str:
    """Return the error message about the first wrong key below a key; "" if there is none."""
    known = child_types(hint)
    # A value without keys of its own may be any mapping.
    if known is None and not isinstance(tree, list):
        return ""
    for part, value in list_parts(tree):
        below, place = type_below(hint, part), join_key(key, part)
        if below is None and known is not None:
            return f"unknown key {place!r}{_hint(place, key, known, root)}"
        is_value = known is not None and value is not None and not isinstance(value, dict)
        if is_value and child_types(below) is not None:
            expected = describe_type(without_none(below))
            return f"{place}: expected {expected}, got {format_value(value)}"
        if problem := _find_wrong_key(below, value, place, root):
            return problem
    return ""


def find_instantiation_key(tree: Any, key: str = "") -> str:
    """Return an error message if a key of a tree would create an object in other programs; else "".

    Args:
        tree: mappings, lists and scalars.
        key: dotted key of the tree.
    """
    for part, value in list_parts(tree):
        place = join_key(key, part)
        if part in INSTANTIATION_KEYS:
            return f"{place}: a configuration creates no objects by name. Remove this key"
        if found := find_instantiation_key(value, place):
            return found
    return ""


def find_missing_keys(hint: Any, tree: Any, key: str = "") -> Iterator[str]:
    """Yield the keys that have no default and no value."""
    hint = without_none(hint)
    if dataclasses.is_dataclass(hint) and isinstance(tree, Mapping):
        nothing = dataclasses.MISSING
        for f in dataclasses.fields(hint):
            required = f.default is nothing and f.default_factory is nothing
            if f.init and required and f.name not in tree:
                yield join_key(key, f.name)
    for part, value in list_parts(tree):
        yield from find_missing_keys(type_below(hint, part), value, join_key(key, part))


def remove_null_entries(hint: Any, tree: Any) -> None:
    """Remove, in place, null entries from dictionaries of dataclasses.

    A null removes an entry, also if no lower layer has the entry.
    """
    known = child_types(hint) or {}
    for key, value in list(tree.items()) if isinstance(tree, dict) else ():
        below = type_below(hint, key)
        if value is None and key not in known and dataclasses.is_dataclass(below):
            del tree[key]
        else:
            remove_null_entries(below, value)


def _hint(place: str, parent: str, known: Mapping[str, Any], root: Any) -> str:
    beside = difflib.get_close_matches(place.removeprefix(f"{parent}."), list(known), n=1)
    if beside:
        return f"; did you mean {join_key(parent, beside[0])!r}?"
    everywhere = list(all_keys(root))
    same = [key for key in everywhere if key.rpartition(".")[2] == place.rpartition(".")[2]]
    close = same or difflib.get_close_matches(place, everywhere, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; {parent or 'the top level'} has: {', '.join(sorted(known))}"


def nest_value(key: str | Sequence[str], value: Any) -> dict[str, Any]:
    """Return a value below a dotted key or its parts: ``("a.b", 1) -> {"a": {"b": 1}}``."""
    for part in reversed(key.split(".") if isinstance(key, str) else key):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


def describe_type(hint: Any) -> str:
    """Return a type in words: "a whole number", "one of a, b", "a list, each text"."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{describe_type(args[0])}{_describe_bounds(args[1:])}"
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


def bounds_of(notes: Sequence[Any]) -> dict[str, float]:
    """Return the bounds in the notes of an ``Annotated`` type: {"ge": 0, "lt": 1}."""
    ends = (
        (kind, getattr(note, kind, None)) for note in notes for kind in ("gt", "ge", "lt", "le")
    )
    return {kind: end for kind, end in ends if end is not None}


def fits_bounds(hint: Any, value: Any) -> bool:
    """Return whether the numbers of a value are within the bounds of its type.

    A value without bounds fits. None fits, because the types of other values are not checked.
    """
    args = typing.get_args(hint)
    if value is None:
        return True
    if typing.get_origin(hint) is Annotated:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        ends = bounds_of(args[1:]).items()
        # Without bounds, a value of any kind fits.
        return all(is_number and getattr(operator, kind)(value, end) for kind, end in ends)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return all(fits_bounds(arg, value) for arg in args if arg is not type(None))
    if typing.get_origin(hint) in (list, tuple) and isinstance(value, (list, tuple)):
        return all(fits_bounds(args[0], each) for each in value)
    if typing.get_origin(hint) is dict and isinstance(value, Mapping):
        return all(fits_bounds(args[1], each) for each in value.values())
    return True


def _describe_bounds(notes: Sequence[Any]) -> str:
    bounds = bounds_of(notes)
    if set(bounds) == {"ge", "le"}:
        return f" from {_short(bounds['ge'])} to {_short(bounds['le'])}"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    texts = [f"{words[kind]} {_short(end)}" for kind, end in bounds.items()]
    return f" {' and '.join(texts)}" if texts else ""


def _short(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


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
