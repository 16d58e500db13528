"""Options ``--corpus NAME=PATH`` of commands that read data of the user."""

import re
from collections.abc import Sequence

from skillnet_platform.errors import UserError


def rewrite_corpus_options(arguments: Sequence[str]) -> list[str]:
    """Replace ``--corpus NAME=PATH`` by ``--corpus.NAME PATH``, which the parser reads."""
    out: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--corpus" and rest:
            word = f"--corpus={rest.pop(0)}"
        if word.startswith("--corpus="):
            name, equals, path = word.removeprefix("--corpus=").partition("=")
            # The name becomes a directory and a configuration key, so separators are not allowed.
            if not equals or not path or not re.fullmatch(r"[\w-]+", name):
                raise UserError(
                    f"command line: --corpus {name}: expected NAME=PATH, for example "
                    "--corpus tnews=/data/tnews_public"
                )
            # Two values of one key would leave only one of the corpora.
            if f"--corpus.{name}" in out:
                raise UserError(
                    f"command line: --corpus {name} is given twice; give one of them another name: "
                    f"--corpus NAME=FORMAT:{path}"
                )
            out += [f"--corpus.{name}", path]
        else:
            out.append(word)
    return out
