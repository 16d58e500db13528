"""The table of what systems cost."""

from pathlib import Path

import pytest

from benchmarks.costs import main, read_system
from skillnet.accounting import account_task
from skillnet.skills import default_tasks
from skillnet.systems import build_system
from tests.small_corpora import small_config, write_corpora


def test_the_table_has_each_systems_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_corpora(tmp_path / "data")
    sizes = {"dim": 16, "depth": 2, "heads": 2, "hidden": 24, "patch_size": 16, "vocab_size": 4000}
    words = [word for key, value in sizes.items() for word in (f"--model.{key}", str(value))]
    systems = ["--systems", "skillnet,dense:size=total", "--markdown"]
    assert main([*systems, "--data", str(data), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "| system",
        "| ---",
        "| skillnet",
        "| operations",
        "| dense:size=total",
        "| operations",
    ]
    totals = [float(line.split(" | ")[1]) for line in (lines[2], lines[4])]
    assert totals[0] == totals[1] > 0
    assert len(lines[3].split(" | ")) == 3 + len(default_tasks())


def test_options_of_a_system() -> None:
    assert read_system("moe:experts=5:balance=0.1") == ("moe", {"experts": 5, "balance": 0.1})
    model = build_system("dense", small_config(Path()).model)
    assert account_task(model, "text_to_code", {"query": 2, "candidate": 3}).tokens == 5
