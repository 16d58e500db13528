"""Tiny corpora whose rows people can read, with a tokenizer of their own.

Drawn, spoken and written by rule, so that simple methods find what belongs together.
"""

import hashlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.tokenizer import training as tokenizer_training
from pipelines.data.transforms import text
from skillnet.config import SkillNetConfig
from skillnet_corpora.demo.strokes import draw_pen_paths
from tests.helpers.prepared_corpora import change_corpus, write_corpus
from tests.helpers.small_corpora import shaped_table
from tests.helpers.small_run import SIZES

COLOURS = {
    "红色": (220, 40, 50),
    "绿色": (40, 170, 70),
    "蓝色": (50, 80, 220),
    "黄色": (240, 200, 40),
    "黑色": (20, 20, 20),
    "紫色": (140, 60, 180),
}
SHAPES = ("方块", "圆圈", "横条", "竖条")
STROKES = {
    "横": ((0.1, 0.5), (0.9, 0.5)),
    "竖": ((0.5, 0.1), (0.5, 0.9)),
    "撇": ((0.8, 0.1), (0.2, 0.9)),
    "捺": ((0.2, 0.1), (0.8, 0.9)),
}
SUBJECTS = "文学 历史 数学 化学 医药 农业 交通 军事 艺术 法律 经济 语言 体育 天文 生物".split()  # noqa: SIM905
ENDINGS = ("研究", "概论", "教程", "史料", "手册", "论文集", "年鉴", "方法")
VERBS = {"读取": "read", "写入": "write", "删除": "delete", "发送": "send", "计算": "compute"}
NOUNS = {"文件": "file", "消息": "message", "用户": "user", "日期": "date", "价格": "price"}

LABELS = ("odd", "third", "late")

MODALITY = {
    "headings": "text",
    "syllables": "sound",
    "drawings": "image",
    "strokes": "video",
    "functions": "code",
}


def config() -> SkillNetConfig:
    """A model of some ten thousand weights that reads these corpora."""
    return SkillNetConfig(**SIZES, max_tokens=48, max_frames=40)


def write_corpora(folder: Path) -> Path:
    """Write all five corpora and the tokenizer below ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "headings": _headings(),
        "syllables": _syllables(),
        "drawings": _drawings(),
        "strokes": _strokes(),
        "functions": _functions(),
    }
    texts = [t for each in rows.values() for row in each for t in _texts(row)]
    (folder / "tokenizer.json").write_text(
        tokenizer_training.train_tokenizer(texts, [], size=1000), "utf-8"
    )
    words = tokenizer_training.load_tokenizer(folder / "tokenizer.json")
    for name, each in rows.items():
        _write(folder, name, MODALITY[name], each, words)
    return folder


def write_labelled_corpora(folder: Path) -> Path:
    """Write the five corpora, with classes, sets of classes, a number and captions in every row.

    The targets of a row follow from its place, so that each split has all of them.
    """
    write_corpora(folder)

    def add(split: str, table: pa.Table) -> pa.Table:
        for column, values in _targets(folder, len(table)).items() if split != "pretrain" else ():
            # The given groups have too few rows per split, and captions of no other corpus.
            if column in ("group", "captions", "caption_tokens") and column in table.column_names:
                table = table.set_column(table.column_names.index(column), column, values)
            elif column not in table.column_names:
                table = table.append_column(column, values)
        return table

    def describe(manifest: dict[str, Any]) -> None:
        rows = manifest["splits"]["train"]["rows"]
        values = _targets(folder, rows)["value"].to_numpy().astype(float)
        manifest |= {"value_scale": [float(values.mean()), float(values.std())]}
        manifest |= {"pretraining": ["train"]}
        manifest.setdefault("labels", list(LABELS))

    for name in MODALITY:
        change_corpus(folder / name, add, describe)
    return folder


def _targets(folder: Path, rows: int) -> dict[str, Any]:
    numbers = np.arange(rows)
    sets = [[kind for kind in range(3) if number % (kind + 2) == 0] for number in numbers]
    captions = [[f"第{number // 3}个的说明"] for number in numbers]
    words = tokenizer_training.load_tokenizer(folder / "tokenizer.json")
    return {
        "group": pa.array(numbers // 3, pa.int64()),
        "label": pa.array(numbers % 3, pa.int32()),
        "label_set": pa.array(sets, pa.list_(pa.int32())),
        "value": pa.array(100 + 10.0 * numbers, pa.float32()),
        "captions": pa.array(captions),
        "caption_tokens": text.encode_captions(words, captions),
    }


Row = dict[str, Any]


def _split(number: int) -> str:
    return ("train", "train", "train", "validation", "test")[number % 5]


def _headings() -> list[Row]:
    headings: list[Row] = [
        {"split": _split(i), "text": f"{subject}{ending}", "label": SUBJECTS.index(subject)}
        for i, (subject, ending) in enumerate(product(SUBJECTS, ENDINGS))
    ]
    return headings + [
        {"split": "pretrain", "text": f"关于{subject}的{ending}", "captions": [subject]}
        for subject, ending in product(SUBJECTS, ENDINGS[:2])
    ]


def _syllables() -> list[Row]:
    random = np.random.default_rng(1)
    rows: list[Row] = []
    for i, (initial, final, _) in enumerate(product(range(6), range(6), range(2))):
        frames = int(random.integers(20, 34))
        mel = random.standard_normal((frames, 80)).astype(np.float32) * 0.3
        mel[: frames // 2, initial * 12 : initial * 12 + 12] += 3
        mel[frames // 2 :, final * 12 : final * 12 + 12] += 3
        symbols = [1 + initial, 22 + final, 58]
        rows.append({"split": _split(i), "log_mel": mel, "symbols": symbols, "text": f"s{i}"})
    return rows


def _drawings() -> list[Row]:
    rows: list[Row] = []
    for concept, (colour, shape) in enumerate(product(COLOURS, SHAPES)):
        for artist in range(2):
            picture = np.full((48, 48, 3), 255, np.uint8)
            y, x = np.mgrid[:48, :48]
            inside = {
                "方块": (abs(x - 24) < 14) & (abs(y - 24) < 14),
                "圆圈": (x - 24) ** 2 + (y - 24) ** 2 < 16**2,
                "横条": abs(y - 24) < 6,
                "竖条": abs(x - 24) < 6,
            }[shape]
            picture[inside] = np.array(COLOURS[colour]) + artist * 8
            split = "train" if artist == 0 else ("validation", "test")[concept % 2]
            if colour == "紫色":
                split = "test_unseen_concept"
            captions = [f"{colour}的{shape}", colour, shape]
            rows.append({"split": split, "group": concept, "pixels": picture, "captions": captions})
    return rows


def _strokes() -> list[Row]:
    rows: list[Row] = []
    for i, names in enumerate(product(STROKES, repeat=3)):
        clip = draw_pen_paths([STROKES[name] for name in names])
        captions = ["、".join(names)]
        rows.append({"split": _split(i), "group": i, "frames": clip, "captions": captions})
    return rows


def _functions() -> list[Row]:
    rows: list[Row] = []
    for i, ((said, verb), (thing, noun)) in enumerate(product(VERBS.items(), NOUNS.items())):
        code = f"def {verb}_{noun}({noun}):\n    return client.{verb}({noun}, '{said}')"
        rows.append({"split": _split(i), "code": code, "captions": [f"{said}{thing}的函数"]})
    return rows


def _texts(row: Row) -> list[str]:
    return [*row.get("captions", []), *(row[k] for k in ("text", "code") if k in row)]


def _write(folder: Path, name: str, modality: str, rows: list[Row], words: Any) -> None:
    splits = {
        split: [_table([row for row in rows if row["split"] == split], split, words)]
        for split in dict.fromkeys(row["split"] for row in rows)
    }
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    about: dict[str, Any] = {"preprocessing": {"made": "by rule"}, "task": ""}
    if name == "headings":
        about["labels"] = list(SUBJECTS)
    if name == "syllables":
        about["symbols"] = [f"p{number}" for number in range(1, 62)]
    size = words.get_vocab_size()
    tokenizer = {"file": "tokenizer.json", "sha256": digest, "vocab_size": size}
    names = {"corpus": name, "modality": modality, "tokenizer": tokenizer}
    write_corpus(folder / name, splits, **names, **about)


def _table(rows: list[Row], split: str, words: Any) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "key": pa.array([f"{split}/{number}" for number in range(len(rows))]),
        "group": pa.array([row.get("group", -1) for row in rows], pa.int64()),
        # The first half of the rows: two are a unit. The others are units by themselves.
        "unit": pa.array(
            [f"unit {n // 2}" if n < len(rows) // 2 else None for n in range(len(rows))]
        ),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("text", "code"):
        if name in rows[0]:
            texts = [row[name] for row in rows]
            columns[name] = pa.array(texts)
            columns["tokens"] = text.encode_texts(words, texts, 48)
    if "label" in rows[0]:
        columns["label"] = pa.array([row["label"] for row in rows], pa.int32())
    if "captions" in rows[0]:
        captions = [row["captions"] for row in rows]
        columns["captions"] = pa.array(captions)
        columns["caption_tokens"] = text.encode_captions(words, captions)
    if "log_mel" in rows[0]:
        lengths = np.array([len(row["log_mel"]) for row in rows])
        flat = np.concatenate([row["log_mel"] for row in rows]).ravel()
        ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        frames = pa.FixedSizeListArray.from_arrays(pa.array(flat), 80)
        columns["log_mel"] = pa.ListArray.from_arrays(ends, frames)
        columns["frames"] = pa.array(lengths, pa.int32())
        columns["symbols"] = pa.array([row["symbols"] for row in rows], pa.list_(pa.int32()))
    for name in ("pixels", "frames"):
        if name in rows[0] and "log_mel" not in rows[0]:
            shapes[name] = rows[0][name].shape
            flat = np.stack([row[name] for row in rows]).ravel()
            width = int(np.prod(shapes[name]))
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    return shaped_table(columns, shapes)
