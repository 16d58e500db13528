"""The hooks of the documentation site."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")

from skillnet_platform import cli
from tools.docs import site_hooks
from tools.docs.draw_overview import ASSETS, draw_overview, draw_pipeline


def test_each_command_has_a_page_with_its_complete_help() -> None:
    assert set(site_hooks.command_names()) == set(cli.SUMMARIES)
    page = site_hooks.command_page("fetch")
    assert "# skillnet fetch" in page
    assert "usage: skillnet fetch" in page


def test_a_link_out_of_the_docs_becomes_a_path() -> None:
    text = "see [the preset](../configs/quickstart.yaml) and [skills](skills.md#x)"
    replaced = site_hooks.replace_outside_links(text, "page.md")
    assert replaced == "see the preset (`configs/quickstart.yaml`) and [skills](skills.md#x)"


#: Words that people type -> a page that answers.
ANSWERS = {
    "GPU": "cluster.md",
    "learning rate": "sweeps.md",
    "audio": "own-corpora.md",
    "LoRA": "upcycling.md",
    "wandb": "tracking.md",
    "TensorBoard": "tracking.md",
    "BERT": "upcycling.md",
    "regression": "own-corpora.md",
    "CSV": "own-corpora.md",
}


def test_the_first_page_leads_from_a_common_word_to_its_guide() -> None:
    """The site's search finds the row, or the guide itself."""
    docs = site_hooks.ROOT / "docs"
    home = (docs / "index.md").read_text(encoding="utf-8")
    rows = [line for line in home.splitlines() if line.startswith("|")]
    missing = [
        word
        for word, page in ANSWERS.items()
        if not any(f"({page}" in row and word in row for row in rows)
        and word not in (docs / page).read_text(encoding="utf-8").split("\n## ")[0]
    ]
    assert missing == []


def test_guides_come_before_decisions_in_a_search() -> None:
    found = {}
    for name in ("skills.md", "decisions/configuration.md"):
        page = SimpleNamespace(file=SimpleNamespace(src_uri=name), meta={})
        site_hooks.on_page_markdown("text", page)
        found[name] = page.meta.get("search", {"boost": 1})["boost"]
    assert found["skills.md"] > min(found.values())


def test_a_link_to_a_missing_file_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"docs/page\.md"):
        site_hooks.replace_outside_links("[x](../nothing.yaml)", "page.md")


def test_the_committed_diagrams_are_those_of_the_scripts() -> None:
    drawn = {
        ASSETS / "overview.svg": draw_overview(),
        ASSETS / "pipeline.svg": draw_pipeline(),
    }
    for path, canvas in drawn.items():
        assert Path(path).read_text(encoding="utf-8") == canvas.to_svg()


def test_a_diagram_has_colours_for_the_dark_scheme() -> None:
    assert "@media (prefers-color-scheme: dark)" in draw_overview().to_svg()


@pytest.mark.parametrize(
    "element",
    [
        '<script src="https://example.org/x.js"></script>',
        '<link rel="stylesheet" href="//example.org/x.css">',
        '<img alt="x" src="http://example.org/x.png">',
    ],
)
def test_a_resource_of_another_host_is_found(element: str) -> None:
    assert site_hooks.REMOTE.search(element)


def test_links_to_other_hosts_are_no_resources() -> None:
    assert not site_hooks.REMOTE.search('<a href="https://arxiv.org/abs/2205.06126">paper</a>')


def test_roles_of_docstrings_are_left_out() -> None:
    for role in (":meth:", ":py:exc:", ":ref:"):
        assert site_hooks.on_page_content(f"{role}<code>x.y</code>") == "<code>x.y</code>"
        assert site_hooks.on_page_content(f"{role}<code>~x.y</code>") == "<code>y</code>"
    assert site_hooks.on_page_content("as: <code>~x.y</code>") == "as: <code>~x.y</code>"


def test_no_line_breaks_within_an_interval() -> None:
    text = "58.0 (50.4–65.3) and −2.0 (−3.5 to +0.1), from 2 to 4 (10–12 of 14)"
    assert site_hooks.on_page_content(text) == (
        "58.0 (50.4–&NoBreak;65.3) and −2.0 (−3.5&nbsp;to&nbsp;+0.1), from 2 to 4 (10–12 of 14)"
    )
