"""Bytes per row that readers hold, for every reader that the plan names."""

from pathlib import Path

from benchmarks import reader_memory
from tools.docs import scale_table


def test_names_grow_and_tars_do_not(tmp_path: Path) -> None:
    found = {r.measured: r for r in reader_memory.measured(tmp_path, (100, 400))}
    named = {plan.reader for plan in scale_table.CORPORA if plan.reader}
    assert {f"{what}, {name}" for name in named for what in ("read", "spool")} == set(found)
    assert found["read, AIC-ICC"].value > 40  # the digits of a name alone
    assert found["read, tars"].value < found["read, AIC-ICC"].value / 2
    assert found["spool, tars"].value > 60  # a caption's bytes in UTF-8
