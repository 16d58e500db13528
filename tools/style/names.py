"""Public names and the entries that describe them.

Names are unique in the repository, and have two words unless they are terms of the field.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("skillnet", "pipelines", "sweeps", "platform")

#: One-word names that the field, or our public interface, uses.
TERMS = {
    *("main", "command", "account", "finetune", "pretrain", "prepare", "fetch", "quickstart"),
    *("evaluate", "register", "predict", "search", "grow", "verify", "inspect", "sweep"),
    *("compare", "interpret", "submit", "doctor", "accuracy", "patchify"),
    *("Account", "Encoder", "Task", "Modality", "Objective", "System", "Corpus", "Archive"),
    *("Trial", "Tracker", "Finding", "Outputs", "Batch", "Tokens", "Row", "Terminated"),
}

#: Words that an entry of ``Args`` needs beside its noun.
ARTICLES = {"a", "an", "the", "its", "this"}
_SECTION = re.compile(r"^(?:Args|Attributes):\n((?: .*\n?|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^    (\*{0,2}\w[\w, *]*): (.*)$", re.MULTILINE)


class PublicName(NamedTuple):
    """A function or class at the top level of a module.

    Attributes:
        path: location of the module, relative to the repository.
        line: number of the line that defines it, from 1.
        name: without the module.
        is_class: whether it is a class.
    """

    path: str
    line: int
    name: str
    is_class: bool


def public_names(root: Path, files: list[str]) -> Iterator[PublicName]:
    """Yield the public functions and classes of the modules among ``files``."""
    for path in files:
        if not path.endswith(".py"):
            continue
        for node in ast.parse((root / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                yield PublicName(path, node.lineno, node.name, isinstance(node, ast.ClassDef))


def find_bad_names(root: Path, files: list[str]) -> Iterator[str]:
    """Yield one line for each public name that is not unique or has only one word.

    Args:
        root: the repository.
        files: modules of the packages, relative to ``root``.
    """
    modules = defaultdict(list)
    for public in public_names(root, files):
        if public.name != "main":
            modules[public.name].append(f"{public.path}:{public.line}")
        if public.name not in TERMS and count_words(public.name) < 2:
            kind = "class" if public.is_class else "function"
            yield f"{public.path}:{public.line}: {kind} {public.name} has one word"
    for name, places in modules.items():
        if len(places) > 1:
            yield f"{places[0]}: {name} is also defined in {', '.join(places[1:])}"


def count_words(name: str) -> int:
    """Return the number of words of a snake_case or CamelCase name."""
    if "_" in name:
        return len([part for part in name.split("_") if part])
    return len(re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*|^[a-z0-9]+", name))


def comment_shares(root: Path, files: list[str]) -> dict[str, float]:
    """Return the share of lines that are or end in a comment, by package."""
    shares = {}
    for package in PACKAGES:
        comments = lines = 0
        for path in files:
            if path.startswith(f"{package}/") and path.endswith(".py"):
                text = (root / path).read_text(encoding="utf-8").splitlines()
                lines += len(text)
                comments += sum(1 for line in text if re.search(r"(^\s*|\s\s)#:? ?\S", line))
        shares[package] = comments / max(lines, 1)
    return shares


def find_empty_entries(root: Path, files: list[str]) -> Iterator[str]:
    """Yield one line for each entry of ``Args`` or ``Attributes`` that says no more than its name.

    An entry is a noun phrase: "rank: index of this process, from 0", and neither "rank: of this
    process" nor "rank: the rank".
    """
    for path in files:
        if not path.endswith(".py"):
            continue
        source = (root / path).read_text(encoding="utf-8")
        # Most tests have none.
        if not re.search(r"(?:Args|Attributes):\n", source):
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node) or ""
            for section in _SECTION.findall(text):
                for name, entry in _ENTRY.findall(section):
                    words = set(re.findall(r"\w+", entry.lower())) - ARTICLES
                    named = set(re.split(r"[_\W]+", name.lower()))
                    if entry.startswith("of ") or words <= named:
                        yield f"{path}:{node.lineno}: {node.name}: {name}: {entry}"


def missing_sections(root: Path, files: list[str]) -> Iterator[str]:
    """Yield public functions with two or more parameters whose docstring has no ``Args``."""
    for path in files:
        if not path.endswith(".py"):
            continue
        for node in ast.parse((root / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name[0] != "_":
                names = [arg.arg for arg in node.args.args + node.args.kwonlyargs]
                if len(names) > 1 and "Args:" not in (ast.get_docstring(node) or ""):
                    yield f"{path}:{node.lineno}: {node.name}({', '.join(names)}) has no Args"
