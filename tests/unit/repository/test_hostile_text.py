"""Captions, names and settings with markup in them do not run in any page, nor in a browser."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from skillnet_evidence.cells import ReportTable, TableCell
from skillnet_serving.retrieval.search_page import ResultCard
from skillnet_serving.retrieval.search_page import render_search_page as gallery
from skillnet_studies.report.report import render_template
from tests.helpers.html_probe import HOSTILE, NASTY, assert_harmless

PICTURE = "data:image/png;base64,"


def search_page() -> str:
    media = np.zeros((4, 4, 3), np.uint8)
    cards = [
        ResultCard(1, 0.5, NASTY, [NASTY], media, NASTY),
        ResultCard(2, 0.4, NASTY, [NASTY], code=NASTY),
    ]
    return gallery(NASTY, cards, [(NASTY, NASTY)], NASTY)


def comparison_page() -> str:
    """Render a page with hostile text in every value of the template."""
    condition = SimpleNamespace(text=NASTY)
    claim = SimpleNamespace(
        verdict=NASTY,
        text=NASTY,
        undecided_reason=NASTY,
        conditions=[condition],
        find_state=lambda _: "shown",
        rule=NASTY,
    )
    cell = TableCell(NASTY, small=NASTY, mark=NASTY, is_best=True, is_prose=True)
    tables = [
        ReportTable(NASTY, [NASTY], [[cell, cell]], NASTY, collapsed) for collapsed in (True, False)
    ]
    report = SimpleNamespace(
        title=NASTY,
        lead=NASTY,
        origin=NASTY,
        answer=NASTY,
        claims=[claim],
        tables=tables,
        skills_note=NASTY,
        facts={NASTY: NASTY},
        texts={NASTY: NASTY},
        notices=[NASTY],
    )
    pictures = [{"name": NASTY, "uri": PICTURE, "caption": NASTY}]
    values = {"report": report} | dict.fromkeys(("evidence", "figures", "skills"), pictures)
    return render_template("report.html", values)


def interpretation_page() -> str:
    reported = SimpleNamespace(model=NASTY, skills=(NASTY,), facts={NASTY: NASTY})
    pictures = [{"name": NASTY, "uri": PICTURE, "caption": NASTY}]
    return render_template("interpretation.html", {"interpretation": reported, "figures": pictures})


PAGES: dict[str, Callable[[], str]] = {
    "search": search_page,
    "comparison": comparison_page,
    "interpretation": interpretation_page,
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_hostile_text_and_does_nothing_else(name: str) -> None:
    text = PAGES[name]()
    page = assert_harmless(text)
    for hostile in HOSTILE:
        assert page.shown.count(hostile) >= 3, f"{hostile} is not shown as it is"


def test_the_watch_sees_a_page_that_does_harm() -> None:
    for hostile in HOSTILE[:2]:
        with pytest.raises(AssertionError):
            assert_harmless(f"<p>{hostile}</p>")


def test_hostile_names_in_plots_stay_text() -> None:
    from matplotlib.figure import Figure

    from skillnet_evidence.plot_kit import encode_svg_uri

    figure = Figure()
    figure.subplots().set_title(NASTY.replace("$", ""))
    assert encode_svg_uri(figure).startswith("data:image/svg+xml;base64,"), (
        "a picture runs no scripts"
    )


# -- for real ----------------------------------


def marked(browser: str, page: Path) -> bool:
    """Whether a script of the page ran: it would have marked the document."""
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    more = [f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=1000"]
    done = subprocess.run(
        [browser, *words, *more, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "<body" in done.stdout, done.stderr[-500:]
    return 'data-marked="1"' in done.stdout.partition("<body")[0]


@pytest.mark.integration
def test_no_script_runs_in_a_browser(tmp_path: Path) -> None:
    browser: Any = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    page = tmp_path / "page.html"
    page.write_text(f"<html><body>{HOSTILE[0]}</body></html>", encoding="utf-8")
    assert marked(browser, page), "the mark works"
    for name, make in PAGES.items():
        text = make()
        policy = text[text.index("<meta http-equiv") : text.index("<title>")]
        # Escaping alone must do, and does: the policy is a second wall.
        page.write_text(text.replace(policy, ""), encoding="utf-8")
        assert not marked(browser, page), name
