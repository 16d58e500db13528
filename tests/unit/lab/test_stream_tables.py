"""Tables of the stream of tasks: losses of the records, bytes of its models, and its pages."""

import shutil
from pathlib import Path
from statistics import fmean

import pytest

from skillnet_studies.config.study import STUDY_LEDGER
from skillnet_studies.study.kept_results import change_kept
from tools.docs import stream_tables
from tools.docs.page_marks import between
from tools.docs.stream_tables import StreamResults, read_stream
from tools.docs.study_tables import NOT_COMPLETE, RESULTS, STREAM_PAGE


@pytest.fixture(scope="module")
def found() -> StreamResults:
    kept = read_stream()
    assert kept is not None
    return kept


def test_the_pages_show_the_kept_stream(found: StreamResults) -> None:
    assert between(stream_tables.README, "results") == stream_tables.tabulate_readme(found)
    for name, text in stream_tables.render_page(found).items():
        assert between(STREAM_PAGE, name) == text
    figure = stream_tables.encode_svg(stream_tables.draw_stream(found))
    assert stream_tables.FIGURE.read_text(encoding="utf-8") == figure


def test_a_part_of_the_stream_is_not_shown(tmp_path: Path) -> None:
    for suffix in ("yaml", "parquet"):
        shutil.copy(RESULTS / f"stream.{suffix}", tmp_path)
    with change_kept(tmp_path / "stream") as kept:
        kept.content[STUDY_LEDGER]["runs"].pop()
    assert read_stream(tmp_path / "stream") is None
    assert set(stream_tables.render_page(None).values()) == {NOT_COMPLETE}


def test_losses_are_those_of_the_records(found: StreamResults) -> None:
    cells = [own for run, own in found.find_cells("replay-100")]
    expected = fmean(
        own["before"][task]["score"] - own["after"][task]["score"]
        for own in cells
        for task in found.old_tasks
    )
    lost = found.estimate_loss("replay-100", found.old_tasks)
    assert lost is not None
    assert lost.value == pytest.approx(expected)
    assert lost.low < expected < lost.high
    # Copies leave the base as it is.
    assert found.estimate_loss("full-100", found.old_tasks) is None


def test_bytes_of_an_added_task_are_those_of_its_weights(found: StreamResults) -> None:
    """What the sizes of whole models leave is what a growth trained, by another way of counting."""
    heads = fmean(x for _, own in found.find_cells("head-100") for x in own["trained"].values())
    assert found.count_added_bytes("head-100") == pytest.approx(4 * heads)
    assert found.count_added_bytes("replay-100") == pytest.approx(4 * heads)
    assert found.count_added_bytes("full-100") > found.count_added_bytes("grow-100") > 4 * heads
