"""TODO: skillnet_platform.config.fields."""

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, TypeVar

T = TypeVar("T")
POSITIONAL = "skillnet_positional"
ALIAS = "skillnet_alias"


def positional_field(default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A dataclass field that may be given without its name: ``skillnet search "a red heart"``.

    A field of type ``list[str]`` takes all bare words, one of type ``str`` takes one. Without a
    default the command requires it.
    """
    marks = {POSITIONAL: True, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=marks)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=marks)
    return dataclasses.field(default=default, metadata=marks)


def aliased_field(default: Any, alias: str) -> Any:
    """A dataclass field that the command line also knows by another name, such as ``--from``."""
    return dataclasses.field(default=default, metadata={ALIAS: alias})


def default_values(cls: type) -> dict[str, Any]:
    """The tree of defaults of a dataclass, without the fields that have none."""
    tree: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING:
            tree[f.name] = _tree(f.default)
        elif f.default_factory is not dataclasses.MISSING:
            tree[f.name] = _tree(f.default_factory())
    return tree


def to_dict(obj: Any) -> dict[str, Any]:
    """The resolved configuration as plain dictionaries, lists and scalars: safe for YAML, JSON."""
    tree = _tree(obj)
    if not isinstance(tree, dict):
        raise TypeError(f"expected a dataclass or a mapping, got {type(obj).__name__}")
    return tree


def _tree(obj: Any) -> Any:
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: _tree(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): _tree(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_tree(value) for value in obj]
    return str(obj) if isinstance(obj, PurePath) else obj
