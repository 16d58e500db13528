"""Label ids follow one order for any kind of label."""

from itertools import permutations
from pathlib import Path

import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.corpora.readers.base import sort_labels


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["10", "9", "1"], ["1", "9", "10"]),
        (
            ["1", "01", "001", "\uff11"],
            ["001", "01", "1", "\uff11"],
        ),  # four texts with the same value
        (["2", "②", "²"], ["2", "²", "②"]),  # digits that are not numbers
        (["2", "9" * 5000], ["2", "9" * 5000]),  # longer than Python converts
        (["b", "1", "a"], ["1", "a", "b"]),
        (["10.5", "-1", "2", "0.5"], ["-1", "0.5", "2", "10.5"]),
    ],
)
def test_labels_have_one_order_for_any_input_order(labels: list[str], order: list[str]) -> None:
    for shuffled in permutations(labels):  # the order of a set depends on the hash seed
        assert sort_labels(dict.fromkeys(shuffled).keys()) == order


def test_scan_labels_uses_this_order(tmp_path: Path) -> None:
    rows = [f"一行文字,{label}\n" for label in ("②", "01", "1", "10") * 5]
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(rows))
    corpus = open_external_corpus("mine", f"folder:{tmp_path}")
    corpus.scan_labels()
    assert corpus.labels == ("01", "1", "10", "②")
