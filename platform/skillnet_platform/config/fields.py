"""Fields of configuration dataclasses, and their trees of plain values."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, TypeVar

from skillnet_platform.config.schema import FIXED

T = TypeVar("T")
POSITIONAL = "skillnet_positional"
ALIAS = "skillnet_alias"
CHOSEN_BY = "skillnet_chosen_by"
COMMAND = "skillnet_command"


def positional_field(default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """Return a dataclass field that needs no option name: ``skillnet search "a red heart"``.

    A field of type ``list[str]`` takes all bare words, a field of type ``str`` takes one word.

    Args:
        default: value without an option. Without a default the command requires a word.
        metadata: further entries of the field's metadata.
    """
    marks = {POSITIONAL: True, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=marks)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=marks)
    return dataclasses.field(default=default, metadata=marks)


def aliased_field(default: Any, alias: str) -> Any:
    """Return a dataclass field with a second option name, such as ``--from``."""
    return dataclasses.field(default=default, metadata={ALIAS: alias})


def choices_field(default_factory: Callable[[], Any], chosen_by: str) -> Any:
    """Return a field of named entries, whose default entries apply only together.

    A configuration chooses an entry if one of its layers sets the key ``chosen_by`` of the entry.
    As soon as one entry is chosen, default entries that are not chosen are left out.

    Args:
        default_factory: makes the default entries.
        chosen_by: key of an entry.
    """
    return dataclasses.field(default_factory=default_factory, metadata={CHOSEN_BY: chosen_by})


def fixed_field(default: Any) -> Any:
    """Return a field that only files and code set: it is stored and read back, and is no option.

    Args:
        default: value, or the class of an empty one.
    """
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={FIXED: True})
    return dataclasses.field(default=default, metadata={FIXED: True})


def command_field(default_factory: Callable[[], Any], command: str) -> Any:
    """Return a field with all options of another command, to which ``--help`` refers.

    Args:
        default_factory: makes the default.
        command: its name, such as ``finetune``.
    """
    return dataclasses.field(default_factory=default_factory, metadata={COMMAND: command})


def default_values(cls: type) -> dict[str, Any]:
    """Return the defaults of a dataclass as a tree, without the fields that have no default."""
    tree: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING:
            tree[f.name] = _tree(f.default)
        elif f.default_factory is not dataclasses.MISSING:
            tree[f.name] = _tree(f.default_factory())
    return tree


def to_dict(obj: Any) -> dict[str, Any]:
    """Return a configuration as dictionaries, lists and scalars, for YAML and JSON."""
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
