"""One table for all outputs: its Markdown and its CSV."""

from pathlib import Path

import pytest

from skillnet_evidence.cells import ReportTable, TableCell, markdown_table
from skillnet_platform import storage
from skillnet_platform.tables import show_table, write_csv


def test_a_table_is_the_same_for_the_terminal_and_markdown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cells = [TableCell("a|b"), TableCell("61.2", "59.0 to 63.1", mark="▲")]
    table = ReportTable("Scores", ["system", "score"], [cells], "In percent.")
    show_table(table, "Study: ")
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert (shown[0], shown[-1]) == (["Study:", "Scores"], ["In", "percent."])
    assert ["a|b", "61.2▲"] in shown
    assert ["59.0", "to", "63.1"] in shown, "an interval is on a line of its own"
    assert table.to_markdown() == (
        "#### Scores\n\n| system | score |\n| --- | --- |\n"
        "| a\\|b | 61.2▲ (59.0 to 63.1) |\n\nIn percent."
    )
    assert markdown_table(["a", "b"], [], numeric=1) == "| a | b |\n| --- | ---: |"


def test_missing_values_are_empty_cells(tmp_path: Path) -> None:
    rows = [{"a": 1 / 3, "b": None}, {"a": float("nan"), "c": 2}]
    for options, text in (
        ({}, "a,b,c\n0.333333,,\n,,2\n"),
        ({"columns": ["a"], "digits": ".2f"}, 'a\n0.33\n""\n'),
        ({"digits": ""}, f"a,b,c\n{1 / 3},,\n,,2\n"),
    ):
        write_csv(tmp_path / "rows.csv", rows, **options)  # type: ignore[arg-type]
        assert (tmp_path / "rows.csv").read_text() == text


def test_a_link_among_the_files_of_a_run_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").symlink_to(tmp_path / "elsewhere")
    write_csv(tmp_path / "rows.csv", [{"a": 1}])
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "named.csv").symlink_to(tmp_path / "elsewhere")
    write_csv(tmp_path / "named.csv", [{"a": 1}], open_file=storage.open_output)
    assert (tmp_path / "elsewhere").read_text() == "a\n1\n"
