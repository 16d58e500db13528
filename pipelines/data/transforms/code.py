"""Transform of Python source: functions without docstring, and the docstring's first paragraph."""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

_URL = re.compile(r"(?:https?|ftp)://[^\s，。；、）)>\]\"']+|www\.[^\s，。；、）)>\]\"']+")
_OPENING = re.compile(r"\n[ \t]*[uUrRbB]{0,2}(\"\"\"|\'\'\')")
#: Closing quotes of a text that occupies complete lines.
_CLOSING = {quotes: re.compile(quotes + r"[ \t]*(?=\n|$)") for quotes in ('"""', "'''")}
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class SourceFunction:
    """One function or method of a Python module.

    Args:
        name: qualified name, with enclosing classes and functions.
        line: line of its ``def``, from 1.
        code: its source without the docstring and without common indentation.
        body: ``code`` after the signature.
        summary: first paragraph of the docstring on one line, without URLs; "" if there is none.
        is_inner: whether another function contains it.
    """

    name: str
    line: int
    code: str
    body: str
    summary: str
    is_inner: bool = False


def decode_source(data: bytes) -> str:
    """Decode a Python file, without a byte order mark.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from None


def parse_functions(source: str) -> Iterator[SourceFunction]:
    """Yield all functions of a module in source order. The module is parsed, never executed.

    Raises:
        ValueError: the source is not Python.
    """
    tree = parse_module(source)
    lines = source.encode("utf-8").splitlines(keepends=True)
    yield from _walk(tree, lines)


def parse_module(source: str) -> ast.Module:
    """Return the tree of a module, without the warnings of Python's parser.

    Args:
        source: text that may be Python.

    Raises:
        ValueError: the source is not Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not Python of this version ({type(error).__name__})") from None


def remove_docstring(source: str) -> str:
    """Return the source of one function without its docstring and common indentation.

    Source that does not parse (another Python version, truncated) loses the first triple-quoted
    text that occupies complete lines.
    """
    try:
        function = next(parse_functions(textwrap.dedent(source)), None)
    except ValueError:
        function = None
    if function is not None:
        return function.code
    return _remove_first_text(source).strip()


def _remove_first_text(source: str) -> str:
    """Return source without the first triple-quoted text that occupies complete lines."""
    # Without this set, each unclosed opening would be searched to the end: quadratic time.
    unclosed: set[str] = set()
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
    """Return the first paragraph of a docstring on one line, without URLs and markup colons."""
    first = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    return re.sub(r"\s+", " ", _URL.sub(" ", first)).strip(" \t:：-—*#=")


def count_chinese_characters(text: str) -> int:
    """Return the number of Chinese characters of a text."""
    return len(_CHINESE.findall(text))


#: Fields of a statement that hold statements. Expressions never contain functions.
_BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")


def _walk(tree: ast.AST, lines: list[bytes]) -> Iterator[SourceFunction]:
    # A long elif chain is deeply nested, so a recursive walk could exceed the recursion limit.
    pending: list[tuple[ast.AST, str, bool]] = [(tree, "", False)]
    while pending:
        node, scope, is_inner = pending.pop()
        name = scope
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{scope}.{node.name}" if scope else node.name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _make_function(node, name, lines, is_inner)
            is_inner = True
        below: list[ast.AST] = []
        for block in _BLOCKS:
            statements = getattr(node, block, ())
            if isinstance(statements, list):  # the body of a lambda is an expression
                below += statements
        pending += [(child, name, is_inner) for child in reversed(below)]


def _make_function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, lines: list[bytes], is_inner: bool
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
    summary = first_paragraph(docstring or "")
    return SourceFunction(name, node.lineno, code, body.strip("; \t\n"), summary, is_inner)


def _cut(lines: list[bytes], start: tuple[int, int], end: tuple[int, int]) -> str:
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right].decode("utf-8")
    parts = [lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]]
    return b"".join(parts).decode("utf-8")
