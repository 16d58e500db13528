"""Corpus ``stamps_spoken``: captions of ``stamps``, spoken in ten languages, with their texts.

The label is the language. A language has one speaker or few, so that a classifier may use the voice
and the microphone: the score is no evidence about languages alone. The content is equal in all
languages, and a test row is of a stamp that no training row mentions in any language.

A key is ``LANGUAGE/STAMP``, such as ``fr/animals/birds/crow``. A rule on keys labels the recordings
of one language with the topic of their stamps. The caption in Chinese pairs a recording with its
picture.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa

from pipelines.data.corpora.base import Archive, Corpus, RejectedRow, Row, SourceArchives
from pipelines.data.transforms import text
from skillnet_corpora.archives import iter_members
from skillnet_corpora.demo.syllables import SyllablesCorpus, describe_frames, hear_recordings
from skillnet_corpora.study.stamps import (
    CHINESE,
    FOLDER,
    LANGUAGES,
    NO_CHINESE,
    SPLIT_BY,
    SPOKEN_FILE,
    STAMPS,
    read_stamps,
)
from skillnet_corpora.study.variant_units import describe_units


class SpokenStampsCorpus(Corpus):
    """Spoken captions with their language, their text, and the Chinese caption of the stamp."""

    name = "stamps_spoken"
    modality = "sound"
    task = "spoken_language"
    archives: ClassVar[tuple[Archive, ...]] = (STAMPS,)
    raw_schema = pa.schema(
        [
            ("audio", pa.binary()),
            ("text", pa.string()),
            ("english", pa.string()),
            ("language", pa.string()),
            ("label", pa.int32()),
            ("captions", pa.list_(pa.string())),
        ]
    )
    columns = pa.schema(
        [
            SyllablesCorpus.columns.field("log_mel"),
            SyllablesCorpus.columns.field("frames"),
            *(field for field in raw_schema if field.name != "audio"),
            ("caption_tokens", pa.list_(pa.list_(pa.int32()))),
        ]
    )
    text_columns = ("captions",)
    shard_rows = 256

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the recordings in the order of the package."""
        stamps = read_stamps(sources)
        for path, data in iter_members(sources.path("tuxpaint"), _is_recording):
            file = path.removeprefix(FOLDER)
            spoken = SPOKEN_FILE.fullmatch(file)
            language = spoken[2] if spoken else None
            captions = stamps[spoken[1]].captions if spoken and spoken[1] in stamps else {}
            if spoken is None:
                yield RejectedRow(file, "a sound effect, not a caption")
            elif language not in LANGUAGES:
                yield RejectedRow(file, "in a language of few recordings")
            elif CHINESE not in captions:
                yield RejectedRow(file, NO_CHINESE)
            elif language not in captions:
                yield RejectedRow(file, "no text in its language")
            else:
                stamp = stamps[spoken[1]]
                yield stamp.start_row(f"{language}/{stamp.key}") | {
                    "group": stamp.group,
                    "audio": data,
                    "text": captions[language],
                    "language": language,
                    "label": LANGUAGES.index(language),
                    "captions": [captions[CHINESE]],
                }

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return log-mel frames and tokens; a recording that cannot be decoded is rejected."""
        mels, frames, rejected = hear_recordings(block)
        made = block.select(["text", "english", "language", "label", "captions"])
        tokens = text.encode_captions(tokenizer, block["captions"].to_pylist())
        return (
            made.append_column("log_mel", mels)
            .append_column("frames", frames)
            .append_column("caption_tokens", tokens)
            .append_column("rejected", rejected)
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return the parameters of the frames and of the splits."""
        return describe_frames() | {
            "caption_tokens": text.CAPTION_TOKENS,
            "split_by": SPLIT_BY,
            **describe_units(),
        }

    def facts(self) -> dict[str, Any]:
        """Return the codes of the languages."""
        return {"labels": list(LANGUAGES)}


def _is_recording(path: str) -> bool:
    return path.startswith(FOLDER) and path.endswith((".ogg", ".wav"))
