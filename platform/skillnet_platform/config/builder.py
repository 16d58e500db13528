"""Builder of configurations: a tree of plain values becomes a dataclass.

The type of a field alone decides what its value becomes. No value names a class or a function, so
a configuration of any origin runs nothing. A field of type ``Any`` takes plain values only.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Annotated, Any

from skillnet_platform.config.fields import T
from skillnet_platform.config.schema import (
    check_keys,
    describe_type,
    field_types,
    find_missing_keys,
    format_value,
    is_within,
)
from skillnet_platform.errors import UserError


def build_config(
    cls: type[T], tree: Mapping[str, Any], origins: Mapping[str, str] | None = None
) -> T:
    """Build ``cls`` from a complete tree of plain values.

    Args:
        cls: the dataclass.
        tree: every field, as nested mappings.
        origins: flat key -> origin of its value (a file), for the message.

    Raises:
        UserError: a key is missing or unknown, or a value has a wrong type or is out of range.
        ValueError: raised by ``__post_init__`` of a dataclass.
    """
    check_keys(cls, dict(tree), "")
    absent = next(find_missing_keys(cls, tree), None)
    if absent:
        raise UserError(f"{absent} is missing: give --{absent} or set it in a file of --config")
    return typing.cast(T, _Builder(origins or {}).build_dataclass(cls, tree, ""))


class _MismatchError(Exception):
    """A value does not fit the type of its field."""


class _Builder:
    def __init__(self, origins: Mapping[str, str]) -> None:
        self.origins = origins

    def build_dataclass(self, cls: Any, tree: Mapping[str, Any], key: str) -> Any:
        hints = field_types(cls, with_bounds=True)
        prefix = f"{key}." if key else ""
        values = {
            name: self.build_field(hints[name], value, prefix + name)
            for name, value in tree.items()
        }
        try:
            return cls(**values)
        except ValueError as error:
            # A nested dataclass does not know its place in the tree.
            if not key or key.rpartition(".")[2] in str(error):
                raise
            kind = UserError if isinstance(error, UserError) else ValueError
            raise kind(f"{key}: {error}") from None

    def build_field(self, hint: Any, value: Any, key: str) -> Any:
        try:
            return self._build(hint, value, key)
        except _MismatchError:
            source = f"{self.origins[key]}: " if key in self.origins else ""
            expected = describe_type(hint)
            raise UserError(
                f"{source}{key}: expected {expected}, got {format_value(value)}"
            ) from None

    def _build(self, hint: Any, value: Any, key: str) -> Any:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            made = self._build(args[0], value, key)
            if not is_within(made, args[1:]):
                raise _MismatchError
            return made
        if origin in (typing.Union, types.UnionType):
            return self._build_union(args, value, key)
        if origin is typing.Literal:
            return _require(value, any(value == a and type(value) is type(a) for a in args))
        if origin in (list, tuple, Sequence):
            return self._build_sequence(origin, args, value, key)
        if origin in (dict, Mapping):
            _require(value, isinstance(value, Mapping) and all(isinstance(k, str) for k in value))
            return {
                name: self.build_field(args[1], v, f"{key}.{name}") for name, v in value.items()
            }
        if dataclasses.is_dataclass(hint):
            _require(value, isinstance(value, Mapping))
            return self.build_dataclass(hint, value, key)
        if hint in (Any, object):
            return _copy_plain(value, key)
        return _build_scalar(hint, value, key)

    def _build_union(self, options: Sequence[Any], value: Any, key: str) -> Any:
        if value is None:
            return _require(None, type(None) in options)
        for option in options:
            try:
                if option is not type(None):
                    return self._build(option, value, key)
            except _MismatchError:
                continue
        raise _MismatchError

    def _build_sequence(self, origin: Any, args: Sequence[Any], value: Any, key: str) -> Any:
        _require(value, isinstance(value, (list, tuple)))
        hints = list(args)
        if origin is not tuple or args[-1] is Ellipsis:
            hints = [args[0]] * len(value)
        _require(value, len(hints) == len(value))
        built = [
            self._build_item(hint, each, f"{key}[{n}]")
            for n, (hint, each) in enumerate(zip(hints, value, strict=True))
        ]
        return tuple(built) if origin is tuple else built

    def _build_item(self, hint: Any, value: Any, key: str) -> Any:
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            check_keys(hint, dict(value), "", f"{key}.")
            absent = next(find_missing_keys(hint, value, f"{key}."), None)
            if absent:
                raise UserError(f"{absent} is missing")
        return self._build(hint, value, key)


def _build_scalar(hint: Any, value: Any, key: str) -> Any:
    # In Python, true and false are whole numbers too.
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if hint is int:
        return int(_require(value, is_number and isinstance(value, Integral)))
    if hint is float:
        return _finite(_require(value, is_number))
    if hint is bool or hint is str:
        return _require(value, isinstance(value, hint))
    if hint in (Path, PurePath):
        return hint(_require(value, isinstance(value, (str, PurePath))))
    raise TypeError(f"{key}: a configuration has no fields of type {hint}")


def _require(value: Any, fits: bool) -> Any:
    if not fits:
        raise _MismatchError
    return value


def _finite(value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:
        raise _MismatchError from None
    return float(_require(number, math.isfinite(number)))


def _copy_plain(value: Any, key: str) -> Any:
    """Return a copy of a value of any type that JSON has; raise UserError for others."""
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _copy_plain(below, f"{key}.{name}") for name, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy_plain(each, f"{key}[{n}]") for n, each in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}: expected a finite number, got {value}")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"{key}: expected plain values, got {format_value(value)}; put text in quotes")
