"""Corpora of stamps: pictures, spoken and written captions, without a stamp in two splits.

They are read from a package of a few stamps, and from the real one where a checkout has it.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.spatial.distance import cdist

from pipelines.data.corpora import Corpus
from pipelines.data.preprocessing.blocks import rows_to_table
from pipelines.data.transforms import image
from plugins.corpora.tests.demo_archives import read_rows, require_real_archives, write_archive
from skillnet_corpora.study.stamps import (
    FOLDER,
    LANGUAGES,
    STAMPS,
    WRITTEN,
    StampsCorpus,
    parse_captions,
)
from skillnet_corpora.study.stamps_spoken import SpokenStampsCorpus
from skillnet_corpora.study.stamps_texts import StampTextsCorpus
from skillnet_corpora.study.variant_units import LARGEST_UNIT, divide_units, join_variants
from tests.helpers.archive_files import packaged
from tests.helpers.sound_files import encode_tone
from tests.helpers.user_corpora import jpg

Rows = dict[str, dict[str, Any]]


def caption(english: str, **others: str) -> bytes:
    """Return a text file of captions."""
    return "\n".join([english, *(f"{k}.utf8={v}" for k, v in others.items())]).encode()


def write_package(directory: Path, files: dict[str, bytes]) -> None:
    data = packaged({FOLDER + name: content for name, content in files.items()})
    write_archive(directory, "tuxpaint", data, (STAMPS,))


def require_disjoint_units(rows: Rows) -> None:
    homes = defaultdict(set)
    for row in rows.values():
        homes[row["unit"]].add(row["split"])
    assert [unit for unit, found in homes.items() if len(found) > 1] == []


def test_marks_join_items_directly_and_through_others() -> None:
    marks = {"a": ["1"], "b": ["2"], "c": ["1", "3"], "d": ["3"], "e": []}
    assert join_variants(marks) == {"a": "a", "b": "b", "c": "a", "d": "a", "e": "e"}
    assert join_variants({}) == {}


def test_units_are_divided_and_large_ones_are_trained_on() -> None:
    units = {f"i{n}": f"u{n}" for n in range(1000)}
    units |= {f"i{n}-{copy}": f"big{n}" for n in range(60) for copy in range(LARGEST_UNIT + 1)}
    split = divide_units("x", units)
    assert {split[f"big{n}"] for n in range(60)} == {"train"}
    sizes = Counter(split[f"u{n}"] for n in range(1000))
    assert 200 < sizes["test"] < 300
    assert 70 < sizes["validation"] < 130
    assert divide_units("x", units) == split != divide_units("y", units)


def test_captions_of_a_text_file_have_their_language() -> None:
    data = b"A crow.\r\nfr.utf8=Un corbeau = noir.\nca@valencia.utf8=Un corb.\nda.utf8= \n\nodd\n"
    assert parse_captions(data) == {
        "en": "A crow.", "fr": "Un corbeau = noir.", "ca@valencia": "Un corb."
    }  # fmt: skip
    assert parse_captions(b"") == {"en": ""}


def test_variants_of_a_stamp_share_a_unit(tmp_path: Path) -> None:
    files = {
        "animals/frog": caption("A frog.", zh_CN="青蛙。"),
        "animals/frog-1": caption("A green frog.", zh_CN="绿青蛙。"),
        "animals/toad": caption("A toad.", zh_CN="青蛙。"),
        "seasonal/toad": caption("a TOAD.", zh_CN="蟾蜍。"),
        "animals/crow": caption("A crow.", zh_CN="乌鸦。"),
        "seasonal/crow": caption("A bird.", zh_CN="鸟。"),
        "symbols/us/001penny": caption("A penny.", zh_CN="一分。"),
        "symbols/us/010dime": caption("A dime.", zh_CN="一角。"),
        "symbols/b_filled": caption("The letter b.", zh_CN="字母ｂ。"),
        "symbols/q_filled": caption("The letter q.", zh_CN="字母ｑ。"),
        "clothes/bra": caption("A bra.", zh_CN="胸罩。"),
        "vehicles/bus": caption("A bus.", zh_CN="公共汽车。"),
        "vehicles/tram": caption("A tram.", zh_CN="电车。", fr="Un bus."),
        "food/egg": caption("An egg.", zh_CN="蛋。", fr="UN BUS"),
        "space/sun": caption("A sun.", zh_CN="太阳。"),
        "space/star": caption("A star.", zh_CN="星星。"),
        "town/flags/red": caption("A red flag.", zh_CN="红旗。"),
        "town/flags/white": caption("A white flag.", zh_CN="白旗。"),
    }
    media = {f"{key}.png": b"" for key in files}
    for name in ("sun", "star"):  # a copy of a recording has another number in its pages
        page = b"OggS" + name[:2].encode() * 11 + b"\1"
        media[f"space/{name}_desc_fr.ogg"] = page + b"said" + page + b"more"
    media["clothes/bra_desc_fr.ogg"] = page + b"said" + page + b"less"
    write_package(tmp_path, {f"{key}.txt": data for key, data in files.items()} | media)
    rows, rejected = read_rows(StampsCorpus(), tmp_path)
    assert rejected == {}
    assert {key: row["unit"] for key, row in rows.items()} == {
        **dict.fromkeys(
            ["animals/frog", "animals/frog-1", "animals/toad", "seasonal/toad"], "animals/frog"
        ),
        "animals/crow": "animals/crow",
        "seasonal/crow": "seasonal/crow",
        **dict.fromkeys(["symbols/us/001penny", "symbols/us/010dime"], "symbols/us/001penny"),
        **dict.fromkeys(["symbols/b_filled", "symbols/q_filled"], "symbols/b_filled"),
        "clothes/bra": "clothes/bra",
        "vehicles/bus": "vehicles/bus",
        **dict.fromkeys(["vehicles/tram", "food/egg"], "vehicles/tram"),
        **dict.fromkeys(["space/sun", "space/star"], "space/sun"),
        **dict.fromkeys(["town/flags/red", "town/flags/white"], "town/flags/red"),
    }
    require_disjoint_units(rows)
    # Equal captions are joint positives.
    assert rows["animals/frog"]["group"] == rows["animals/toad"]["group"]
    assert len({row["group"] for row in rows.values()}) == len(rows) - 1
    assert rows["seasonal/crow"]["label"] == StampsCorpus().facts()["labels"].index("seasonal")


def test_one_picture_of_a_stamp_is_a_row(tmp_path: Path) -> None:
    texts = {"crow": caption("A crow.", zh_CN="乌鸦。"), "owl": caption("An owl.", fr="Un hibou.")}
    files = {f"animals/{name}.txt": data for name, data in texts.items()}
    named = ("crow.png", "crow.svg", "crow_mirror.png", "owl.png", "crow.dat", "crow_desc_fr.ogg")
    files |= {f"animals/{name}": name.encode() for name in named}
    write_package(tmp_path, files)
    rows, rejected = read_rows(StampsCorpus(), tmp_path)
    assert rejected == {
        "animals/crow.svg": "an SVG of a picture that is read as PNG",
        "animals/crow_mirror.png": "a mirrored copy of a picture",
        "animals/owl.png": "no caption in Chinese",
    }
    (row,) = rows.values()
    assert (row["key"], row["image"]) == ("animals/crow", b"crow.png")
    assert (row["captions"], row["english"]) == (["乌鸦。"], "A crow.")


def test_recordings_that_are_no_caption_are_rejected(tmp_path: Path) -> None:
    texts = {
        "crow": caption("A crow.", zh_CN="乌鸦。", fr="Un corbeau.", nl="Een kraai."),
        "owl": caption("An owl.", fr="Un hibou."),
    }
    files = {f"animals/{name}.txt": data for name, data in texts.items()}
    named = (
        "crow.ogg", "crow_desc.ogg", "crow_desc_fr.ogg", "crow_desc_ru.ogg", "crow_desc_nl.ogg",
        "crow_desc_pt_BR.wav", "owl_desc_fr.ogg", "lost_desc_fr.ogg", "crow.png",
    )  # fmt: skip
    files |= {f"animals/{name}": name.encode() for name in named}
    write_package(tmp_path, files)
    rows, rejected = read_rows(SpokenStampsCorpus(), tmp_path)
    assert rejected == {
        "animals/crow.ogg": "a sound effect, not a caption",
        "animals/crow_desc.ogg": "in a language of few recordings",
        "animals/crow_desc_nl.ogg": "in a language of few recordings",
        "animals/crow_desc_pt_BR.wav": "in a language of few recordings",
        "animals/owl_desc_fr.ogg": "no caption in Chinese",
        "animals/lost_desc_fr.ogg": "no caption in Chinese",
        # No fallback to the English text.
        "animals/crow_desc_ru.ogg": "no text in its language",
    }
    (row,) = rows.values()
    assert row["key"] == "fr/animals/crow"
    assert (row["text"], row["english"], row["captions"]) == ("Un corbeau.", "A crow.", ["乌鸦。"])
    assert (row["language"], row["label"]) == ("fr", LANGUAGES.index("fr"))


def test_corpora_of_stamps_hold_out_the_same_stamps(tmp_path: Path) -> None:
    files = {}
    for number in range(60):
        name = f"food/{'abcdefghij'[number % 10]}{'klmnop'[number // 10]}"
        files[f"{name}.txt"] = caption(f"No {number}.", zh_CN=f"第{number}", fr=f"N° {number}")
        files |= {f"{name}.png": b"p", f"{name}_desc_fr.ogg": name.encode()}
    write_package(tmp_path, files)
    pictures, _ = read_rows(StampsCorpus(), tmp_path)
    spoken, _ = read_rows(SpokenStampsCorpus(), tmp_path)
    texts, missing = read_rows(StampTextsCorpus(), tmp_path)
    assert set(missing.values()) == {"no caption in this language"}
    assert len(texts) + len(missing) == 60 * len(WRITTEN)
    assert {row["split"] for row in pictures.values()} == {"train", "validation", "test"}
    for key, row in pictures.items():
        assert spoken[f"fr/{key}"]["split"] == row["split"] == texts[f"zh_CN/{key}"]["split"]
        # Equal first captions pair recordings with pictures.
        assert spoken[f"fr/{key}"]["captions"] == row["captions"]


class FixedTokenizer:
    """One token per text."""

    def encode_ids(self, texts: list[str], limit: int) -> list[list[int]]:
        return [[len(text)] for text in texts]


@pytest.mark.parametrize("corpus", [StampsCorpus(), SpokenStampsCorpus(), StampTextsCorpus()])
def test_finished_columns_have_the_declared_schema(tmp_path: Path, corpus: Corpus) -> None:
    files = {
        "food/egg.txt": caption("An egg.", zh_CN="蛋。", fr="Un œuf."),
        "food/egg.png": jpg(1),
        "food/egg_desc_fr.ogg": encode_tone(),
        "food/fig.txt": caption("A fig.", zh_CN="无花果。", fr="Une figue."),
        "food/fig.png": b"damaged",
        "food/fig_desc_fr.ogg": b"cut",
    }
    write_package(tmp_path, files)
    rows, _ = read_rows(corpus, tmp_path)
    block, _ = rows_to_table(corpus, list(rows.values()))
    made = corpus.transform(block, FixedTokenizer())
    assert made.num_rows == len(rows)
    for field in corpus.columns:
        assert made[field.name].type.equals(field.type)
    if "rejected" in made.column_names:
        reasons = made["rejected"].to_pylist()
        assert reasons[0] is None
        assert reasons[1]
    assert isinstance(made["label"].combine_chunks(), pa.Int32Array)


def test_the_real_pictures_have_no_near_copy_in_another_split() -> None:
    archives = require_real_archives(StampsCorpus())
    rows, rejected = read_rows(StampsCorpus(), archives)
    require_disjoint_units(rows)
    assert Counter(rejected.values()) == {
        "an SVG of a picture that is read as PNG": 248,
        "a mirrored copy of a picture": 11,
        "no caption in Chinese": 15,
    }
    assert len(rows) + len(rejected) == 962 + 248  # PNG, SVG
    # Coins and road signs are the pictures that resemble each other most.
    names = [key for key in rows if key.startswith(("symbols/money", "symbols/alph", "town"))]
    small = np.stack([image.load_pixels(rows[key]["image"], 16) for key in names]).astype(float)
    for turned in (small, small[:, :, ::-1]):
        found = cdist(small.reshape(len(names), -1), turned.reshape(len(names), -1))
        for one, other in np.argwhere(found < 5 * np.sqrt(small[0].size)):
            assert rows[names[one]]["split"] == rows[names[other]]["split"], names[one]


def test_the_real_recordings_are_of_stamps_that_training_never_mentions() -> None:
    archives = require_real_archives(SpokenStampsCorpus())
    rows, rejected = read_rows(SpokenStampsCorpus(), archives)
    require_disjoint_units(rows)
    assert len(rows) + len(rejected) == 8_491 + 15  # Ogg, WAV
    said = defaultdict(set)
    for row in rows.values():
        said[row["split"]] |= set(row["captions"]) | {row["english"].casefold()}
    assert not said["train"] & (said["test"] | said["validation"])
    counts = Counter(row["language"] for row in rows.values())
    assert counts.keys() == set(LANGUAGES)
    assert min(counts.values()) > 300
