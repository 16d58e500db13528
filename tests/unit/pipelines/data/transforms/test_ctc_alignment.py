"""Rows without a CTC alignment are rejected by prepare and counted by the loader."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.data.corpora.base import Corpus
from pipelines.data.preprocessing.jobs import split_rejected, transform_block
from pipelines.data.transforms.sound import NO_SYMBOL, TOO_SHORT, count_alignment_tokens
from pipelines.training.loop.resolved_run import ResolvedRun, resolve_run
from pipelines.training.loop.run import validate_run
from skillnet.objectives.ctc import find_unalignable_rows
from skillnet_platform.errors import UserError
from tests.helpers.prepared_corpora import change_corpus, set_column
from tests.helpers.small_corpora import small_config, write_corpora

#: Symbols of a row, its frames, and why prepare rejects it.
ROWS = [
    ([1, 2, 3], 3, None),
    ([1, 2, 3], 2, TOO_SHORT),
    ([1, 1], 3, None),
    ([1, 1], 2, TOO_SHORT),
    ([2, 2, 2, 2], 7, None),
    ([2, 2, 2, 2], 6, TOO_SHORT),
    ([], 0, None),
    ([1, 0, 2], 9, NO_SYMBOL),
]


class Spoken(Corpus):
    """Corpus whose rows have the given symbols and frames."""

    name, modality, task = "spoken", "sound", "speech_recognition"
    raw_schema = pa.schema([("file", pa.string())])

    def rows(self, sources: Any) -> Any:
        raise NotImplementedError

    def preprocessing(self) -> dict[str, Any]:
        return {}

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        return pa.table(
            {
                "symbols": pa.array([row[0] for row in ROWS], pa.list_(pa.int32())),
                "log_mel": pa.array([[[0.0]] * row[1] for row in ROWS]),
            }
        )


def test_prepare_rejects_rows_without_an_alignment_and_counts_them_by_reason() -> None:
    names = [f"{index}.wav" for index in range(len(ROWS))]
    units = pa.nulls(len(ROWS), pa.string())
    block = pa.table({"key": names, "group": [-1] * len(ROWS), "unit": units, "file": names})
    good, rejected = split_rejected(transform_block(Spoken(), None, block), block)
    expected = {f"{index}.wav": row[2] for index, row in enumerate(ROWS) if row[2]}
    assert {row["key"]: row["reason"] for row in rejected} == expected
    assert good["key"].to_pylist() == [name for name in names if name not in expected]


def test_the_count_of_tokens_agrees_with_the_loss() -> None:
    random = np.random.default_rng(0)
    rows = [random.integers(1, 4, random.integers(0, 9)).tolist() for _ in range(200)]
    frames = random.integers(0, 14, len(rows))
    padded = torch.zeros(len(rows), 9, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in rows])
    expected = find_unalignable_rows(torch.from_numpy(frames), padded, lengths)
    column = pa.array([[9], *rows], pa.list_(pa.int32())).slice(1)
    assert ((count_alignment_tokens(column) > frames) == expected.numpy()).all()


def give_symbols(corpus: Path, rows: int, symbols: list[int]) -> None:
    """Replace the symbols of the first rows of each training shard."""

    def replace_first(split: str, table: pa.Table) -> pa.Table:
        cells = table.column("symbols").to_pylist()
        cells[:rows] = [symbols] * min(rows, len(cells))
        return set_column(table, "symbols", cells) if split == "train" else table

    change_corpus(corpus, replace_first)


def test_training_reports_rows_that_do_not_fit_the_models_tokens(tmp_path, run_root, capsys):
    """20 to 33 frames are 5 to 9 tokens of four frames: ten symbols fit into none of them."""
    data = write_corpora(tmp_path / "data")
    give_symbols(data / "syllables", 3, [*range(1, 11)])
    config = small_config(data)
    validate_run(resolve_run(config))
    said = " ".join(capsys.readouterr().err.split())
    assert "speech_recognition: 6 of 45 rows of syllables/train have more symbols" in said
    fine = replace(config, model=replace(config.model, mel_stack=1))
    assert ResolvedRun(fine).dataloader.datasets["speech_recognition"].unalignable_rows == 0


def test_a_task_whose_rows_all_have_no_alignment_is_rejected_before_training(tmp_path):
    data = write_corpora(tmp_path / "data")
    give_symbols(data / "syllables", 100, [*range(1, 11)])
    with pytest.raises(UserError, match=r"syllables/train: .* lower model\.mel_stack \(4\)"):
        _ = ResolvedRun(small_config(data)).dataloader
