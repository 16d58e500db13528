"""Transform of one function without a label to text-code pairs: its comments, and its name.

A comment describes the lines below it, and the name with its arguments describes the body. CodeT5+
(Wang et al. 2023) and UniXcoder (Guo et al. 2022) pretrain on pairs of comments and code; names as
queries are ours. The corpus ``functions_packages`` calls :func:`derive_code_pairs`.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipelines.data.transforms.code import count_chinese_characters, first_paragraph, parse_module

#: Characters of the shortest code of a pair.
SHORTEST_CODE = 30
#: Lines of the longest code below a comment.
MOST_LINES = 12
#: A text has at least this many Chinese characters, or this many words.
FEWEST_CHINESE, FEWEST_WORDS = 4, 3

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")
_LETTERS = re.compile(r"[A-Za-z]{2,}")
#: Arguments whose names describe nothing.
_USUAL_ARGUMENTS = frozenset({"self", "cls", "args", "kwargs"})


@dataclass(frozen=True)
class CodePair:
    """A text, and the code of the same function that it describes.

    Args:
        kind: the text is a ``comment``, or the ``name`` with the arguments.
        line: line of the function at which the text starts, from 1.
        text: on one line.
        code: without the text, and without common indentation.
    """

    kind: Literal["comment", "name"]
    line: int
    text: str
    code: str


def derive_code_pairs(code: str) -> list[CodePair]:
    """Return the pairs of a function: that of its name, then those of its comments.

    Args:
        code: source of one function without docstring and common indentation, as
            :class:`pipelines.data.transforms.code.SourceFunction` holds it.

    Returns:
        No pairs if the source does not parse, as after a change of Python's grammar.
    """
    function = _parse(code)
    if function is None:
        return []
    lines = code.split("\n")
    pairs = [_pair_name(function, lines)]
    if "#" in code:
        pairs += _pair_comments(code, lines)
    return [pair for pair in pairs if _is_descriptive(pair.text) and _is_long(pair.code)]


def split_identifier(name: str) -> list[str]:
    """Return the words of a name in lower case: ``read_CSVFile2`` -> read, csv, file, 2."""
    return [word.lower() for word in _WORD.findall(name)]


def _parse(code: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    try:
        statements = parse_module(code).body
    except ValueError:
        return None
    first = statements[0] if statements else None
    return first if isinstance(first, ast.FunctionDef | ast.AsyncFunctionDef) else None


def _pair_name(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> CodePair:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    names = [function.name, *(each.arg for each in arguments if each is not None)]
    kept = [name for name in names if name not in _USUAL_ARGUMENTS]
    text = " ".join(word for name in kept for word in split_identifier(name))
    first = function.body[0]
    # A body on the line of its signature has a first line that is cut; its columns count bytes.
    head = lines[first.lineno - 1].encode("utf-8")[: first.col_offset].decode("utf-8")
    body = lines[first.lineno - 1 :]
    body[0] = " " * len(head) + body[0][len(head) :]
    return CodePair("name", function.lineno, text, _dedent(body))


def _pair_comments(code: str, lines: list[str]) -> Iterator[CodePair]:
    comments = _find_comments(code)
    for number, column in comments.items():
        if number - 1 in comments:
            continue  # a further line of the comment above
        last = number
        while last + 1 in comments:
            last += 1
        said = [_strip_marks(lines[line - 1]) for line in range(number, last + 1)]
        if _is_code("\n".join(said)):
            continue
        # A paragraph ends at an empty line, which is no code.
        text = "\n".join(line for line in said if not line or not _is_code(line))
        block: list[str] = []
        for below in range(last + 1, len(lines) + 1):
            line = lines[below - 1]
            indent = len(line) - len(line.lstrip())
            # Code of the next comment, or of an outer block, is not described by this one.
            is_next = below in comments and comments[below] <= column
            if is_next or (line.strip() and indent < column) or len(block) == MOST_LINES:
                break
            block.append(line)
        yield CodePair("comment", number, first_paragraph(text), _dedent(block))


def _find_comments(code: str) -> dict[int, int]:
    """Return line -> column of the comments that stand alone on their line."""
    found: dict[int, int] = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            number, column = token.start
            if token.type == tokenize.COMMENT and not token.line[:column].strip():
                found[number] = column
    except (tokenize.TokenError, SyntaxError):
        return {}
    return found


def _strip_marks(line: str) -> str:
    return line.strip().lstrip("#").strip(" \t-=*#")


def _is_code(text: str) -> bool:
    """Return whether a comment is code that is switched off. A single word is none."""
    try:
        statements = parse_module(text).body
    except ValueError:
        return False
    first = statements[0] if len(statements) == 1 else None
    return not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Name))


def _is_descriptive(text: str) -> bool:
    has_chinese = count_chinese_characters(text) >= FEWEST_CHINESE
    return has_chinese or len(_LETTERS.findall(text)) >= FEWEST_WORDS


def _is_long(code: str) -> bool:
    return len(code) >= SHORTEST_CODE


def _dedent(lines: list[str]) -> str:
    """Return lines without the indentation of the first; ``textwrap`` fails on texts in them."""
    if not lines:
        return ""
    margin = len(lines[0]) - len(lines[0].lstrip())
    cut = [line[margin:] if not line[:margin].strip() else line for line in lines]
    return "\n".join(cut).strip()
