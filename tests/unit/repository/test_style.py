"""Language and names of the repository: banned words, public names, comments."""

import textwrap
from pathlib import Path

import pytest

from tools.style.check import ROOT, tracked_files
from tools.style.names import PACKAGES, comment_shares, find_bad_names, find_empty_entries
from tools.style.words import find_banned_words

FILES = tracked_files()
MODULES = [name for name in FILES if name.startswith(tuple(f"{p}/" for p in PACKAGES))]


def test_comments_are_frequent_enough() -> None:
    shares = comment_shares(ROOT, MODULES)
    assert {package: share for package, share in shares.items() if not 0.03 <= share <= 0.08} == {}


@pytest.mark.parametrize(
    ("line", "replacement"),
    [
        ("The run goes on from its checkpoint.", "resumes"),
        ("each caption is spelt with one tokenizer", "tokenized"),
        ("# what is mended", "fix"),
        ("it hangs on the seed", "depends on"),
        ("the user's mistake", "user error"),
        ("a corpus in the making", "staging"),
        ("def test_a_row_is_told_apart() -> None: ...", "reported"),
        ("class SpeltCaption: ...", "tokenized"),
        ("goes_on = a_users_mistake or BYTES_TAKEN_UP", "resumes"),
    ],
)
def test_banned_words_are_found(tmp_path: Path, line: str, replacement: str) -> None:
    (tmp_path / "page.md").write_text(f"{line}\n", encoding="utf-8")
    finding, *_ = find_banned_words(tmp_path, ["page.md"])
    assert finding.startswith("page.md:1:")
    assert replacement in finding


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("def told() -> None: ...\n", "function told has one word"),
        ("class Making: ...\n", "class Making has one word"),
        ("def build_model() -> None: ...\nclass CorpusJob: ...\n", ""),
    ],
)
def test_one_word_names_are_found(tmp_path: Path, source: str, finding: str) -> None:
    (tmp_path / "module.py").write_text(source, encoding="utf-8")
    found = "\n".join(find_bad_names(tmp_path, ["module.py"]))
    assert (finding in found) if finding else found == ""


@pytest.mark.parametrize(
    ("entry", "is_empty"),
    [
        ("rank: of this process.", True),
        ("rank: the rank.", True),
        ("run_id: its run ID.", True),
        ("**options: of the library.", True),
        ("rank: index of this process, from 0.", False),
        ("path: file to read.", False),
        ("offset: often 0.", False),
    ],
)
@pytest.mark.parametrize(
    "place", ["def load_model(x):", "class CorpusJob:", "class A:\n  def b(self):"]
)
def test_empty_entries_are_found(tmp_path: Path, place: str, entry: str, is_empty: bool) -> None:
    section = "Attributes" if "Job" in place else "Args"
    lines = ["Do.", "", f"{section}:", "    x: number.", f"    {entry}", "", "Returns:"]
    body = '"""' + "\n".join([*lines, "    of no use.", '"""'])
    text = f"{place}\n" + textwrap.indent(body, " " * 8)
    (tmp_path / "module.py").write_text(text, encoding="utf-8")
    assert len(list(find_empty_entries(tmp_path, ["module.py"]))) == is_empty


def test_repeated_names_are_found(tmp_path: Path) -> None:
    for name in ("first.py", "second.py"):
        (tmp_path / name).write_text("def load_model() -> None: ...\n", encoding="utf-8")
    found = "\n".join(find_bad_names(tmp_path, ["first.py", "second.py"]))
    assert "load_model is also defined in second.py" in found
