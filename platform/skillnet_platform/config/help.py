"""Text of ``--help``, generated from a dataclass, its docstring and its defaults.

``--help`` shows the essential options, one line each. ``--help all`` shows every option in full.
"""

import dataclasses
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from skillnet_platform.config.fields import ALIAS, COMMAND, FIXED, POSITIONAL, default_values
from skillnet_platform.config.schema import child_types, describe_type, without_none

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
        owner: Any = cls
        tree: Any = _defaults_of(cls)
        *path, name = key.split(".")
        for part in path:
            known = child_types(owner) or {}
            owner = known.get(part, known.get("*"))
            tree = tree.get(part) if isinstance(tree, dict) else None
        owner = without_none(owner)
        fields = {f.name: f for f in dataclasses.fields(owner)}
        alias = fields[name].metadata.get(ALIAS)
        option = f"--{'.'.join([*path, alias or name])}"
        hint = (child_types(owner) or {})[name]
        if "*" in (child_types(hint) or {}):
            option += ".NAME"
        lines += _short_entry(option, argument_notes(owner).get(name, ""), _default(tree, name))
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


def _section(cls: Any, prefix: str, tree: Any) -> list[str]:
    """Return the lines of all options of ``cls``, those without options of their own first."""
    notes = argument_notes(cls)
    marks = {f.name: f.metadata for f in dataclasses.fields(without_none(cls))}
    plain: list[str] = []
    nested: list[str] = []
    for name, hint in (child_types(cls) or {}).items():
        value = tree.get(name) if isinstance(tree, dict) else None
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
            known = ", ".join(value) if isinstance(value, dict) else ""
            nested += _wrap(f"  (NAME: {known})") if known else []
            nested += _below(below["*"], f"{prefix}{name}.NAME")
        else:
            nested += _section(without_none(hint), f"{prefix}{name}.", value)
    return plain + nested


def _below(value_hint: Any, prefix: str) -> list[str]:
    if child_types(value_hint) is None:
        return _entry(f"--{prefix}", describe_type(value_hint))
    if "*" in (child_types(value_hint) or {}):
        return _below((child_types(value_hint) or {})["*"], f"{prefix}.NAME")
    return [line for line in _section(without_none(value_hint), f"{prefix}.", None) if line]


def _default(tree: Any, name: str) -> str:
    if not isinstance(tree, dict) or name not in tree or isinstance(tree[name], dict):
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
