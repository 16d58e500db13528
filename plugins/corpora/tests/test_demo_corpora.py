"""Selection and splits of the built-in corpora, on archives of a few synthetic rows."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.corpora import DEMO, find_corpus
from pipelines.data.corpora.base import stable_hash
from plugins.corpora.tests.demo_archives import made_classification, read_rows, write_archive
from skillnet_corpora.demo import drawings, functions, headings, strokes
from skillnet_corpora.demo.syllables import (
    SYMBOLS,
    WEB_PAGE,
    SyllablesCorpus,
    encode_symbols,
    split_pinyin,
)
from tests.helpers.archive_files import tarred, zipped
from tests.unit.pipelines.data.transforms.test_transforms import PATHS

NOT_FOUND = b'<!DOCTYPE HTML PUBLIC "-//IETF//DTD HTML 2.0//EN">\n<html>404 Not Found</html>'


def test_pins_are_complete_and_agree() -> None:
    pins = [archive for name in DEMO for archive in find_corpus(name).archives]
    assert len({pin.file for pin in pins}) == 15
    assert len(set(pins)) == 15  # one file, one pin
    for pin in pins:
        assert len(pin.sha256) == 64
        version = pin.requirement.split("==" if pin.registry == "pypi" else "@")[-1]
        assert f"-{version}" in pin.file


def test_stable_hash_never_changes() -> None:
    assert stable_hash("strokes", "横、竖") == 14410517122331008962
    assert stable_hash("ab", "c") != stable_hash("a", "bc")


# --- headings


def test_headings_of_one_subtree_share_a_split(tmp_path: Path) -> None:
    corpus = headings.HeadingsCorpus()
    write_archive(
        tmp_path,
        "chinese",
        zipped({headings.TREE: json.dumps(made_classification()).encode()}),
        corpus.archives,
    )
    words = {"一定": "1.必然，如一定要去。", "二": " "}
    write_archive(
        tmp_path,
        "cnchar",
        tarred({"package/explanation/一.json": json.dumps(words).encode()}),
        corpus.archives,
    )
    rows, rejected = read_rows(corpus, tmp_path)
    assert rejected["heading/B100.0"] == "heading shorter than 3 characters"
    assert rejected["heading/B100.1"] == rejected["heading/D100.1"]
    assert "several classes" in rejected["heading/D100.1"]
    assert "repeated" in rejected["heading/F100.2"]
    assert "largest" in rejected["heading/Z100.2"]
    assert rejected["definition/一/二"] == "definition is empty"
    # The word is the caption, so its definition must not contain it.
    assert rows["definition/一/一定"]["text"] == "必然，如～要去。"
    assert rows["definition/一/一定"]["captions"] == ["一定"]
    assert rows["definition/一/一定"].get("unit") is None
    assert len(rows) + len(rejected) == len(made_classification()) + 2
    homes = defaultdict(set)
    labels = defaultdict(set)
    for key, row in rows.items():
        if key.startswith("heading/"):
            code = key.removeprefix("heading/")
            labels[row["split"]].add(row["label"])
            if len(code) > 2:
                homes[code.split(".")[0]].add(row["split"])
                assert row["unit"] == code.split(".")[0]
    assert all(len(found) == 1 for found in homes.values())
    assert all(len(labels[split]) == 15 for split in ("train", "validation", "test"))
    sizes = Counter(row["split"] for key, row in rows.items() if key.startswith("heading/"))
    total = sum(sizes.values())
    assert 0.08 < sizes["test"] / total <= 0.15
    assert 0.05 < sizes["validation"] / total <= 0.10


def test_a_class_is_capped(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(headings, "LARGEST_CLASS", 20)
    corpus = headings.HeadingsCorpus()
    write_archive(
        tmp_path,
        "chinese",
        zipped({headings.TREE: json.dumps(made_classification()).encode()}),
        corpus.archives,
    )
    write_archive(
        tmp_path, "cnchar", tarred({"package/explanation/一.json": b"{}"}), corpus.archives
    )
    rows, _ = read_rows(corpus, tmp_path)
    assert set(Counter(row["label"] for row in rows.values()).values()) == {20}


# --- syllables


def test_sixty_one_symbols_encode_standard_mandarin() -> None:
    assert len(SYMBOLS) == len(set(SYMBOLS)) == 61
    assert split_pinyin("zhuang1") == ["zh", "uang", "1"]
    assert split_pinyin("er4") == ["er", "4"]
    assert split_pinyin("yuan2") == ["üan", "2"]
    assert split_pinyin("jun1") == ["j", "ün", "1"]
    assert split_pinyin("you3") == ["iou", "3"]
    assert split_pinyin("liu2") == ["l", "iou", "2"]
    assert split_pinyin("weng1") == ["ueng", "1"]
    assert split_pinyin("wei4") == ["uei", "4"]
    assert split_pinyin("hun2") == ["h", "uen", "2"]
    assert split_pinyin("lüe4") == ["l", "üe", "4"]
    assert split_pinyin("yi1") == ["i", "1"]
    assert all(1 <= number <= 61 for number in encode_symbols("shuang3"))
    for wrong in ("ma5", "ma", "quxu1", "ng2", "123"):
        with pytest.raises(ValueError, match=wrong):
            encode_symbols(wrong)


def test_error_pages_are_rejected_and_one_tone_is_held_out(tmp_path: Path) -> None:
    names = [f"{syllable}{tone}" for syllable in ("ma", "lü", "shi", "an") for tone in "12345"]
    files = {f"package/voice/{name}.mp3": b"\xff\xfb8" + name.encode() for name in names}
    files["package/voice/lv2.mp3"] = files["package/voice/lü2.mp3"]
    files["package/voice/ao4.mp3"] = NOT_FOUND
    files["package/voice/an3.mp3"] = NOT_FOUND
    files["package/voice/quxu1.mp3"] = b"\xff\xfb8?"
    write_archive(tmp_path, "cnchar", tarred(files), SyllablesCorpus.archives)
    rows, rejected = read_rows(SyllablesCorpus(), tmp_path)
    assert rejected["ao4.mp3"] == rejected["an3.mp3"] == WEB_PAGE
    assert "copy" in rejected["lv2.mp3"]
    assert "squeezed" in rejected["ma5.mp3"]
    assert "standard" in rejected["quxu1.mp3"]
    assert len(rows) + len(rejected) == len(files)
    held = Counter(row["text"][:-1] for row in rows.values() if row["split"] == "test")
    assert held == {"ma": 1, "lü": 1, "shi": 1, "an": 1}
    trained = {row["text"][:-1] for row in rows.values() if row["split"] == "train"}
    assert trained == {"ma", "lü", "shi", "an"}


# --- drawings


def test_variants_of_a_concept_form_one_family() -> None:
    runner = drawings.concept_family("1f3c3")
    for variant in ("1f3c3-200d-2640", "1f3c3-1f3fd-200d-2642", "1f3c3-200d-27a1"):
        assert drawings.concept_family(variant) == runner
    assert drawings.concept_family("1f468-200d-1f373") == drawings.concept_family(
        "1f469-200d-1f373"
    )
    assert drawings.concept_family("1f468-200d-1f466") == drawings.concept_family(
        "1f469-200d-1f467-200d-1f467"
    )
    for couple in ("1f491", "1f48f", "1f46a", "1f46b"):  # one code point for a sequence
        assert drawings.concept_family(couple) == drawings.concept_family(
            "1f469-200d-2764-200d-1f468"
        )
    assert drawings.concept_family("1f1e8-1f1f3") == drawings.concept_family("1f1fa-1f1f8")
    assert drawings.concept_family("1f34e") != drawings.concept_family("1f34f")
    assert drawings.concept_family("27a1") == "27a1"
    assert drawings.is_flag("1f3f4-e0067-e0062-e0065-e006e-e0067-e007f")
    assert not drawings.is_flag("1f3f4-200d-2620")


def test_drawings_are_split_by_family_and_artist(monkeypatch) -> None:
    for name, size in (("TEST", 40), ("VALIDATION", 10), ("UNSEEN_CONCEPTS", 20)):
        monkeypatch.setattr(drawings, name, size)
    plain = [f"1f{n:03x}" for n in range(0x600, 0x6A0)]
    people = [f"{who}-200d-1f{n:03x}" for who in ("1f468", "1f469") for n in range(0x390, 0x3A0)]
    flags = [f"1f1e6-1f1{n:02x}" for n in range(0xE6, 0xFF)]
    split = drawings._split([*plain, *people, *flags])
    sizes = Counter(split.values())
    assert sizes["test"] == 40
    assert sizes["validation"] == 10
    assert sizes["test_unseen_concept"] == 2 * 20
    homes = defaultdict(set)
    for (code, artist), home in split.items():
        homes[drawings.concept_family(code), artist].add(home)
        if home in ("test", "validation"):
            assert artist == "openmoji"
            assert split[code, "twemoji"] == "train"
        if home == "test_unseen_concept":
            assert split[code, "twemoji"] == split[code, "openmoji"] == home
        if drawings.is_flag(code):
            assert home == "train"
    assert all(len(found) == 1 for found in homes.values())


# --- strokes


def test_stroke_names_come_from_the_script_and_groups_share_a_split(tmp_path: Path) -> None:
    corpus = strokes.StrokesCorpus()
    names = {"j": {"name": "横"}, "f": {"name": "竖"}, "d": {"name": "点2"}, "w": {"name": "甲|乙"}}
    script = "x=JSON.parse('{}');y=JSON.parse('{}')".replace("{}", "%s") % tuple(
        json.dumps(t, ensure_ascii=False)
        for t in ({"十": "jf", "一": "j", "丨": "j", "乙": "w", "二": "jj"}, names)
    )
    write_archive(
        tmp_path,
        "cnchar-order",
        tarred({"package/cnchar.order.min.js": script.encode()}),
        corpus.archives,
    )
    path = [[100, 400], [900, 400]]
    drawn = {"十": 2, "一": 1, "丨": 1, "乙": 1, "二": 1, "无": 0, "龘": 3}
    files = {
        f"package/draw/{char}.json": json.dumps({"medians": [path] * count}).encode()
        for char, count in drawn.items()
    }
    files["package/draw/package.json"] = b"{}"
    write_archive(tmp_path, "cnchar-data", tarred(files), corpus.archives)
    rows, rejected = read_rows(corpus, tmp_path)
    assert rejected == {"无": "no pen path"}
    assert rows["十"]["captions"] == ["横、竖"]
    assert rows["乙"]["captions"] == ["甲"]
    assert rows["一"]["group"] == rows["丨"]["group"] != rows["十"]["group"]
    assert rows["一"]["split"] == rows["丨"]["split"]
    assert rows["一"]["unit"] == rows["丨"]["unit"] == "横"
    # Different stroke counts, or no stroke order: a video without a caption.
    for char in ("二", "龘"):
        assert (rows[char]["split"], rows[char]["captions"]) == ("pretrain", [])
        assert rows[char]["unit"] is None


def test_a_stroke_sequence_lies_in_one_split(monkeypatch) -> None:
    monkeypatch.setattr(strokes, "TEST", 30)
    monkeypatch.setattr(strokes, "VALIDATION", 10)
    named = {chr(0x4E00 + n): f"横{n % 90}" for n in range(120)}
    split = strokes._split(named)
    assert Counter(split.values())["test"] == 30
    homes = defaultdict(set)
    for char, home in split.items():
        homes[named[char]].add(home)
    assert all(len(found) == 1 for found in homes.values())


# --- functions


def module(*bodies: tuple[str, str, str]) -> bytes:
    return "\n".join(
        f'def {name}(a, b):\n    """{doc}"""\n    {body}\n' for name, doc, body in bodies
    ).encode()


def body(word: str) -> str:
    return f"{word} = sorted(a + b)\n    return [{word}, len({word}), max({word}), '{word}']"


def test_functions_are_split_by_module_and_twins_are_rejected(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(functions, "_standard_library", lambda: (tmp_path, []))
    monkeypatch.setattr(functions, "TEST", 8)
    monkeypatch.setattr(functions, "VALIDATION", 4)
    corpus = functions.FunctionsCorpus()
    for archive in corpus.archives:
        write_archive(tmp_path, archive.file, zipped({}), corpus.archives)
    files = {
        f"p/m{n}.py": module(
            ("one", f"计算第{n}种结果", body(f"x{n}") + f" * {n}\n    # {'abc ' * n}"),
            ("two", f"见 https://a.org/{n} 读取第{n}个文件", body(f"y{n}")),
            ("twin", f"双胞胎函数{n}号", "value = open(a).read() + open(b).read(); return value"),
            ("short", "太短的函数体", "return a"),
            ("plain", "no Chinese here", body(f"z{n}")),
        )
        for n in range(12)
    }
    files["p/tests/test_a.py"] = b"def test(): pass"
    files["p/broken.py"] = b"def f(:"
    write_archive(tmp_path, "akshare", zipped(files), corpus.archives)
    write_archive(
        tmp_path,
        "nonebot2",
        zipped({"n/a.py": module(("g", "未见过的包里的函数", body("q")))}),
        corpus.archives,
    )
    rows, rejected = read_rows(corpus, tmp_path)
    assert rejected["akshare/p.tests.test_a"] == "test module"
    assert rejected["akshare/p.broken"].startswith("module is not Python")
    reasons = Counter(rejected.values())
    assert reasons["body shorter than 30 characters"] == 12
    assert reasons["code repeated"] == 11  # copies are one function, with any docstring
    assert rows["nonebot2/n.a:g:1"]["split"] == "test_unseen_package"
    assert rows["nonebot2/n.a:g:1"]["unit"] == "nonebot2"
    homes = defaultdict(set)
    for row in rows.values():
        homes[row["module"]].add(row["split"])
        assert row["unit"] == {"nonebot2": "nonebot2"}.get(
            row["package"], f"akshare/{row['module']}"
        )
        assert "http" not in "".join(row["captions"])
        assert '"""' not in row["code"]
    assert all(len(found - {"pretrain"}) == 1 for found in homes.values())
    for found in homes.values():  # pretraining reads no function of an evaluated module
        assert "pretrain" not in found or found <= {"pretrain", "train"}


def test_near_twins_of_training_functions_are_found() -> None:
    def item(module: str, name: str, code: str, summary: str) -> functions.FoundFunction:
        function = functions.source_code.SourceFunction(name, 1, code, code, summary)
        return functions.FoundFunction("p", module, function)

    base = "def f(a): total = sum(a); mean = total / len(a); return mean, total, max(a), min(a)"
    train = item("m1", "f", base, "求平均值")
    near = item("m2", "g", base.replace("min(a)", "min(b)"), "求均值等")
    same = item("m3", "h", "class_ = open(path).readlines()[0].strip().split(';')", "求平均值")
    fresh = item("m4", "k", "return json.loads(requests.get(url, timeout=5).text)['rows']", "下载")
    pairs = [train, near, same, fresh]
    split = {train.key: "train", near.key: "test", same.key: "test", fresh.key: "test"}
    leaks = functions._leaks(pairs, split)
    assert leaks == {
        near.key: "near twin of a training function",
        same.key: "docstring of a training function",
    }


def test_pen_paths_appear_in_order_and_stay() -> None:
    frames = strokes.draw_pen_paths(PATHS)
    assert frames.shape == (8, 32, 32, 1)
    ink = frames.reshape(8, -1).astype(int)
    assert (np.diff(ink, axis=0) >= 0).all()
    assert (np.diff(ink.sum(axis=1)) > 0).all()
    first, last = frames[3, ..., 0], frames[7, ..., 0]
    assert first[6, 10] == 255
    assert first[20, 16] == 0  # the second path has not begun: 4 / 8 of the length is in the first
    assert last[20, 16] == 255


def test_drawing_without_a_path_is_rejected() -> None:
    with pytest.raises(ValueError, match="no pen path"):
        strokes.draw_pen_paths([[(0.5, 0.5)]])
