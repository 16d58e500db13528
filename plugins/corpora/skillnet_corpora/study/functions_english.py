"""Corpus ``functions_english``: Python functions with English docstrings, split by package.

Encoders that were pretrained on English can start here. The packages of ``validation`` and ``test``
were first published after CodeSearchNet was collected (2019), on which such encoders often trained.
A training function is rejected if it is a near twin of an evaluated function or has its docstring.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives, stable_hash
from pipelines.data.transforms import text
from skillnet_corpora.demo import IdAllocator
from skillnet_corpora.demo.functions import (
    LARGEST_TEST_MODULE,
    SHORTEST_BODY,
    TWIN,
    FoundFunction,
    FunctionsCorpus,
    find_defects,
    pin_wheel,
    read_functions,
)
from skillnet_corpora.study.functions_packages import find_leaks

#: Minimum number of words of Latin letters of a docstring that serves as caption.
FEWEST_WORDS = 4
#: Target numbers of functions. Complete modules are added until they are reached.
SIZES = {"validation": 240, "test": 500}
#: Packages that no training row is of.
EVALUATED = {"narwhals": "validation", "litestar": "test", "textual": "test"}


class EnglishFunctionsCorpus(FunctionsCorpus):
    """Functions of seven packages, with the first paragraph of their English docstrings."""

    name = "functions_english"
    version = 1
    archives = (
        pin_wheel(
            "networkx-3.6.1-py3-none-any.whl",
            2_068_504,
            "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
            "networkx==3.6.1",
            "BSD-3-Clause",
        ),
        pin_wheel(
            "django-5.2.19-py3-none-any.whl",
            8_319_631,
            "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
            "django==5.2.19",
            "BSD-3-Clause",
        ),
        pin_wheel(
            "scrapy-2.19.0-py3-none-any.whl",
            379_771,
            "44c1ad4b008f1976e946c75b2adce0e448cbfe470c584b1b59469abf270e8013",
            "scrapy==2.19.0",
            "BSD-3-Clause",
        ),
        pin_wheel(
            "boltons-26.2.0-py3-none-any.whl",
            199_536,
            "41942cbce440211bbcf2487ccdc356964ad674f95a01068b8a0dd7a1d1fed036",
            "boltons==26.2.0",
            "BSD-3-Clause",
        ),
        pin_wheel(
            "narwhals-2.29.0-py3-none-any.whl",
            501_718,
            "1c69b3dc30240f6e848c5a673cafc86affa44184ecce721e25b7194663ad10dc",
            "narwhals==2.29.0",
            "MIT",
        ),
        pin_wheel(
            "litestar-2.25.0-py3-none-any.whl",
            584_699,
            "ff16470b6aa3031ea3210bbb474b00b24c636ddfe8e0ee3d09c85aff3058a93f",
            "litestar==2.25.0",
            "MIT",
        ),
        pin_wheel(
            "textual-8.2.8-py3-none-any.whl",
            731_418,
            "267375fd402dc8d981457212efa71f0e3365fd17bba144ba9bb3ed7563cb374a",
            "textual==8.2.8",
            "MIT",
        ),
    )

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield functions in the order of the packages above."""
        found: list[FoundFunction] = []
        for item in read_functions(sources, self.archives):
            if isinstance(item, RejectedRow):
                yield item
            elif len(re.findall(r"[A-Za-z]{2,}", item.function.summary)) < FEWEST_WORDS:
                yield RejectedRow(item.key, f"docstring of fewer than {FEWEST_WORDS} words")
            else:
                found.append(item)
        reasons = find_defects(found, set())
        kept = [item for item in found if item.key not in reasons]
        split = _split_packages(kept)
        ids = IdAllocator()
        rows = {
            item.key: item.make_row(split[item.key], ids(item.function.summary))
            for item in kept
            if item.key in split
        }
        evaluated = [row for row in rows.values() if row["split"] != "train"]
        train = [item for item in kept if split.get(item.key) == "train"]
        reasons |= find_leaks(train, evaluated, "an evaluated function")
        for item in found:
            reason = reasons.get(item.key)
            if reason is None and item.key in rows:
                yield rows[item.key]
            else:
                yield RejectedRow(item.key, reason or "of a package that is held out")

    def preprocessing(self) -> dict[str, Any]:
        """Return the limits of the selection and of the split."""
        return {
            "shortest_body": SHORTEST_BODY,
            "fewest_words": FEWEST_WORDS,
            "evaluated_packages": EVALUATED,
            "rows": SIZES,
            "largest_test_module": LARGEST_TEST_MODULE,
            "near_twin": TWIN,
            "code_tokens": text.CODE_TOKENS,
            "caption_tokens": text.CAPTION_TOKENS,
            "split_by": "package",
        }

    def extra_sources(self) -> list[dict[str, str]]:
        """Return nothing: the standard library is not read."""
        return []


def _split_packages(kept: list[FoundFunction]) -> dict[str, str]:
    """Return key -> split; modules of held-out packages beyond the target numbers are left out."""
    split = {item.key: "train" for item in kept if item.package not in EVALUATED}
    modules = defaultdict(list)
    for item in kept:
        if item.package in EVALUATED:
            modules[item.module_id].append(item.key)
    taken = dict.fromkeys(SIZES, 0)
    for module in sorted(modules, key=lambda module: stable_hash("functions_english", *module)):
        keys, name = modules[module], EVALUATED[module[0]]
        if len(keys) <= LARGEST_TEST_MODULE and taken[name] < SIZES[name]:
            split |= dict.fromkeys(keys, name)
            taken[name] += len(keys)
    return split
