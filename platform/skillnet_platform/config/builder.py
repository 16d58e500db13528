"""Builder of configurations: a tree of plain values becomes a dataclass.

pydantic validates the tree, strictly: a number is no text, and true is no number. The type of a
field alone decides what its value becomes. No value names a class or a function, so a
configuration of any origin runs nothing. A field of type ``Any`` takes plain values only.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from skillnet_platform.config.fields import T
from skillnet_platform.config.schema import (
    check_keys,
    child_types,
    describe_type,
    find_missing_keys,
    format_value,
    join_key,
    type_below,
)
from skillnet_platform.errors import UserError

# A command's --help builds no configuration, so it does not import pydantic.
if TYPE_CHECKING:
    from pydantic_core import SchemaValidator, ValidationError


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
    from pydantic_core import ValidationError

    check_keys(cls, dict(tree), "")
    absent = next(find_missing_keys(cls, tree), "")
    if "[" in absent:
        raise UserError(f"{absent} is missing")
    if absent:
        raise UserError(f"{absent} is missing: give --{absent} or set it in a file of --config")
    try:
        return typing.cast(T, _build_validator(typing.cast(type, cls)).validate_python(tree))
    except ValidationError as error:
        raise _translate(cls, tree, error, origins or {}) from None


@functools.cache
def _build_validator(cls: type) -> "SchemaValidator":
    from pydantic import TypeAdapter
    from pydantic_core import SchemaValidator

    return SchemaValidator(_tighten(TypeAdapter(cls).core_schema))


def _tighten(node: Any) -> Any:
    """Return a schema of pydantic without conversions; lists are tuples, too."""
    from pydantic_core import core_schema

    if isinstance(node, list):
        return [_tighten(each) for each in node]
    if not isinstance(node, dict):
        return node
    node = {key: _tighten(value) for key, value in node.items()}
    kind = node.get("type")
    if kind in ("int", "float", "bool"):
        node["strict"] = True
    if kind == "float":
        node["allow_inf_nan"] = False
    elif kind == "str":
        # pydantic would make plain text of a URI with a hidden secret.
        return core_schema.is_instance_schema(str)
    elif kind == "any":
        return core_schema.no_info_plain_validator_function(_copy_plain)
    elif kind == "dataclass" and _sets_attributes(node["cls"]):
        # pydantic sets fields past this method, which hides the secret of a URI.
        return core_schema.no_info_after_validator_function(
            _set_fields, node, ref=node.pop("ref", None)
        )
    elif kind in ("list", "tuple"):
        return core_schema.no_info_before_validator_function(_require_list, node)
    return node


def _sets_attributes(cls: Any) -> bool:
    return "__setattr__" in vars(cls) and not cls.__dataclass_params__.frozen


def _set_fields(made: Any) -> Any:
    for field in dataclasses.fields(made):
        setattr(made, field.name, getattr(made, field.name))
    return made


def _require_list(value: Any) -> Any:
    from pydantic_core import PydanticCustomError

    # pydantic would take sets and iterators as well.
    if not isinstance(value, (list, tuple)):
        raise PydanticCustomError("list", "no list")
    return value


def _copy_plain(value: Any, key: str = "") -> Any:
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


def _translate(
    hint: Any, value: Any, error: "ValidationError", origins: Mapping[str, str]
) -> ValueError:
    """Return the first error of pydantic in our words: KEY: expected TYPE, got VALUE."""
    first, key = error.errors(include_url=False)[0], ""
    raised = first.get("ctx", {}).get("error")
    for part in first["loc"]:
        below = type_below(hint, part, with_bounds=True)
        # The rest of the place names an alternative of a union.
        if below is None:
            break
        # A list is described as a whole.
        if isinstance(part, int) and raised is None and child_types(below) is None:
            break
        hint, value, key = below, value[part], join_key(key, part)
    if raised is None:
        source = f"{origins[key]}: " if key in origins else ""
        return UserError(
            f"{source}{key}: expected {describe_type(hint)}, got {format_value(value)}"
        )
    # A message about a part of a plain value begins with the part.
    if str(raised).startswith((".", "[", ":")):
        return UserError(f"{key}{raised}")
    # A nested dataclass does not know its place in the tree.
    if not key or key.rpartition(".")[2] in str(raised):
        return typing.cast(ValueError, raised)
    kind = UserError if isinstance(raised, UserError) else ValueError
    return kind(f"{key}: {raised}")
