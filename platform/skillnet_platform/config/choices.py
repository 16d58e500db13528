"""Default entries that apply only together: see :func:`skillnet_platform.config.choices_field`.

The tasks of a run are an example. Without a configuration it has five tasks on built-in corpora. A
configuration that names the corpus of one task gets the tasks with a named corpus only, and not
four others whose corpora the user does not have.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from skillnet_platform.config.fields import CHOSEN_BY
from skillnet_platform.config.schema import child_types, without_none
from skillnet_platform.errors import UserError

#: Origin of the values of options, in messages.
COMMAND_LINE = "command line"

#: (file or command line, its tree of values), in the order in which layers apply.
Layers = Sequence[tuple[str, dict[str, Any]]]


def remove_unchosen_defaults(
    cls: Any, tree: dict[str, Any], defaults: dict[str, Any], layers: Layers
) -> None:
    """Remove, in place, default entries that no layer chooses, where a layer chooses another entry.

    Args:
        cls: dataclass of the tree.
        tree: the merged tree.
        defaults: the tree of default values.
        layers: all files and the command line.

    Raises:
        UserError: a layer that chooses entries, or the command line, changes an entry that is
            removed, so its values would be ignored.
    """
    for path, chosen_by in _find_choices(cls):
        entries, usual = _value_at(tree, path), _value_at(defaults, path)
        chosen = _find_chosen(path, chosen_by, layers)
        if not chosen or not entries or not usual:
            continue
        # A later layer may have removed some of them already.
        removed = (usual.keys() - chosen.keys()) & entries.keys()
        _check_unused(".".join(path), chosen_by, removed, chosen, layers)
        for name in removed:
            del entries[name]


def _find_choices(cls: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield path and choosing key of all fields of choices, below fields of dataclasses too."""
    hints = child_types(cls) or {}
    for each in dataclasses.fields(cls):
        hint = without_none(hints.get(each.name))
        if CHOSEN_BY in each.metadata:
            yield (*path, each.name), each.metadata[CHOSEN_BY]
        elif dataclasses.is_dataclass(hint):
            yield from _find_choices(hint, (*path, each.name))


def _find_chosen(path: tuple[str, ...], chosen_by: str, layers: Layers) -> dict[str, str]:
    """Return the entries that are chosen after all layers, each with its value."""
    chosen: dict[str, str] = {}
    for _, layer in layers:
        for name, entry in _value_at(layer, path).items():
            if entry is None:
                chosen.pop(name, None)
            elif isinstance(entry, dict) and entry.get(chosen_by) is not None:
                chosen[name] = entry[chosen_by]
    return chosen


def _check_unused(
    key: str, chosen_by: str, removed: set[str], chosen: dict[str, str], layers: Layers
) -> None:
    path = tuple(key.split("."))
    for source, layer in layers:
        entries = {n: e for n, e in _value_at(layer, path).items() if isinstance(e, dict)}
        # A preset may hold settings for all default entries, of which another layer chooses some.
        if source != COMMAND_LINE and not any(chosen_by in entry for entry in entries.values()):
            continue
        for name in sorted(removed & entries.keys()):
            used, value = next(iter(chosen.items()))
            raise UserError(
                f"{source}: {key}.{name} has no {chosen_by}. {key}.{used}.{chosen_by} is {value}, "
                f"so only {key} with a {chosen_by} are used: set {key}.{name}.{chosen_by} as well, "
                f"or remove {key}.{name}"
            )


def _value_at(tree: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """Return the mapping at a path; {} if there is none."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}
