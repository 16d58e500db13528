"""Public interface for formats of other packages: the base class, options and row helpers.

A format derives from :class:`ExternalCorpus` and joins through the entry point group
``skillnet.corpora``. docs/reference/plugins.md has an example.
"""

from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives, stable_hash
from pipelines.data.corpora.formats.record_reader import (
    BadRecord,
    read_json_entries,
    read_json_lines,
    read_records,
)
from pipelines.data.corpora.readers.base import (
    CaptionOptions,
    ExternalCorpus,
    FileRecord,
    MediaOptions,
    SplitOptions,
)
from pipelines.data.corpora.readers.row_builders import (
    UnwantedRowError,
    clean_captions,
    clean_text,
    error_row,
    hash_caption_group,
    hash_split,
    make_key,
    media_row,
    normalize_transcript,
    val_or_test,
)
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.media import MediaRef
from pipelines.data.modalities.code import CodeOptions
from pipelines.data.modalities.image import ImageOptions
from pipelines.data.modalities.sound import SoundOptions
from pipelines.data.modalities.text import TextOptions
from pipelines.data.modalities.video import VideoOptions
from pipelines.data.shards.format import tensor_field

__all__ = [
    "BadRecord",
    "CaptionOptions",
    "CodeOptions",
    "ExternalCorpus",
    "FileRecord",
    "ImageOptions",
    "MediaOptions",
    "MediaRef",
    "RejectedRow",
    "Row",
    "SoundOptions",
    "SourceArchives",
    "SourceDirectory",
    "SplitOptions",
    "TextOptions",
    "UnwantedRowError",
    "VideoOptions",
    "clean_captions",
    "clean_text",
    "error_row",
    "hash_caption_group",
    "hash_split",
    "make_key",
    "media_row",
    "normalize_transcript",
    "read_json_entries",
    "read_json_lines",
    "read_records",
    "stable_hash",
    "tensor_field",
    "val_or_test",
]
