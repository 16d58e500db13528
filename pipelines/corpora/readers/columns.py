"""Options and finished columns of the user's corpora, a function a modality.

The columns are those of the built-in corpora, so every task reads them alike. Each function takes
a block of raw rows and gives its columns, row for row; a row that cannot be finished keeps its
place, with a reason.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from pipelines.config.bounds import Ranged, within
from pipelines.corpora.base import tensor_field
from pipelines.io.media import MEDIA, MediaReadError, read_media
from pipelines.shards.jpeg import PixelStorage, encode_jpeg, jpeg_field, uses_jpeg
from pipelines.transforms import code, image, sound, text, video
from pipelines.transforms.decode_guard import decode_each

#: Frames a second: one every 10 ms.
FRAME_RATE = sound.RATE // sound.HOP
#: Pixels per side, and frames: beyond, a single row takes gigabytes.
MAX_SIDE = 4096


@dataclass
class SplitOptions(Ranged):
    """Where a corpus brings no split of its own, rows fall into one by a hash of their key.

    Args:
        validation: share of the rows held out for validation.
        test: share of the rows held out for the test.
    """

    validation: float = 0.05
    test: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("validation", "test"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must be in [0, 1), got {getattr(self, key)}")
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must be below 1: something must train")


@dataclass
class TextOptions(Ranged):
    """Texts.

    Args:
        max_tokens: tokens kept of a text; BERT-like models read TNEWS with 128.
        max_characters: characters kept of a text; what lies beyond is cut off before it is
            spelt in tokens.
    """

    max_tokens: int = within(128, 1)
    max_characters: int = within(10_000, 1)


@dataclass
class CaptionOptions(Ranged):
    """Captions.

    Args:
        max_caption_tokens: tokens kept of a caption.
        max_caption_characters: characters kept of a caption.
    """

    max_caption_tokens: int = within(text.CAPTION_TOKENS, 1)
    max_caption_characters: int = within(1_000, 1)


@dataclass
class SoundOptions(Ranged):
    """Recordings: resampled to 16 kHz mono, 80 log-mel bins of 25 ms every 10 ms.

    Args:
        max_seconds: a longer recording with a transcript is set aside, for its end would be
            asked for without being heard; one without is cut. Set model.max_frames to 100
            times as much.
        trim: cut the silence before and after speech. Recognisers usually keep it.
    """

    max_seconds: float = within(20.0, 0.1, 3600)
    trim: bool = False


@dataclass
class ImageOptions(Ranged):
    """Pictures.

    Args:
        size: pixels per side; the field's usual is 224. Set model.image_size to the same.
        fit: "crop" takes the middle square, as is usual; "pad" shows all of it on white.
        storage: "raw" pixels, "encoded" as JPEG, or by size: raw up to 64 KiB a row.
    """

    size: int = within(image.SIZE, 1, MAX_SIDE)
    fit: Literal["crop", "pad"] = "crop"
    storage: PixelStorage = "auto"


@dataclass
class VideoOptions(Ranged):
    """Clips: frames spread evenly over the whole length, the middle square of each, grey.

    Args:
        frames: frames of a clip; the field's usual is 8 to 32. Set model.video_frames alike.
        video_size: pixels per side of a frame; set model.video_size alike.
        storage: "raw" pixels, "encoded" as JPEG, or by size: raw up to 64 KiB a row.
    """

    frames: int = within(video.FRAMES, 1, MAX_SIDE)
    video_size: int = within(video.SIZE, 1, MAX_SIDE)
    storage: PixelStorage = "auto"


@dataclass
class CodeOptions(Ranged):
    """Functions, without their docstrings.

    Args:
        max_code_tokens: tokens kept of a function; CodeBERT-like models read 256.
        max_code_characters: characters kept of a function.
    """

    max_code_tokens: int = within(256, 1)
    max_code_characters: int = within(20_000, 1)


#: Column of reasons; see ``Corpus.transform``.
ColumnArrays = dict[str, pa.Array]


def raw_columns_schema(modality: str) -> pa.Schema:
    """What ``rows`` yields, beside key, split and group: absent values are null or empty."""
    own = {"text": [("text", pa.string())], "code": [("code", pa.string())]}
    # A transcript, for sound; a docstring to take out, for code.
    media = [("media", MEDIA), ("text", pa.string())]
    return pa.schema(
        [
            *own.get(modality, media),
            ("label", pa.string()),
            ("captions", pa.list_(pa.string())),
            ("file", pa.string()),
            ("row", pa.int64()),
        ]
    )


def shard_columns(modality: str, has: Sequence[str], options: Any) -> pa.Schema:
    """Columns of the shards: what the modality's stem reads, and ``has`` of labels, captions,
    transcripts."""
    tokens = pa.list_(pa.int32())
    fields: list[Any] = {
        "text": lambda: [("text", pa.string()), ("tokens", tokens)],
        "code": lambda: [("code", pa.string()), ("tokens", tokens)],
        "sound": lambda: [
            ("log_mel", pa.list_(pa.list_(pa.float32(), sound.MELS))),
            ("frames", pa.int32()),
        ],
        "image": lambda: [_pixels("pixels", _picture(options), options.storage)],
        "video": lambda: [_pixels("frames", _clip(options), options.storage)],
    }[modality]()
    if "transcripts" in has:
        fields += [("symbols", tokens), ("text", pa.string())]
    if "labels" in has:
        fields += [("label", pa.int32())]
    if "captions" in has:
        fields += [("captions", pa.list_(pa.string())), ("caption_tokens", pa.list_(tokens))]
    return pa.schema(fields)


def estimate_row_bytes(modality: str, options: Any) -> int:
    """Roughly what a finished row takes: decides how many go into a shard."""
    if modality in ("image", "video"):
        shape = _picture(options) if modality == "image" else _clip(options)
        raw = int(np.prod(shape))
        return raw // 6 if uses_jpeg(shape, options.storage) else raw
    return 5 * FRAME_RATE * sound.MELS * 4 if modality == "sound" else 1024


def build_text_columns(block: pa.Table, tokenizer: Any, options: TextOptions) -> ColumnArrays:
    """Texts, cut, and their tokens."""
    texts = [(t or "")[: options.max_characters] for t in block["text"].to_pylist()]
    return {
        "text": pa.array(texts, pa.string()),
        "tokens": text.encode_texts(tokenizer, texts, options.max_tokens),
    }


def build_caption_columns(block: pa.Table, tokenizer: Any, options: CaptionOptions) -> ColumnArrays:
    """Captions, each cut, and their tokens. All of a row's captions are kept."""
    longest = options.max_caption_characters
    captions = [[c[:longest] for c in row or ()] for row in block["captions"].to_pylist()]
    tokens = text.encode_captions(tokenizer, captions, options.max_caption_tokens)
    return {"captions": pa.array(captions, pa.list_(pa.string())), "caption_tokens": tokens}


def build_code_columns(block: pa.Table, tokenizer: Any, options: CodeOptions) -> ColumnArrays:
    """Functions without their docstrings: the query must not stand in what it shall find."""

    def read(source: str) -> str:
        found = code.remove_docstring(source)[: options.max_code_characters]
        if not found.strip():
            raise ValueError("no code beside the docstring")
        return found

    made = list(decode_each(block["code"].to_pylist(), read))
    found = [source or "" for source, _ in made]
    return {
        "code": pa.array(found, pa.string()),
        "tokens": text.encode_texts(tokenizer, found, options.max_code_tokens),
        "rejected": pa.array([reason for _, reason in made], pa.string()),
    }


def build_sound_columns(block: pa.Table, options: SoundOptions, max_bytes: int) -> ColumnArrays:
    """Log-mel frames of recordings."""
    longest = round(options.max_seconds * FRAME_RATE)
    transcripts = block["text"].to_pylist()

    def decode(data: bytes, row: int) -> np.ndarray:
        wave = sound.decode_audio(data)
        if transcripts[row] is not None and wave.size > options.max_seconds * sound.RATE:
            raise ValueError(f"a recording longer than {options.max_seconds:g} s")
        return sound.compute_log_mel(wave, longest, options.trim)

    mels, rejected = [], []
    for mel, reason in _decoded(block, decode, max_bytes):
        mels.append(np.zeros((0, sound.MELS), np.float32) if mel is None else mel)
        rejected.append(reason)
    lengths = np.array([len(mel) for mel in mels], np.int32)
    flat = pa.array(np.concatenate(mels).reshape(-1))
    ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    frames = pa.FixedSizeListArray.from_arrays(flat, sound.MELS)
    return {
        "log_mel": pa.ListArray.from_arrays(ends, frames),
        "frames": pa.array(lengths),
        "rejected": pa.array(rejected, pa.string()),
    }


def build_image_columns(block: pa.Table, options: ImageOptions, max_bytes: int) -> ColumnArrays:
    """Pixels of pictures."""

    def decode(data: bytes, row: int) -> np.ndarray:
        return image.load_pixels(data, options.size, options.fit)

    return _stored(block, "pixels", _picture(options), options.storage, decode, max_bytes)


def build_video_columns(block: pa.Table, options: VideoOptions, max_bytes: int) -> ColumnArrays:
    """Frames of clips."""

    def decode(data: bytes, row: int) -> np.ndarray:
        return video.load_video_frames(data, options.frames, options.video_size)

    return _stored(block, "frames", _clip(options), options.storage, decode, max_bytes)


def _picture(options: ImageOptions) -> tuple[int, ...]:
    return options.size, options.size, 3


def _clip(options: VideoOptions) -> tuple[int, ...]:
    return options.frames, options.video_size, options.video_size, 1


def _pixels(name: str, shape: tuple[int, ...], storage: PixelStorage) -> pa.Field:
    if uses_jpeg(shape, storage):
        return jpeg_field(name, shape)
    return tensor_field(name, pa.uint8(), shape)


#: A file's bytes, and the number of its row in the block.
Decode = Callable[[bytes, int], np.ndarray]
Result = TypeVar("Result")


def _stored(
    block: pa.Table,
    name: str,
    shape: tuple[int, ...],
    storage: PixelStorage,
    decode: Decode,
    max_bytes: int,
) -> ColumnArrays:
    """A column of pixels, raw or encoded row by row, and why a row has none."""
    rejected: list[str | None] = []
    if uses_jpeg(shape, storage):
        cells: list[bytes] = []
        decoded = _decoded(block, lambda data, row: encode_jpeg(decode(data, row)), max_bytes)
        for value, reason in decoded:
            cells.append(value or b"")
            rejected.append(reason)
        return {name: pa.array(cells, pa.binary()), "rejected": pa.array(rejected, pa.string())}
    width = int(np.prod(shape))
    made = np.zeros((block.num_rows, width), np.uint8)
    for place, (pixels, reason) in enumerate(_decoded(block, decode, max_bytes)):
        if pixels is not None:
            made[place] = pixels.reshape(-1)
        rejected.append(reason)
    column = pa.FixedSizeListArray.from_arrays(pa.array(made.reshape(-1)), width)
    return {name: column, "rejected": pa.array(rejected, pa.string())}


def _decoded(
    block: pa.Table, decode: Callable[[bytes, int], Result], max_bytes: int
) -> Iterator[tuple[Result | None, str | None]]:
    """(Result, None) or (None, reason) of each row; one file is in memory at a time."""

    def read(found: tuple[int, bytes | MediaReadError]) -> Result:
        row, data = found
        if isinstance(data, MediaReadError):
            raise ValueError(data.reason)
        return decode(data, row)

    yield from decode_each(enumerate(read_media(block["media"], max_bytes)), read)
