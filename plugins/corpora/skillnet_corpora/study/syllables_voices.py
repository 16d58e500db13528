"""Corpus ``syllables_voices``: the task of ``syllables``, spoken by two more voices.

All rows of ``syllables`` keep their splits. The package gcin-voice has about 1,170 syllables in
each of two voices. A recording of voice 3 follows the pair of syllable and tone: a pair that
``syllables`` trains on is trained on, and a held-out pair is a further row of the split that holds
it out. So the unit is the pair, in both voices. Voice 5 is the reserve: no other split contains it.
"""

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines.data.corpora.base import Archive, RejectedRow, Row, SourceArchives
from skillnet_corpora.archives import iter_archive
from skillnet_corpora.demo.syllables import (
    INITIALS,
    SyllablesCorpus,
    join_pinyin,
    split_pinyin,
)
from skillnet_corpora.study.further_splits import MORE, RESERVE

#: Speaker of ``syllables``.
FIRST_VOICE = "cnchar"
RESERVED_VOICE = "gcin-5"
#: Rows of the reserve whose pair of syllable and tone is trained on, in other voices.
RESERVED_TRAINED = f"{RESERVE}_trained_pair"
VOICES = "./usr/share/gcin-voice/ogg/"

GCIN_VOICE = Archive(
    "gcin-voice_0~20170223-3_all.deb",
    7_740_240,
    "6a0353f0294d06f7bd901bada3d5d9eec63b66c2ec029f92da3124d93d45de70",
    "debian",
    "gcin-voice=0~20170223-3",
    "voice 3 GPL-3 or LGPL-3 (Edward Der-Hua Liu); voice 5 CC-BY 3.0 (ChionMeilin, Chu Lo)",
)

#: Zhuyin of initials and finals in the spelling of ``syllables``.
_INITIALS = dict(zip("ㄅㄆㄇㄈㄉㄊㄋㄌㄍㄎㄏㄐㄑㄒㄖㄗㄘㄙㄓㄔㄕ", INITIALS, strict=True))
_FINALS = {
    "ㄚ": "a", "ㄛ": "o", "ㄜ": "e", "ㄞ": "ai", "ㄟ": "ei", "ㄠ": "ao", "ㄡ": "ou", "ㄢ": "an",
    "ㄣ": "en", "ㄤ": "ang", "ㄥ": "eng", "ㄦ": "er", "ㄧ": "i", "ㄧㄚ": "ia", "ㄧㄝ": "ie",
    "ㄧㄠ": "iao", "ㄧㄡ": "iou", "ㄧㄢ": "ian", "ㄧㄣ": "in", "ㄧㄤ": "iang", "ㄧㄥ": "ing",
    "ㄨ": "u", "ㄨㄚ": "ua", "ㄨㄛ": "uo", "ㄨㄞ": "uai", "ㄨㄟ": "uei", "ㄨㄢ": "uan",
    "ㄨㄣ": "uen", "ㄨㄤ": "uang", "ㄨㄥ": "ueng", "ㄩ": "ü", "ㄩㄝ": "üe", "ㄩㄢ": "üan",
    "ㄩㄣ": "ün", "ㄩㄥ": "iong",
}  # fmt: skip
#: Initials that are a syllable without a written final.
_SYLLABIC = frozenset("ㄓㄔㄕㄖㄗㄘㄙ")


class SyllableVoicesCorpus(SyllablesCorpus):
    """Audio of syllables in three voices; one of them is the reserve."""

    name = "syllables_voices"
    version = 1
    archives = (*SyllablesCorpus.archives, GCIN_VOICE)
    raw_schema = pa.schema([*SyllablesCorpus.raw_schema, ("speaker", pa.string())])
    columns = pa.schema([*SyllablesCorpus.columns, ("speaker", pa.string())])

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the rows of ``syllables``, then both voices in the order of the package."""
        # Symbols of a pair -> its split. Spellings differ between the archives, symbols do not.
        home: dict[tuple[str, ...], str] = {}
        for row in super().rows(sources):
            if isinstance(row, RejectedRow):
                yield row
                continue
            home[tuple(split_pinyin(row["text"]))] = row["split"]
            yield row | {"unit": row["text"], "speaker": FIRST_VOICE}
        for name, data in iter_archive(sources, "gcin-voice", VOICES, ".ogg"):
            zhuyin, _, voice = name.rpartition("/")
            speaker = f"gcin-{voice}"
            try:
                symbols = parse_zhuyin(zhuyin)
            except ValueError as error:
                yield RejectedRow(f"{speaker}/{zhuyin}", str(error))
                continue
            split = home.get(symbols, "train")
            if speaker == RESERVED_VOICE:
                split = RESERVED_TRAINED if split == "train" else RESERVE
            elif split != "train":
                split += MORE
            text = join_pinyin(symbols)
            yield {
                "split": split,
                "key": f"{speaker}/{zhuyin}",
                "group": -1,
                "unit": speaker if speaker == RESERVED_VOICE else text,
                "text": text,
                "audio": data,
                "speaker": speaker,
            }

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return log-mel frames and the speaker."""
        made = super().transform(block, tokenizer)
        return made.append_column("speaker", block["speaker"])

    def preprocessing(self) -> dict[str, Any]:
        """Return the numbers of ``syllables`` and its version."""
        return super().preprocessing() | {"syllables_version": SyllablesCorpus.version}


def parse_zhuyin(zhuyin: str) -> tuple[str, ...]:
    """Return initial (if any), final and tone: "ㄓㄨㄤ" -> ("zh", "uang", "1").

    The digits 2 to 4 are tones, no digit is tone 1, and the digit 1 is the neutral tone.

    Raises:
        ValueError: it is not a syllable of standard Mandarin with a tone from 1 to 4.
    """
    found = re.fullmatch(r"([ㄅ-ㄙ]?)([ㄚ-ㄩ]*)([1-4]?)", zhuyin)
    if found is None:
        raise ValueError("not a syllable of standard Mandarin")
    initial, final, tone = found.groups()
    if tone == "1":
        raise ValueError("neutral tone")
    written = "i" if initial in _SYLLABIC and initial and not final else _FINALS.get(final)
    if written is None:
        raise ValueError("not a syllable of standard Mandarin")
    if initial and written == "ueng":
        written = "ong"
    return (*([_INITIALS[initial]] if initial else []), written, tone or "1")
