"""Random damage to tokenizers, manifests of bundles and indexes, with limits of memory and time."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.data.tokenizer.conversion import convert_tokenizer
from pipelines.data.tokenizer.guarded_loader import (
    check_pattern,
    largest_token_id,
    parse_tokenizer,
    read_tokenizer_tree,
)
from pipelines.data.tokenizer.training import train_tokenizer
from pipelines.data.transforms.text import encode_texts
from pipelines.serving.bundle_checks import check_tasks
from pipelines.serving.retrieval_index import read_index, write_index
from pipelines.training.runs.bundle_manifest import (
    BUNDLE_FORMAT,
    compute_bundle_digest,
    read_bundle_manifest,
)
from tests.helpers.limited_child import run_limited
from tests.helpers.random_damage import PLACES, VALUES, WOUNDS, budget, damaged, named, replaced
from tests.helpers.readable_corpora import config

pytestmark = pytest.mark.fuzz

TEXTS = ["红色的方块", "readFile(path, 42)", "", "a" * 3000, "🎉 \u0301 \ufdfa", " \n\t"]


@cache
def tokenizer_text() -> str:
    return train_tokenizer(TEXTS[:2], [], size=300)


def use_tokenizer(path: Path) -> None:
    """Load a tokenizer and convert it, and tokenize texts."""

    def load() -> None:
        made = parse_tokenizer(read_tokenizer_tree(path))
        rows = encode_texts(made, TEXTS, 64).to_pylist()
        assert max((max(row, default=0) for row in rows), default=0) <= largest_token_id(made)

    named(load)
    named(lambda: convert_tokenizer(path))


@given(WOUNDS)
@budget(15)
def test_damaged_tokenizers(tmp_path_factory: Any, wounds: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-tokenizer.json"
    path.write_bytes(damaged(tokenizer_text().encode(), wounds))
    run_limited(lambda: use_tokenizer(path))


@given(VALUES, PLACES)
@example({"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}, [4])
@example({"type": "Sequence", "normalizers": []}, [4])
@budget(15)
def test_tokenizers_with_any_value_anywhere(
    tmp_path_factory: Any, value: Any, place: list[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-tokenizer.json"
    tree = replaced(json.loads(tokenizer_text()), place, value)
    path.write_text(json.dumps(tree), encoding="utf-8", errors="surrogatepass")
    run_limited(lambda: use_tokenizer(path))


@given(st.text(alphabet="ab()[]{}|*+?.,^\\12", max_size=12))
@example("(a*)*b")
@budget(6)
def test_accepted_patterns_end_in_time(pattern: str) -> None:
    tree = json.loads(tokenizer_text())
    tree["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False
    }  # fmt: skip

    def split() -> None:
        check_pattern("pattern", pattern)
        encode_texts(parse_tokenizer(tree), ["a" * 40 + "!"], 64)

    run_limited(lambda: named(split))


# -- manifests of bundles ----------------------------------


def manifest() -> dict[str, Any]:
    entry = {
        "corpus": "headings",
        "corpus_digest": "0" * 64,
        "licences": [],
        "names": ["红", "绿"],
        "limit": 48,
        "preprocessing": {"max_tokens": 48, "fit": "pad", "trim": True, "max_seconds": 3.5},
    }
    made: dict[str, Any] = {
        "format": BUNDLE_FORMAT,
        "package": "0.1.0",
        "weights_digest": "0" * 64,
        "run_id": None,
        "steps": 12,
        "settings": {"seed": 0, "tasks": {"text_classification": {"corpus": "headings"}}},
        "tasks": {name: dict(entry) for name in config().tasks},
        "files": {"tokenizer.json": "0" * 64},
        "evaluation": [],
    }
    return made | {"digest": compute_bundle_digest(made)}


def read_manifest(path: Path) -> None:
    named(lambda: check_tasks(path, read_bundle_manifest(path), config()))


@given(WOUNDS)
@budget(20)
def test_damaged_manifests_of_bundles(tmp_path_factory: Any, wounds: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "serving.json"
    path.write_bytes(damaged(json.dumps(manifest()).encode(), wounds))
    run_limited(lambda: read_manifest(path))


@given(VALUES, PLACES)
@example("\ud83d", [8, 0, 2])
@budget(20)
def test_manifests_of_bundles_with_any_value_anywhere(
    tmp_path_factory: Any, value: Any, place: list[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "serving.json"
    path.write_text(json.dumps(replaced(manifest(), place, value)), encoding="utf-8")
    run_limited(lambda: read_manifest(path))


# -- indexes ----------------------------------


@given(WOUNDS)
@budget(20)
def test_damaged_indexes(tmp_path_factory: Any, wounds: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    vectors = np.eye(6, dtype=np.float32)
    write_index(folder / "whole.index", "key", vectors)
    path = folder / "damaged.index"
    path.write_bytes(damaged((folder / "whole.index").read_bytes(), wounds))

    def read() -> None:
        assert np.array_equal(read_index(path, "key", (6, 6)), vectors), "a silent change"

    run_limited(lambda: named(read))
