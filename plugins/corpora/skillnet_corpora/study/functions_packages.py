"""Corpus ``functions_packages``: the task of ``functions``, with six further packages and pairs.

All rows of ``functions`` keep their splits. Five packages add training rows, and one is the
reserve. A new training function is rejected if it is a near twin of an evaluated function of
``functions`` or has its docstring. So is a function of the reserve that resembles a training
function of any package.

The split ``pretrain_pairs`` has texts and code of the functions of ``train`` and ``pretrain``
(:mod:`skillnet_corpora.study.code_pairs`). No pair is of an evaluated module or of a near twin of
an evaluated function, and no text is the docstring of a captioned function.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives
from skillnet_corpora.demo import IdAllocator
from skillnet_corpora.demo.functions import (
    ARCHIVES,
    STANDARD_LIBRARY,
    TWIN,
    FoundFunction,
    FunctionsCorpus,
    compute_overlaps,
    find_defects,
    pin_wheel,
    read_functions,
    squeeze_space,
)
from skillnet_corpora.study.code_pairs import (
    FEWEST_CHINESE,
    FEWEST_WORDS,
    MOST_LINES,
    SHORTEST_CODE,
    derive_code_pairs,
)
from skillnet_corpora.study.further_splits import PAIRS, RESERVE

#: Package of the split ``reserve``: its 76 modules are more than those of any other package.
RESERVED_PACKAGE = "tqsdk"

FURTHER_ARCHIVES = (
    pin_wheel(
        "bilibili_api_python-17.4.2-py3-none-any.whl",
        387_324,
        "91e002b2e0bcd3eb50239e35ceb849133b574f407a92a06636e1de1031b6d09d",
        "bilibili-api-python==17.4.2",
        "GPL-3.0-or-later",
    ),
    pin_wheel(
        "tqsdk-3.10.4-py3-none-any.whl",
        1_889_064,
        "6bf4121043216c33e0fbfbd61d8a01b3553448f244a50b9a6f2fb361385c4285",
        "tqsdk==3.10.4",
        "Apache-2.0",
    ),
    pin_wheel(
        "cos_python_sdk_v5-1.9.44-py3-none-any.whl",
        99_127,
        "584a97ecd5e9b15b04a1e511e6dd0ea4eca00ee87fe50aa9a3c91ce716149bcb",
        "cos-python-sdk-v5==1.9.44",
        "MIT",
    ),
    pin_wheel(
        "czsc-1.0.2-cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        21_354_508,
        "c14479b64c35922e20ee31b46f2e6ec1e46040a1e020c8acd6160f70d0bf8bc1",
        "czsc==1.0.2",
        "Apache-2.0",
    ),
    pin_wheel(
        "leancloud-3.0.2-py2.py3-none-any.whl",
        52_842,
        "eb5f3d7a456fe785acd54f0739ac193ddf1e9068ab4721527ab6172456e802b8",
        "leancloud==3.0.2",
        "LGPL-3.0",
    ),
    pin_wheel(
        "easytrader-0.23.7-py3-none-any.whl",
        58_989,
        "ae901d6e64074854f86fc64521b56199d6ee71c911d2c6c32d207ccea465fd30",
        "easytrader==0.23.7",
        "MIT; its metadata state BSD",
    ),
)


class FunctionPackagesCorpus(FunctionsCorpus):
    """Functions of 14 packages: those of ``functions``, five for training and one reserve."""

    name = "functions_packages"
    version = 2
    archives = (*ARCHIVES, *FURTHER_ARCHIVES)

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the rows of ``functions``, then functions in the order of the packages above."""
        used: list[Row] = []
        for row in super().rows(sources):
            yield row
            if not isinstance(row, RejectedRow):
                used.append(row)
        found: list[FoundFunction] = []
        for item in read_functions(sources, FURTHER_ARCHIVES):
            if isinstance(item, RejectedRow):
                yield item
            else:
                found.append(item)
        reasons = find_defects(found, {squeeze_space(row["code"]) for row in used})
        kept = [item for item in found if item.key not in reasons]
        reasons |= _leaks_into_training(kept, used)
        reasons |= _leaks_into_reserve([f for f in kept if f.key not in reasons], used)
        # Equal captions are joint positives across all packages.
        ids = IdAllocator({row["captions"][0]: row["group"] for row in used if row["captions"]})
        for item in found:
            if item.key in reasons:
                yield RejectedRow(item.key, reasons[item.key])
                continue
            group = ids(item.function.summary) if item.is_pair else -1
            if item.package == RESERVED_PACKAGE:
                used.append(item.make_row(RESERVE, group) | {"unit": item.package})
            else:
                used.append(item.make_row("train" if item.is_pair else "pretrain", group))
            yield used[-1]
        yield from _derive_pairs(used, ids)

    def preprocessing(self) -> dict[str, Any]:
        """Return the numbers of ``functions``, its version, the reserved package, and limits."""
        return super().preprocessing() | {
            "functions_version": FunctionsCorpus.version,
            "reserved_package": RESERVED_PACKAGE,
            "pairs": {
                "shortest_code": SHORTEST_CODE,
                "most_lines": MOST_LINES,
                "fewest_chinese": FEWEST_CHINESE,
                "fewest_words": FEWEST_WORDS,
            },
        }


def _derive_pairs(used: list[Row], ids: IdAllocator) -> Iterator[Row]:
    """Yield the pairs of all rows that are not evaluated.

    Args:
        used: rows of the corpus.
        ids: group of each caption; equal texts are joint positives.
    """
    sources = [row for row in used if row["split"] in ("train", "pretrain")]
    evaluated = [row for row in used if row["split"] not in ("train", "pretrain")]
    # Of training functions too: a fold may evaluate them.
    docstrings = {caption for row in used for caption in row["captions"]}
    overlaps = np.zeros(len(sources))
    if sources and evaluated:
        overlaps = compute_overlaps([r["code"] for r in sources], [r["code"] for r in evaluated])
    seen: set[tuple[str, str]] = set()
    for row, overlap in zip(sources, overlaps, strict=True):
        for pair in derive_code_pairs(row["code"]) if overlap < TWIN else ():
            content = pair.text, squeeze_space(pair.code)
            if content not in seen and pair.text not in docstrings:
                seen.add(content)
                yield row | {
                    "split": PAIRS,
                    "key": f"{row['key']}:{pair.kind}:{pair.line}",
                    "group": ids(pair.text),
                    "code": pair.code,
                    "captions": [pair.text],
                }


def _leaks_into_training(kept: list[FoundFunction], used: list[Row]) -> dict[str, str]:
    """Return key -> reason, for functions to train on that resemble one that is evaluated."""
    items = [item for item in kept if item.package != RESERVED_PACKAGE]
    evaluated = [row for row in used if row["split"] not in ("train", "pretrain")]
    return find_leaks(items, evaluated, "an evaluated function")


def _leaks_into_reserve(kept: list[FoundFunction], used: list[Row]) -> dict[str, str]:
    """Return key -> reason, for functions of the reserve that other splits resemble."""
    reserve = [item for item in kept if item.package == RESERVED_PACKAGE]
    # The standard library depends on the Python version, so it decides no evaluated row.
    others = [row for row in used if row["package"] != STANDARD_LIBRARY]
    others += [item.make_row("", 0) for item in kept if item.package != RESERVED_PACKAGE]
    reasons = find_leaks(reserve, others, "a function of another package")
    return reasons | {
        item.key: "of a package that is held out" for item in reserve if not item.is_pair
    }


def find_leaks(items: list[FoundFunction], others: list[Row], whose: str) -> dict[str, str]:
    """Return key -> reason, for functions that resemble a row or have its docstring.

    Args:
        items: functions to check.
        others: rows to compare with.
        whose: what the rows are, for the reason.
    """
    captions = {caption for row in others for caption in row["captions"]}
    reasons = {i.key: f"docstring of {whose}" for i in items if i.function.summary in captions}
    if items and others:
        codes = [item.function.code for item in items]
        overlaps = compute_overlaps(codes, [row["code"] for row in others])
        for index in np.flatnonzero(overlaps >= TWIN):
            reasons[items[index].key] = f"near twin of {whose}"
    return reasons
