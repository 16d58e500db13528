"""Words that the style guide replaces, and where they occur in source, messages and documents."""

import re
from collections.abc import Iterator
from pathlib import Path

#: Word or phrase (a regular expression) -> what to write. CONTRIBUTING.md explains the rule.
BANNED = {
    r"spelt|misspelt": "tokenized, encoded, written",
    r"told": "reported, logged, stated",
    r"tells? (?:how|which|what|whether|the user|apart)": "states, reports",
    r"anew": "again, from scratch",
    r"hangs? on": "depends on",
    r"goes? on|going on|went on|gone on": "resumes, continues",
    r"in the making": "in progress, staging",
    r"mend(?:s|ed|ing)?": "fix",
    r"how-manieth": "index",
    r"users?'?s? mistakes?": "user error",
    r"set aside|sets aside": "rejected, quarantined",
    r"of one's own|one's own": "own, custom",
    r"takes? up|taken up|took up": "resumes, occupies",
    r"puts? up": "sets, starts",
    r"at work": "running",
    r"shall": "must",
    r"so (?:many|long|often|much) (?!as\b)": "a number with its unit",
    r"whoever|whatever|wherever": "name the actor, value or place",
    r"thereof|therein|whereof": "of it; repeat the noun",
    r"honest(?:ly)? (?:archive|file|row|tar)": "valid",
}

_PATTERN = re.compile(
    "|".join(rf"(?P<w{i}>\b(?:{pattern})\b)" for i, pattern in enumerate(BANNED)), re.IGNORECASE
)
_REPLACEMENTS = list(BANNED.values())
#: Where a name of several words divides: ``test_it_is_told``, ``ToldError``.
_NAME_BORDER = re.compile(r"_|(?<=[a-z0-9])(?=[A-Z])")
#: Files that are read: source, templates, configuration and documents.
SUFFIXES = (".py", ".md", ".yaml", ".yml", ".toml", ".html", ".css", ".sh", ".cff")
#: Data that commands have written, and the list of banned words itself.
EXCLUDED = (
    *("benchmarks/results/", "lab/results/", "tests/golden/", "tools/style/", "CONTRIBUTING.md"),
    "tests/unit/repository/test_style.py",
)
#: Texts that the digest of a corpus contains, so that they cannot change.
DIGESTED_TEXTS = ("copy of the recording spelt with ü",)


def find_banned_words(root: Path, files: list[str]) -> Iterator[str]:
    """Yield one line for each banned word, also in names: ``path:line: word -> replacement``.

    Args:
        root: the repository.
        files: paths relative to ``root``; files of other kinds are skipped.
    """
    for name in files:
        if not name.endswith(SUFFIXES) and Path(name).name not in ("Makefile", "Dockerfile"):
            continue
        if name.startswith(EXCLUDED):
            continue
        text = (root / name).read_text(encoding="utf-8")
        # One search of a whole file takes a third of the time of one per line.
        if not _PATTERN.search(_NAME_BORDER.sub(" ", text)):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if any(text in line for text in DIGESTED_TEXTS):
                continue
            for match in _PATTERN.finditer(_NAME_BORDER.sub(" ", line)):
                index = int(str(match.lastgroup)[1:])
                yield f"{name}:{number}: {match[0]!r} -> {_REPLACEMENTS[index]}"
