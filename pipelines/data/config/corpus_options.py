"""Options ``--corpus NAME=PATH`` and ``--pair NAME=FIRST+SECOND`` of commands about corpora."""

import re
from collections.abc import Collection, Mapping, Sequence

from skillnet_platform.errors import UserError

#: Option -> example of its value.
EXAMPLES = {"--corpus": "tnews=/data/tnews_public", "--pair": "both=images+sounds"}
#: A name becomes a directory and a configuration key, so separators are not allowed.
CORPUS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def rewrite_corpus_options(arguments: Sequence[str]) -> list[str]:
    """Replace ``--corpus NAME=PATH`` by ``--corpus.NAME PATH``, which the parser reads.

    ``--pair NAME=FIRST+SECOND`` becomes ``--pair.NAME FIRST+SECOND``.
    """
    out: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in EXAMPLES and rest:
            word = f"{word}={rest.pop(0)}"
        option, _, given = word.partition("=")
        if option not in EXAMPLES or word == option:
            out.append(word)
            continue
        name, equals, value = given.partition("=")
        if not equals or not value or not re.fullmatch(r"[\w-]+", name):
            raise UserError(
                f"command line: {option} {name}: expected NAME=VALUE, for example "
                f"{option} {EXAMPLES[option]}"
            )
        # Two values of one key would leave only one of the corpora.
        if f"{option}.{name}" in out:
            example = f"NAME=FORMAT:{value}" if option == "--corpus" else f"NAME={value}"
            raise UserError(
                f"command line: {option} {name} is given twice; give one of them another name: "
                f"{option} {example}"
            )
        out += [f"{option}.{name}", value]
    return out


def check_corpus_name(option: str, name: str) -> None:
    """Raise UserError if a corpus cannot have a name that an option gives it."""
    if not CORPUS_NAME.fullmatch(name):
        raise UserError(f"{option} {name}: a name has letters, digits, - and _, at most 64 of them")


def check_pairs(pairs: Mapping[str, str], taken: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return the two corpora of each pair.

    Args:
        pairs: name of a new corpus -> ``FIRST+SECOND``.
        taken: names that other corpora have.

    Raises:
        UserError: a name cannot be a directory or is taken, or a value is not two other corpora.
    """
    found = {}
    for name, pair in pairs.items():
        parts = pair.split("+")
        check_corpus_name("--pair", name)
        if name in taken:
            raise UserError(f"--pair {name}: {name} is another corpus. Give another name")
        if len(parts) != 2 or not all(CORPUS_NAME.fullmatch(part) for part in parts):
            raise UserError(
                f"--pair {name}: {pair!r} is no pair. Give the names of two prepared corpora, for "
                f"example --pair {EXAMPLES['--pair']}"
            )
        first, second = parts
        if first == second:
            raise UserError(f"--pair {name}: {first} is given twice. Give corpora of two media")
        found[name] = (first, second)
    return found
