"""Corpus of clip art: series share a unit, and drawings without a topic have no label."""

from collections import Counter, defaultdict
from pathlib import Path

from pipelines.data.preprocessing.blocks import rows_to_table
from plugins.corpora.tests.demo_archives import read_rows, write_archive
from skillnet_corpora.study import clipart
from skillnet_corpora.study.clipart import (
    CLIPART,
    FOLDER,
    TOPICS,
    ClipartCorpus,
    read_title,
    simplify_title,
)
from tests.helpers.archive_files import packaged


def drawing(title: str, *keywords: str, licence: str = "PublicDomain", outline: str = "") -> bytes:
    """Return an SVG of a rectangle and an outline, with metadata."""
    words = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="dc" xmlns:cc="cc" xmlns:rdf="rdf" '
        f'viewBox="0 0 9 9"><metadata>{title}<dc:subject><rdf:Bag>{words}</rdf:Bag></dc:subject>'
        "<dc:publisher><dc:title>Open Clip Art Library</dc:title></dc:publisher>"
        f'<cc:license rdf:resource="http://web.resource.org/cc/{licence}"/></metadata>'
        f'<path d="{outline}"/><rect width="9" height="5"/></svg>'
    ).encode()


def write_package(directory: Path, files: dict[str, bytes]) -> None:
    data = packaged(
        {f"{FOLDER}{name}.svg": content for name, content in files.items()},
        {f"{FOLDER}animals/link.svg": "crow.svg"},
    )
    write_archive(directory, "openclipart", data, (CLIPART,))


def titled(title: str) -> str:
    return f"<dc:title>{title}</dc:title>"


def test_a_title_is_that_of_the_drawing() -> None:
    assert read_title(drawing(titled(" A &amp; B\n"))) == "A & B"
    assert read_title(drawing("<dc:title/>")) == read_title(drawing(titled(""))) == ""
    assert read_title(b"<svg/>") == ""
    assert simplify_title("Flat Icons (Wed Aug 25 23:29:46 2004)") == "flat icons"
    assert simplify_title("arrow08_4") == simplify_title("Arrow 12") == "arrow"
    assert simplify_title("b2") == simplify_title("12") == ""


def test_drawings_of_a_series_share_a_unit(tmp_path: Path) -> None:
    files = {
        "animals/crow_01": drawing(titled("crow"), "bird", "bird", ""),
        "animals/crow_02": drawing(titled("b1")),
        "food/raven": drawing(titled("Crow 3")),
        "animals/owl": drawing("<dc:title/>"),
        "animals/cat": drawing("<dc:title/>"),
        "tools/crow": drawing(titled("b2")),
        "tools/arrow-left": drawing(titled("b3")),
        "shapes/arrow_right": drawing(titled("b4")),
        "food/ham": drawing(titled("ham"), outline="M1 2 L3 4" * 9),
        "food/bacon": drawing(titled("bacon"), outline="M1 2\nL3 4" * 9),
        "food/box": drawing(titled("box"), outline="M1 2"),
        "food/tin": drawing(titled("tin"), outline="M1 2"),
    }
    write_package(tmp_path, files)
    rows, rejected = read_rows(ClipartCorpus(), tmp_path)
    assert rejected == {}
    first, arrow, ham = "animals/crow_01", "tools/arrow-left", "food/ham"
    alone = ("animals/owl", "animals/cat", "food/box", "food/tin")
    assert {key: row["unit"] for key, row in rows.items()} == {
        first: first, "animals/crow_02": first, "food/raven": first, "tools/crow": first,
        arrow: arrow, "shapes/arrow_right": arrow, ham: ham, "food/bacon": ham,
        **{key: key for key in alone},
    }  # fmt: skip
    assert rows[first]["keywords"] == ["bird"]
    assert rows["food/raven"]["label"] == TOPICS.index("food")


def test_rows_without_a_topic_are_unlabelled_and_of_no_evaluated_series(tmp_path, monkeypatch):
    monkeypatch.setattr(clipart, "LARGEST_SERIES", 8)
    names = ["".join(pair) for pair in zip("abcdefghij" * 4, "k" * 10 + "l" * 30, strict=True)]
    names = [name + "mno"[number // 10 - 1] for number, name in enumerate(names)]
    files = {f"animals/{name}": drawing(titled(f"x{name}")) for name in names}
    files |= {f"unsorted/{name}": drawing(titled(f"x{name}")) for name in names}
    files |= {f"shapes/star_{number}": drawing(titled("star")) for number in range(12)}
    files["food/gpl"] = drawing(titled("gpl"), licence="GPL/2.0/")
    write_package(tmp_path, files)
    rows, rejected = read_rows(ClipartCorpus(), tmp_path)
    assert len(rows) + len(rejected) == len(files)
    reasons = Counter(rejected.values())
    assert rejected["food/gpl"].endswith("another licence than the package")
    assert reasons["its series has more than 8 drawings"] == 4
    assert sum(key.startswith("shapes") for key in rows) == 8
    homes = defaultdict(set)
    for key, row in rows.items():
        assert (row["label"] is None) == key.startswith("unsorted") == (row["split"] == "pretrain")
        homes[row["unit"]].add("train" if row["split"] == "pretrain" else row["split"])
    assert {len(found) for found in homes.values()} == {1}
    held = sum(row["split"] in ("test", "validation") for row in rows.values())
    assert reasons["no label, and its series is evaluated"] == held > 0


def test_a_drawing_that_cannot_be_drawn_is_rejected(tmp_path: Path) -> None:
    write_package(tmp_path, {"food/fig": drawing(titled("fig")), "food/ham": b"<svg"})
    corpus = ClipartCorpus()
    rows, _ = read_rows(corpus, tmp_path)
    block, _ = rows_to_table(corpus, list(rows.values()))
    made = corpus.transform(block, None)
    reasons = made["rejected"].to_pylist()
    assert reasons[0] is None
    assert "damaged SVG" in reasons[1]
    for field in corpus.columns:
        assert made[field.name].type.equals(field.type)
    assert 0 < made["pixels"][0].values.to_numpy().mean() < 255
