"""Python source to functions: code without its docstring, and the docstring's first paragraph."""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

_URL = re.compile(r"(?:https?|ftp)://[^\s，。；、）)>\]\"']+|www\.[^\s，。；、）)>\]\"']+")
_OPENING = re.compile(r"\n[ \t]*[uUrRbB]{0,2}(\"\"\"|\'\'\')")
#: Quotes that end a text which stands on lines of its own.
_CLOSING = {quotes: re.compile(quotes + r"[ \t]*(?=\n|$)") for quotes in ('"""', "'''")}
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class SourceFunction:
    """One function or method.

    Args:
        name: with the classes and functions around it, joined by dots.
        line: where its ``def`` stands, from 1.
        code: its source without the docstring, indented from the margin.
        body: ``code`` from after the signature.
        summary: first paragraph of the docstring, on one line, without web addresses; "" if
            there is none.
    """

    name: str
    line: int
    code: str
    body: str
    summary: str


def decode_source(data: bytes) -> str:
    """A Python file's text. A byte order mark is passed over.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as problem:
        raise ValueError(f"not UTF-8 ({problem.reason})") from None


def parse_functions(source: str) -> Iterator[SourceFunction]:
    """Every function of a module, in the order of the text. Parsed, never executed.

    Raises:
        ValueError: it is not Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as problem:
        raise ValueError(f"not Python of this version ({type(problem).__name__})") from None
    lines = source.encode("utf-8").splitlines(keepends=True)
    yield from _walk(tree, lines)


def remove_docstring(source: str) -> str:
    """The source of one function without its docstring, indented from the margin.

    Source that does not parse (of another Python, cut short) loses the first text that stands on
    lines of its own.
    """
    try:
        found = next(parse_functions(textwrap.dedent(source)), None)
    except ValueError:
        found = None
    if found is not None:
        return found.code
    return _without_loose_text(source).strip()


def _without_loose_text(source: str) -> str:
    """The source without the first text in three quotes that stands on lines of its own."""
    unclosed: set[str] = set()  # or each opening would be followed to the end of a long source
    for opening in _OPENING.finditer(source):
        quotes = opening[1]
        if quotes in unclosed:
            continue
        closing = _CLOSING[quotes].search(source, opening.end())
        if closing is not None:
            return source[: opening.start()] + source[closing.end() :]
        unclosed.add(quotes)
    return source


def first_paragraph(docstring: str) -> str:
    """The first paragraph on one line, web addresses and markup colons removed."""
    first = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return re.sub(r"\s+", " ", _URL.sub(" ", first)).strip(" \t:：-—*#=")


def count_chinese_characters(text: str) -> int:
    """How many Chinese characters it holds."""
    return len(_CHINESE.findall(text))


#: Where statements stand inside statements; functions are never found inside expressions.
_BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")


def _walk(tree: ast.AST, lines: list[bytes]) -> Iterator[SourceFunction]:
    # A chain of elif is as deep as it is long: no function that calls itself.
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]
    while waiting:
        node, around = waiting.pop()
        name = around
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{around}.{node.name}" if around else node.name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _function(node, name, lines)
        below: list[ast.AST] = []
        for block in _BLOCKS:
            statements = getattr(node, block, ())
            if isinstance(statements, list):  # a lambda's body is none
                below += statements
        waiting += [(child, name) for child in reversed(below)]


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, lines: list[bytes]
) -> SourceFunction:
    first = node.body[0]
    docstring = ast.get_docstring(node)
    start, end = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
    margin = " " * node.col_offset
    if docstring is None:
        body = _cut(lines, (first.lineno, first.col_offset), end)
        code = textwrap.dedent(margin + _cut(lines, start, end))
    else:
        head = _cut(lines, start, (first.lineno, first.col_offset)).rstrip(" \t")
        body = _cut(lines, (first.end_lineno or 0, first.end_col_offset or 0), end)
        code = textwrap.dedent(margin + head + body.lstrip("; \t"))
    code = re.sub(r"\n(?:[ \t]*\n)+", "\n", code).strip()
    return SourceFunction(
        name, node.lineno, code, body.strip("; \t\n"), first_paragraph(docstring or "")
    )


def _cut(lines: list[bytes], start: tuple[int, int], end: tuple[int, int]) -> str:
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right].decode("utf-8")
    parts = [lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]]
    return b"".join(parts).decode("utf-8")
