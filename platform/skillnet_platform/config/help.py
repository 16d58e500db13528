"""The ``--help`` of a command, drawn from the dataclass, its docstring and its defaults."""

import dataclasses
import re
import textwrap
from typing import Any

from skillnet_platform.config.fields import ALIAS, POSITIONAL, default_values
from skillnet_platform.config.schema import child_types, describe_type, without_none

WIDTH = 100
COLUMN = 34


def render_help(cls: type, prog: str, description: str = "", example: str = "") -> str:
    """The text of ``--help``: usage, every key with its type and default, an example."""
    bare = [f.name.upper() for f in dataclasses.fields(cls) if f.metadata.get(POSITIONAL)]
    usage = " ".join(["usage:", prog, *(f"[{name}]" for name in bare), "[OPTIONS]"])
    lines = [usage, ""]
    if description:
        lines += [*textwrap.wrap(" ".join(description.split()), WIDTH), ""]
    lines += ["options:"]
    lines += _entry("--config FILE", "a YAML file or a preset; repeatable, later ones win")
    lines += _entry("--json", "print one JSON document on standard output")
    lines += _entry("--help", "show this and stop")
    lines += _section(cls, "", _tree_of(cls))
    if example:
        lines += ["", "example:", *(f"  {line}" for line in example.strip().splitlines())]
    return "\n".join(lines)


def argument_notes(cls: type) -> dict[str, str]:
    """What the "Args:" part of a Google-style docstring says of each name."""
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


def _tree_of(cls: type) -> dict[str, Any]:
    try:
        return default_values(cls)
    except (TypeError, ValueError):  # a nested dataclass whose fields are required
        return {}


def _section(cls: Any, prefix: str, tree: Any) -> list[str]:
    notes = argument_notes(cls)
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    aliases = {f.name: f"--{f.metadata[ALIAS]}, " for f in fields if ALIAS in f.metadata}
    plain: list[str] = []
    nested: list[str] = []
    for name, hint in (child_types(cls) or {}).items():
        value = tree.get(name) if isinstance(tree, dict) else None
        below = child_types(hint)
        if below is None:
            text = f"{notes.get(name, '')} ({describe_type(hint)}{_default(tree, name)})".strip()
            plain += _entry(f"{aliases.get(name, '')}--{prefix}{name}", text)
        elif "*" in below:
            nested += ["", f"{prefix}{name}: {notes.get(name, '')}".rstrip(": ")]
            known = ", ".join(value) if isinstance(value, dict) else ""
            nested += [f"  (NAME: {known})"] if known else []
            nested += _below(below["*"], f"{prefix}{name}.NAME")
        else:
            nested += ["", f"{prefix}{name}: {notes.get(name, '')}".rstrip(": ")]
            nested += _section(without_none(hint), f"{prefix}{name}.", value)
    return plain + nested


def _below(value_hint: Any, prefix: str) -> list[str]:
    if child_types(value_hint) is None:
        return _entry(f"--{prefix}", describe_type(value_hint))
    if "*" in (child_types(value_hint) or {}):
        return _below((child_types(value_hint) or {})["*"], f"{prefix}.NAME")
    return [line for line in _section(without_none(value_hint), f"{prefix}.", None) if line]


def _default(tree: Any, name: str) -> str:
    if not isinstance(tree, dict) or name not in tree:
        return ""
    value = tree[name]
    if isinstance(value, list):
        text = f"[{', '.join(map(str, value))}]"
    else:
        text = "null" if value is None else str(value)
        text = text.lower() if isinstance(value, bool) else text
    return f"; default {text}" if text else ""


def _entry(option: str, text: str) -> list[str]:
    indent = " " * COLUMN
    wrapped = textwrap.wrap(text, WIDTH - COLUMN) or [""]
    if len(option) + 4 > COLUMN:
        return [f"  {option}", *(indent + line for line in wrapped)]
    return [f"  {option:<{COLUMN - 2}}{wrapped[0]}", *(indent + line for line in wrapped[1:])]
