"""Corpus ``radicals``: videos of characters being written, labelled with their radical.

A radical is the part that a Chinese dictionary files a character under: 氵 of 河, 木 of 林. The pen
paths mark its strokes. The class is the sequence of their names, so radicals that are written with
equal strokes share a class (廿 is filed with 艹).
"""

import json
from typing import Any

from pipelines.data.corpora.base import Row, SourceArchives
from skillnet_corpora.archives import iter_archive
from skillnet_corpora.study.labelled_strokes import ClipLabeller, LabelledStrokesCorpus

#: Radical -> names of its strokes: all with at least 50 of the 6,807 characters of ``strokes``.
RADICALS = {
    "口": "竖、横折、横",
    "氵": "点、点、提",
    "艹": "横、竖、竖",
    "扌": "横、竖钩、提",
    "木": "横、竖、撇、点",
    "钅": "撇、横、横、横、竖提",
    "亻": "撇、竖",
    "虫": "竖、横折、横、竖、横、点",
    "讠": "点、横折提",
    "纟": "撇折、撇折、提",
    "月": "撇、横折钩、横、横",
    "女": "撇点、撇、横",
    "忄": "点、点、竖",
    "阝": "横折折折钩、竖",
    "土": "横、竖、提",
    "竹": "撇、横、点、撇、横、点",
    "辶": "点、横折折撇、捺",
    "石": "横、撇、竖、横折、横",
    "疒": "点、横、撇、点、提",
    "日": "竖、横折、横、横",
    "足": "竖、横折、横、竖、横、竖、提",
    "山": "竖、竖弯、竖",
    "火": "点、撇、撇、点",
    "王": "横、横、竖、提",
    "目": "竖、横折、横、横、横",
    "犭": "撇、弯钩、撇",
    "心": "点、斜钩、点、点",
    "鱼": "撇、横撇、竖、横折、横、竖、横、提",
    "贝": "竖、横折、撇、点",
    "鸟": "撇、横折钩、点、竖折折钩、横",
    "宀": "点、点、横撇",
    "酉": "横、竖、横折、撇、竖弯、横、横",
    "刂": "竖、竖钩",
    "衤": "点、横撇、竖、撇、点",
}
_LABEL_OF_STROKES = {strokes: label for label, strokes in enumerate(RADICALS.values())}


class RadicalsCorpus(LabelledStrokesCorpus):
    """Videos labelled with the radical of their character."""

    name = "radicals"
    task = "radical"
    version = 1
    labels = tuple(RADICALS)

    def build_labeller(self, sources: SourceArchives) -> ClipLabeller:
        """Return the function that looks up the radical of a row; reads the marks of all strokes.

        Args:
            sources: the verified archives.
        """
        marked = {
            name: json.loads(data).get("radStrokes", [])
            for name, data in iter_archive(sources, "cnchar-data", "package/draw/", ".json")
        }

        def label_row(row: Row) -> int | str:
            if row["split"] == "pretrain":
                return "no stroke order that names its strokes"
            names = row["captions"][0].split("、")
            strokes = "、".join(names[i] for i in marked[row["key"]] if 0 <= i < len(names))
            if not strokes:
                return "no stroke belongs to a radical"
            return _LABEL_OF_STROKES.get(strokes, "a radical of few characters")

        return label_row

    def preprocessing(self) -> dict[str, Any]:
        """Return the numbers of ``strokes``, its version, and the strokes of each radical."""
        return super().preprocessing() | {"radicals": dict(RADICALS)}
