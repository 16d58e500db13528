"""Parser of typed configurations: dataclass, YAML files and dotted overrides.

The order is: defaults of the dataclass, each ``--config`` in turn, then overrides. Mappings
merge by key, so an override of one entry keeps the other entries; other values are replaced.
Default entries that apply only together are the exception, see :func:`choices_field`: a
configuration that names the corpus of one task gets the tasks with a named corpus only, and not
four others whose corpora the user does not have. :mod:`skillnet_platform.config.builder` checks the
types and builds the objects. This module finds unknown keys first, because it knows the file.
``--help`` shows the essential options, one line each; ``--help all`` shows every option in full.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import textwrap
import typing
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from skillnet_platform import console
from skillnet_platform.config import safe_yaml
from skillnet_platform.config.builder import build_config
from skillnet_platform.config.fields import (
    ALIAS,
    CHOSEN_BY,
    COMMAND,
    POSITIONAL,
    T,
    _tree,
    default_values,
    to_dict,
)
from skillnet_platform.config.presets import (
    check_preset_command,
    choose_preset,
    find_config,
    names_file,
)
from skillnet_platform.config.schema import (
    FIXED,
    check_keys,
    child_types,
    describe_kind,
    describe_type,
    find_missing_keys,
    hint_at,
    is_fixed,
    nest_value,
    remove_null_entries,
    split_key,
    type_below,
    without_none,
)
from skillnet_platform.errors import UserError
from skillnet_platform.terminal_text import shorten_text

#: Key by which a mapping in a YAML file includes another file.
INCLUDE = "include"
#: Origin of the values of options, in messages.
COMMAND_LINE = "command line"

#: (file or command line, its tree of values), in the order in which layers apply.
Layers = Sequence[tuple[str, dict[str, Any]]]

#: Columns of a terminal, and of the options on the left.
WIDTH = 100
COLUMN = 34
#: Options of a short help, without --config, --json and --help: one screen.
MAX_ESSENTIAL = 20

STANDARD_OPTIONS = (
    ("--config FILE", "a YAML file or a preset; repeatable, later files win"),
    ("--json", "print one JSON document on standard output"),
    ("--help [all]", "show the essential options, or all options"),
)


def parse_config(
    cls: type[T],
    argv: Sequence[str],
    prog: str,
    description: str = "",
    example: str = "",
    essential: Sequence[str] = (),
) -> T:
    """Build ``cls`` from the arguments of a command.

    Accepts ``--config FILE_OR_PRESET`` (repeatable, later files win, see :func:`load_layer`),
    ``--key.sub value`` or ``--key.sub=value`` with YAML values, ``--json``, ``--help``, and bare
    words for fields of :func:`positional_field`. ``--open`` means ``--open true``.

    Args:
        cls: a dataclass; nested dataclasses and ``dict[str, dataclass]`` are nested keys.
        argv: the arguments.
        prog: program and command, for example "skillnet finetune".
        description: one paragraph for ``--help``.
        example: command lines that work, one per line, for ``--help``.
        essential: dotted keys that ``--help`` shows; ``--help all`` shows every key. By default
            all keys without keys of their own, if one screen has room for them.

    Raises:
        UserError: an unknown key, a wrong type, or a file that is missing or not YAML.
        ValueError: raised by ``__post_init__`` of the dataclass.
        SystemExit: with 0 after ``--help``.
    """
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    words, rest = words[:end], words[end:]  # options of another command follow "--"
    if {"--help", "--help=all", "-h"} & set(words):
        everything = "--help=all" in words or ("--help", "all") in itertools.pairwise(words)
        shown = None if everything else essential or default_essential(cls)
        console.print_output(render_help(cls, prog, description, example, shown))
        raise SystemExit(0)
    if "--json" in words:
        words = [word for word in words if word != "--json"]
        console.begin_json()
    given_files, overrides, bare = _scan([*words, *rest], cls)
    files = [choose_preset(given, prog) for given in given_files]
    try:
        tree, origins = _merge_layers(cls, files, overrides)
        _place_bare(cls, tree, bare, prog)
        return build_config(cls, tree, origins)
    except UserError:
        for given in files:
            check_preset_command(given, prog, lambda name: _fits_preset(cls, name))
        raise


def list_options(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as the arguments of a command: dotted key -> value of Python."""
    words = []
    for key, value in settings.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


def _merge_layers(
    cls: Any, files: Sequence[str], overrides: Sequence[tuple[str, Any]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the merged tree, and key -> file or command line."""
    tree = default_values(cls)
    origins: dict[str, str] = {}
    layers: list[tuple[str, dict[str, Any]]] = []
    typed: dict[str, Any] = {}
    for given in files:
        path = find_config(given)
        # Each layer is checked alone: after the merge the file of a wrong key is unknown.
        parts = _load_parts(path)
        layer = check_keys(cls, _join_parts(parts), str(path))
        layers += parts
        origins |= dict.fromkeys(flatten_tree(layer), str(path))
        merge_trees(tree, layer)
    for key, value in overrides:
        layer = check_keys(cls, nest_value(split_key(cls, key), value), COMMAND_LINE)
        merge_trees(typed, copy.deepcopy(layer), keeps_nulls=True)
        origins |= dict.fromkeys(flatten_tree(layer), COMMAND_LINE)
        merge_trees(tree, layer)
    remove_unchosen_defaults(cls, tree, default_values(cls), [*layers, (COMMAND_LINE, typed)])
    # After all layers: a later layer may replace a null by a value.
    remove_null_entries(cls, tree)
    return tree, origins


def _fits_preset(cls: Any, name: str) -> bool:
    """Return whether a preset has only keys of a command, and all keys of its new entries."""
    try:
        tree, _ = _merge_layers(cls, [name], [])
    except UserError:
        return False
    return set(find_missing_keys(cls, tree)) <= set(find_missing_keys(cls, default_values(cls)))


def load_yaml(path: str | PurePath) -> dict[str, Any]:
    """Read a YAML mapping of plain values.

    Raises:
        UserError: the file is missing, is not YAML (with the line), has tags, or is no mapping.
    """
    try:
        # The file may come from somebody else, and YAML tags can create objects.
        loaded = safe_yaml.load_plain_yaml(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected keys and values, got {describe_kind(loaded)}")
    return loaded


def load_layer(path: str | PurePath) -> dict[str, Any]:
    """Read a file of ``--config``, in which a mapping may include another file or preset.

    ``run: {include: small, training: {steps: 100}}`` is ``small`` with another number of steps.

    Args:
        path: the file.

    Raises:
        UserError: as :func:`load_yaml`, or a file that includes itself.
    """
    return _join_parts(_load_parts(path))


def _join_parts(parts: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for _, part in parts:
        merge_trees(layer, copy.deepcopy(part), keeps_nulls=True)
    return layer


def _load_parts(
    path: str | PurePath, inside: Sequence[Path] = ()
) -> list[tuple[str, dict[str, Any]]]:
    """Return (file, its own values) of all files that a file includes, and of the file, the last.

    What an included file chooses is not a choice of the file that includes it.
    """
    chain = [*inside, Path(path).resolve()]
    parts: list[tuple[str, dict[str, Any]]] = []

    def take_includes(value: Any, place: tuple[str, ...] = ()) -> Any:
        if not isinstance(value, dict):
            return value
        # A configuration may have a key of that name with another kind of value.
        if not isinstance(value.get(INCLUDE), str):
            return {key: take_includes(below, (*place, key)) for key, below in value.items()}
        beside = Path(path).parent / value[INCLUDE]
        has_file = names_file(value[INCLUDE]) and beside.is_file()
        other = beside if has_file else find_config(value[INCLUDE])
        # Files that include each other would be read without an end.
        if other.resolve() in chain:
            raise UserError(f"{path}: {INCLUDE}: {value[INCLUDE]} includes itself")
        parts.extend((name, nest_value(place, part)) for name, part in _load_parts(other, chain))
        rest = {key: below for key, below in value.items() if key != INCLUDE}
        return {key: take_includes(below, (*place, key)) for key, below in rest.items()}

    own: dict[str, Any] = take_includes(load_yaml(path))
    return [*parts, (str(path), own)]


def to_yaml(obj: Any) -> str:
    """Return a configuration as YAML, which ``--config`` reads back to an equal object.

    Secrets of URIs are not written: see :class:`skillnet_platform.secret_uri.SecretUri`.
    """
    return safe_yaml.dump_plain_yaml(to_dict(obj))


def digest_config(obj: Any) -> str:
    """Return the SHA-256 of a configuration's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(_tree(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a flat mapping: ``{"a": {"b": 1}} -> {"a.b": 1}``. Lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_tree(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def merge_trees(
    tree: dict[str, Any], new: Mapping[str, Any], *, keeps_nulls: bool = False
) -> dict[str, Any]:
    """Merge ``new`` into ``tree`` in place: mappings merge by key, other values are replaced.

    A null removes a mapping: ``tasks: {text_to_code: null}`` removes that task.

    Args:
        tree: nested mappings.
        new: nested mappings that win.
        keeps_nulls: write nulls into the tree, where they remove entries of a lower layer later.
    """
    for key, value in new.items():
        below = tree.get(key)
        if isinstance(value, Mapping) and isinstance(below, dict):
            merge_trees(below, value, keeps_nulls=keeps_nulls)
        elif value is None and isinstance(below, dict) and not keeps_nulls:
            del tree[key]
        else:
            tree[key] = value
    return tree


def _scan(words: list[str], cls: Any) -> tuple[list[str], list[tuple[str, Any]], list[str]]:
    """Split a command line into --config files, (key, value) overrides and bare words."""
    files: list[str] = []
    overrides: list[tuple[str, Any]] = []
    bare: list[str] = []
    aliases = {f.metadata[ALIAS]: f.name for f in dataclasses.fields(cls) if ALIAS in f.metadata}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--":
            bare += queue
            break
        if not word.startswith("--"):
            bare.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        key = aliases.get(key, key)
        hint = hint_at(cls, key)
        if key != "config" and hint is None:
            # Names the wrong part of the key.
            check_keys(cls, nest_value(split_key(cls, key), None), COMMAND_LINE)
            raise UserError(f"command line: {key!r} has no keys of its own")
        if is_fixed(cls, key):
            raise UserError(f"command line: --{key} is no option. A file sets it: --config FILE")
        if not equals:
            is_flag = without_none(hint) is bool
            if is_flag and (not queue or queue[0].lower() not in ("true", "false", "yes", "no")):
                text = "true"
            elif not queue or (queue[0].startswith("--") and queue[0] != "--"):
                raise UserError(f"command line: --{key} needs a value")
            else:
                text = queue.pop(0)
        if key == "config":
            files.append(text)
        else:
            overrides.append((key, read_value(text, hint, key)))
    return files, overrides, bare


def read_value(text: str, hint: Any, key: str) -> Any:
    """Return the value of a command-line word: text unchanged, other types parsed as YAML.

    Args:
        text: the word.
        hint: type of the key.
        key: dotted key, for the message.

    Raises:
        UserError: the word cannot be parsed; names the key.
    """
    if hint is not str and text in ("null", "None", "~"):
        return None
    # YAML would turn texts such as `yes` or `2024-01-01` into other types.
    if without_none(hint) in (str, Path):
        return text
    parts = [text]
    wanted = typing.get_origin(without_none(hint))
    listed = wanted in (list, tuple) and not text.startswith("[")
    if listed:
        parts = text.split(",")
    try:
        values = [safe_yaml.load_plain_yaml(part) for part in parts]
    except ValueError as error:
        short = shorten_text(text, 80)
        raise UserError(
            f"command line: --{key}: cannot read {short!r} as a value ({error})"
        ) from None
    return values if listed else values[0]


def _place_bare(cls: Any, tree: dict[str, Any], bare: list[str], prog: str) -> None:
    hints = typing.get_type_hints(cls)
    rest = list(bare)
    for f in dataclasses.fields(cls):
        if not f.metadata.get(POSITIONAL):
            continue
        if typing.get_origin(without_none(hints[f.name])) in (list, tuple):
            if rest:
                tree[f.name], rest = rest, []
        elif rest:
            tree[f.name] = read_value(rest.pop(0), hints[f.name], f.name)
        if f.name not in tree:
            raise UserError(f"{prog}: {f.name} is missing; see {prog} --help")
    if rest:
        raise UserError(f"{prog}: cannot use {rest[0]!r}; options start with --, see {prog} --help")


# -- default entries that apply only together ----------------------------------


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


def _value_at(tree: Any, path: Sequence[str]) -> dict[str, Any]:
    """Return the mapping at a path; {} if there is none."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


# -- the text of --help ---------------------------------------------------------


def render_help(
    cls: type,
    prog: str,
    description: str = "",
    example: str = "",
    essential: Sequence[str] | None = None,
) -> str:
    """Return the text of ``--help``: usage, options, examples.

    Args:
        cls: dataclass of the options.
        prog: program and command, for example "skillnet finetune".
        description: one paragraph.
        example: command lines, one per line.
        essential: dotted keys to show. ``None`` shows all options in full.
    """
    bare = [f.name.upper() for f in dataclasses.fields(cls) if f.metadata.get(POSITIONAL)]
    usage = " ".join(["usage:", prog, *(f"[{name}]" for name in bare), "[OPTIONS]"])
    lines = [usage, ""]
    if description:
        lines += [*textwrap.wrap(" ".join(description.split()), WIDTH), ""]
    lines += ["options:"]
    for option, text in STANDARD_OPTIONS:
        lines += _entry(option, text)
    if essential is None:
        lines += _section(cls, "", _defaults_of(cls))
    else:
        lines += _essential_lines(cls, essential)
        lines += ["", f"All options: {prog} --help all"]
    if example:
        lines += ["", "example:"]
        for line in example.strip().splitlines():
            lines += _wrap_example(line)
    return "\n".join(lines)


def default_essential(cls: type) -> list[str] | None:
    """Return the options of a short help without a list of keys: all without options of their own.

    Returns:
        Dotted keys. ``None`` if they need more than :data:`MAX_ESSENTIAL` lines.
    """
    keys = [name for name, hint in (child_types(cls) or {}).items() if _is_leaf(hint)]
    return keys if len(keys) <= MAX_ESSENTIAL else None


def argument_notes(cls: type) -> dict[str, str]:
    """Return name -> note of the "Args:" section in the docstring of ``cls``."""
    body = textwrap.dedent("    " + (cls.__doc__ or ""))
    found = re.search(r"^\s*Args:\n(.*?)(?:\n\s*\n|\Z)", body, re.DOTALL | re.MULTILINE)
    if not found:
        return {}
    notes = re.findall(
        r"^\s+(\w+)(?: \([^)]*\))?: (.*?)(?=^\s+\w+(?: \([^)]*\))?: |\Z)",
        found.group(1) + "\n",
        re.DOTALL | re.MULTILINE,
    )
    return {name: " ".join(text.split()) for name, text in notes}


def display_width(text: str) -> int:
    """Return the columns that ``text`` takes in a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


def _is_leaf(hint: Any) -> bool:
    known = child_types(hint)
    return known is None or ("*" in known and child_types(known["*"]) is None)


def _essential_lines(cls: Any, keys: Sequence[str]) -> list[str]:
    lines = []
    for key in keys:
        *path, name = key.split(".")
        owner = without_none(functools.reduce(type_below, path, cls))
        (alias,) = (f.metadata.get(ALIAS) for f in dataclasses.fields(owner) if f.name == name)
        option = f"--{'.'.join([*path, alias or name])}"
        if "*" in (child_types(type_below(owner, name)) or {}):
            option += ".NAME"
        default = _default(_value_at(_defaults_of(cls), path), name)
        lines += _short_entry(option, argument_notes(owner).get(name, ""), default)
    return lines


def _short_entry(option: str, note: str, default: str) -> list[str]:
    """Return one line: the first clause of a note, shortened to the width, and the default."""
    end = "" if default in ("", "; default null", "; default []") else f" ({default[2:]})"
    if len(end) > 40:
        end = ""
    text = re.split(r"(?<=\w)[.;](?= |$)| \(|: (?=\w+ =|``)", note)[0].rstrip(".")
    left = f"  {option} ".ljust(COLUMN)
    room = WIDTH - len(left) - len(end)
    text = textwrap.shorten(_remove_markup(text), room, placeholder=" …") if text else ""
    return [f"{left}{text}{end}".rstrip()]


def _wrap_example(line: str) -> Iterator[str]:
    """Yield an example with the shell's line continuation where it is too long."""
    rest = f"  {line}"
    while display_width(rest) > WIDTH:
        cut = max(n for n, each in enumerate(rest) if each == " " and n < WIDTH - 2)
        yield f"{rest[:cut]} \\"
        rest = f"      {rest[cut + 1 :]}"
    yield rest


def _defaults_of(cls: type) -> dict[str, Any]:
    try:
        return default_values(cls)
    except (TypeError, ValueError):  # a nested dataclass whose fields are required
        return {}


def _section(cls: Any, prefix: str, tree: dict[str, Any]) -> list[str]:
    """Return the lines of all options of ``cls``, those without options of their own first."""
    notes = argument_notes(cls)
    marks = {f.name: f.metadata for f in dataclasses.fields(without_none(cls))}
    plain: list[str] = []
    nested: list[str] = []
    for name, hint in (child_types(cls) or {}).items():
        value = tree.get(name)
        below = child_types(hint)
        alias, command = marks[name].get(ALIAS), marks[name].get(COMMAND)
        if FIXED in marks[name]:
            continue
        if below is None:
            text = f"{notes.get(name, '')} ({describe_type(hint)}{_default(tree, name)})".strip()
            plain += _entry(f"{f'--{alias}, ' if alias else ''}--{prefix}{name}", text)
            continue
        if command:
            text = f"any KEY of skillnet {command}, see skillnet {command} --help all"
            plain += _entry(f"--{prefix}{name}.KEY", f"{notes.get(name, '')} ({text})".strip())
            continue
        nested += ["", *_wrap(f"{prefix}{name}: {notes.get(name, '')}".rstrip(": "))]
        if "*" in below:
            known = ", ".join(value or ())
            nested += _wrap(f"  (NAME: {known})") if known else []
            nested += _below(below["*"], f"{prefix}{name}.NAME")
        else:
            nested += _section(without_none(hint), f"{prefix}{name}.", value or {})
    return plain + nested


def _below(value_hint: Any, prefix: str) -> list[str]:
    known = child_types(value_hint)
    if known is None:
        return _entry(f"--{prefix}", describe_type(value_hint))
    if "*" in known:
        return _below(known["*"], f"{prefix}.NAME")
    return [line for line in _section(without_none(value_hint), f"{prefix}.", {}) if line]


def _default(tree: dict[str, Any], name: str) -> str:
    if name not in tree or isinstance(tree[name], dict):
        return ""
    value = tree[name]
    if isinstance(value, list):
        text = f"[{', '.join(map(str, value))}]"
    else:
        text = "null" if value is None else str(value)
        text = text.lower() if isinstance(value, bool) else text
    return f"; default {text}" if text else ""


def _wrap(text: str) -> list[str]:
    text = _remove_markup(text)
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", drop_whitespace=True) or [""]


def _remove_markup(text: str) -> str:
    """Return a part of a docstring without Sphinx roles and the backquotes of code."""
    return re.sub(r"(?::[a-z]+)+:`(?:~[\w.]*\.)?([^`]+)`", r"\1", text).replace("``", "")


def _entry(option: str, text: str) -> list[str]:
    indent = " " * COLUMN
    wrapped = textwrap.wrap(_remove_markup(text), WIDTH - COLUMN) or [""]
    if len(option) + 4 > COLUMN:
        return [f"  {option}", *(indent + line for line in wrapped)]
    return [f"  {option:<{COLUMN - 2}}{wrapped[0]}", *(indent + line for line in wrapped[1:])]
