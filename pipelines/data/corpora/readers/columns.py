"""Options and shard columns of external corpora, by modality.

The columns equal those of the built-in corpora, so every task reads both in the same way. Each
``build_*_columns`` function turns a block of raw rows into columns, row for row. A row that cannot
be finished keeps its position and gets a reason in ``rejected``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from annotated_types import Interval

from pipelines.data.config.bounds import BoundedOptions
from pipelines.data.corpora.base import tensor_field
from pipelines.data.io.media import MEDIA, MediaReadError, read_media
from pipelines.data.shards.jpeg import PixelStorage, encode_jpeg, jpeg_field, uses_jpeg
from pipelines.data.transforms import code, image, sound, text, video
from pipelines.data.transforms.decode_guard import decode_each
from skillnet_platform.config.bounds import PartialFraction, PositiveCount

#: Frames per second: one every 10 ms.
FRAME_RATE = sound.RATE // sound.HOP
#: Limit of pixels per side, and of video frames. Beyond it a single row takes gigabytes.
MAX_SIDE = 4096


@dataclass
class SplitOptions(BoundedOptions):
    """Shares of splits that the corpus does not define; a hash of the key assigns each row.

    Args:
        validation: share of the rows that are held out for validation.
        test: share of the rows that are held out for the test.
    """

    validation: PartialFraction = 0.05
    test: PartialFraction = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation + self.test >= 1:
            raise ValueError(
                "validation and test together must be below 1, so that rows are left to train on"
            )


@dataclass
class TextOptions(BoundedOptions):
    """Texts.

    Args:
        max_tokens: tokens kept of a text; BERT-like models read TNEWS with 128.
        max_characters: characters kept of a text before it is tokenized.
    """

    max_tokens: PositiveCount = 128
    max_characters: PositiveCount = 10_000


@dataclass
class CaptionOptions(BoundedOptions):
    """Captions.

    Args:
        max_caption_tokens: tokens kept of a caption.
        max_caption_characters: characters kept of a caption before it is tokenized.
    """

    max_caption_tokens: PositiveCount = text.CAPTION_TOKENS
    max_caption_characters: PositiveCount = 1_000


@dataclass
class SoundOptions(BoundedOptions):
    """Audio: resampled to 16 kHz mono, 80 log-mel bins of 25 ms every 10 ms.

    Args:
        max_seconds: longer audio is rejected if it has a transcript, because the model would be
            asked for words that it does not hear; without a transcript it is truncated. Set
            model.max_frames to 100 times this value.
        trim: remove silence before and after speech. Speech recognition usually keeps it.
    """

    max_seconds: Annotated[float, Interval(ge=0.1, le=3600)] = 20.0
    trim: bool = False


@dataclass
class ImageOptions(BoundedOptions):
    """Images.

    Args:
        size: pixels per side; 224 is common. Set model.image_size to the same value.
        fit: "crop" keeps the square in the middle, as is common; "pad" keeps the entire image on
            white.
        storage: "raw" pixels, "encoded" as JPEG, or "auto": raw up to 64 KiB per row.
    """

    size: Annotated[int, Interval(ge=1, le=MAX_SIDE)] = image.SIZE
    fit: Literal["crop", "pad"] = "crop"
    storage: PixelStorage = "auto"


@dataclass
class VideoOptions(BoundedOptions):
    """Videos: frames, spread evenly over the video, the square in the middle of each.

    Args:
        frames: frames per video; 8 to 32 are common. Set model.video_frames to the same value.
        video_size: pixels per side of a frame; set model.video_size to the same value.
        video_channels: 1 for grey frames, 3 for colour. A model reads both.
        storage: "raw" pixels, "encoded" as JPEG, or "auto": raw up to 64 KiB per row.
    """

    frames: Annotated[int, Interval(ge=1, le=MAX_SIDE)] = video.FRAMES
    video_size: Annotated[int, Interval(ge=1, le=MAX_SIDE)] = video.SIZE
    video_channels: Literal[1, 3] = video.GREY
    storage: PixelStorage = "auto"


@dataclass
class CodeOptions(BoundedOptions):
    """Functions without their docstrings.

    Args:
        max_code_tokens: tokens kept of a function; CodeBERT-like models read 256.
        max_code_characters: characters kept of a function before it is tokenized.
    """

    max_code_tokens: PositiveCount = 256
    max_code_characters: PositiveCount = 20_000


#: Columns by name, one of them ``rejected`` with reasons; see ``Corpus.transform``.
ColumnArrays = dict[str, pa.Array]


def raw_columns_schema(modality: str, annotations: Sequence[str] = ()) -> pa.Schema:
    """Return the columns that ``rows`` yields after key, split and group.

    Absent values are null, or empty for captions.

    Args:
        modality: text, sound, image, video or code.
        annotations: see :func:`shard_columns`.
    """
    targets = [("label_set", pa.list_(pa.string()))] * ("label_sets" in annotations)
    targets += [("value", pa.float64())] * ("values" in annotations)
    inputs = {"text": [("text", pa.string())], "code": [("code", pa.string())]}
    # ``text`` beside media is the transcript of audio.
    media = [("media", MEDIA), ("text", pa.string())]
    return pa.schema(
        [
            *inputs.get(modality, media),
            ("label", pa.string()),
            *targets,
            ("captions", pa.list_(pa.string())),
            ("file", pa.string()),
            ("row", pa.int64()),
        ]
    )


def shard_columns(modality: str, annotations: Sequence[str], options: Any) -> pa.Schema:
    """Return the columns of the shards: the input of the modality, then the annotations.

    Args:
        modality: text, sound, image, video or code.
        annotations: kinds of target: "labels", "label_sets", "values", "captions", "transcripts".
        options: options of the reader.
    """
    tokens = pa.list_(pa.int32())
    fields: list[Any] = {
        "text": lambda: [("text", pa.string()), ("tokens", tokens)],
        "code": lambda: [("code", pa.string()), ("tokens", tokens)],
        "sound": lambda: [
            ("log_mel", pa.list_(pa.list_(pa.float32(), sound.MELS))),
            ("frames", pa.int32()),
        ],
        "image": lambda: [_pixel_field("pixels", _image_shape(options), options.storage)],
        "video": lambda: [_pixel_field("frames", _video_shape(options), options.storage)],
    }[modality]()
    if "transcripts" in annotations:
        fields += [("symbols", tokens), ("text", pa.string())]
    if "labels" in annotations:
        fields += [("label", pa.int32())]
    if "label_sets" in annotations:
        fields += [("label_set", tokens)]
    if "values" in annotations:
        fields += [("value", pa.float32())]
    if "captions" in annotations:
        fields += [("captions", pa.list_(pa.string())), ("caption_tokens", pa.list_(tokens))]
    return pa.schema(fields)


def estimate_row_bytes(modality: str, options: Any) -> int:
    """Return the approximate size of a finished row in bytes; it decides the rows per shard.

    Args:
        modality: text, sound, image, video or code.
        options: options of the reader.
    """
    if modality in ("image", "video"):
        shape = _image_shape(options) if modality == "image" else _video_shape(options)
        raw = int(np.prod(shape))
        return raw // 6 if uses_jpeg(shape, options.storage) else raw
    # Five seconds of audio are typical; texts are short.
    return 5 * FRAME_RATE * sound.MELS * 4 if modality == "sound" else 1024


def build_text_columns(block: pa.Table, tokenizer: Any, options: TextOptions) -> ColumnArrays:
    """Return truncated texts and their tokens.

    Args:
        block: raw rows with a column ``text``.
        tokenizer: tokenizer of the data directory.
        options: limits of texts.
    """
    texts = [(t or "")[: options.max_characters] for t in block["text"].to_pylist()]
    return {
        "text": pa.array(texts, pa.string()),
        "tokens": text.encode_texts(tokenizer, texts, options.max_tokens),
    }


def build_caption_columns(block: pa.Table, tokenizer: Any, options: CaptionOptions) -> ColumnArrays:
    """Return all captions of each row, truncated, and their tokens.

    Args:
        block: raw rows with a column ``captions``.
        tokenizer: tokenizer of the data directory.
        options: limits of captions.
    """
    longest = options.max_caption_characters
    captions = [[c[:longest] for c in row or ()] for row in block["captions"].to_pylist()]
    tokens = text.encode_captions(tokenizer, captions, options.max_caption_tokens)
    return {"captions": pa.array(captions, pa.list_(pa.string())), "caption_tokens": tokens}


def build_code_columns(block: pa.Table, tokenizer: Any, options: CodeOptions) -> ColumnArrays:
    """Return functions without their docstrings, and their tokens.

    The docstring is the query, so it must not be part of the function that it has to find.

    Args:
        block: raw rows with a column ``code``.
        tokenizer: tokenizer of the data directory.
        options: limits of code.
    """

    def read(source: str) -> str:
        kept = code.remove_docstring(source)[: options.max_code_characters]
        if not kept.strip():
            raise ValueError("no code beside the docstring")
        return kept

    results = list(decode_each(block["code"].to_pylist(), read))
    sources = [source or "" for source, _ in results]
    return {
        "code": pa.array(sources, pa.string()),
        "tokens": text.encode_texts(tokenizer, sources, options.max_code_tokens),
        "rejected": pa.array([reason for _, reason in results], pa.string()),
    }


def build_sound_columns(block: pa.Table, options: SoundOptions, max_bytes: int) -> ColumnArrays:
    """Return the log-mel frames of audio files.

    Args:
        block: raw rows with the columns ``media`` and ``text``.
        options: limits of audio.
        max_bytes: a larger file is rejected.
    """
    longest = round(options.max_seconds * FRAME_RATE)
    transcripts = block["text"].to_pylist()

    def decode(data: bytes, row: int) -> np.ndarray:
        wave = sound.decode_audio(data)
        if transcripts[row] is not None and wave.size > options.max_seconds * sound.RATE:
            raise ValueError(f"audio longer than {options.max_seconds:g} s")
        return sound.compute_log_mel(wave, longest, options.trim)

    mels, rejected = [], []
    for mel, reason in _decode_media(block, decode, max_bytes):
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
    """Return the pixels of images.

    Args:
        block: raw rows with a column ``media``.
        options: size, fit and storage.
        max_bytes: a larger file is rejected.
    """

    def decode(data: bytes, row: int) -> np.ndarray:
        return image.load_pixels(data, options.size, options.fit)

    shape = _image_shape(options)
    return _build_pixels(block, "pixels", shape, options.storage, decode, max_bytes)


def build_video_columns(block: pa.Table, options: VideoOptions, max_bytes: int) -> ColumnArrays:
    """Return the frames of videos.

    Args:
        block: raw rows with a column ``media``.
        options: frames, size, channels and storage.
        max_bytes: a larger file is rejected.
    """

    def decode(data: bytes, row: int) -> np.ndarray:
        return video.load_video_frames(data, *sizes)

    sizes = (options.frames, options.video_size, options.video_channels)
    shape = _video_shape(options)
    return _build_pixels(block, "frames", shape, options.storage, decode, max_bytes)


def _image_shape(options: ImageOptions) -> tuple[int, ...]:
    return options.size, options.size, 3


def _video_shape(options: VideoOptions) -> tuple[int, ...]:
    return options.frames, options.video_size, options.video_size, options.video_channels


def _pixel_field(name: str, shape: tuple[int, ...], storage: PixelStorage) -> pa.Field:
    if uses_jpeg(shape, storage):
        return jpeg_field(name, shape)
    return tensor_field(name, pa.uint8(), shape)


#: Arguments: the bytes of a file, and the index of its row in the block.
DecodeFunction = Callable[[bytes, int], np.ndarray]
Result = TypeVar("Result")


def _build_pixels(
    block: pa.Table,
    name: str,
    shape: tuple[int, ...],
    storage: PixelStorage,
    decode: DecodeFunction,
    max_bytes: int,
) -> ColumnArrays:
    """Return a column of pixels, raw or one JPEG per row, and the reasons of rejected rows."""
    rejected: list[str | None] = []
    if uses_jpeg(shape, storage):
        cells: list[bytes] = []
        decoded = _decode_media(block, lambda data, row: encode_jpeg(decode(data, row)), max_bytes)
        for value, reason in decoded:
            cells.append(value or b"")
            rejected.append(reason)
        return {name: pa.array(cells, pa.binary()), "rejected": pa.array(rejected, pa.string())}
    width = int(np.prod(shape))
    # Rows without pixels stay zero: they never reach a shard.
    flat = np.zeros((block.num_rows, width), np.uint8)
    for row, (pixels, reason) in enumerate(_decode_media(block, decode, max_bytes)):
        if pixels is not None:
            flat[row] = pixels.reshape(-1)
        rejected.append(reason)
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), width)
    return {name: column, "rejected": pa.array(rejected, pa.string())}


def _decode_media(
    block: pa.Table, decode: Callable[[bytes, int], Result], max_bytes: int
) -> Iterator[tuple[Result | None, str | None]]:
    """Yield (result, None) or (None, reason) for each row, with one file in memory at a time."""

    def read(numbered: tuple[int, bytes | MediaReadError]) -> Result:
        row, data = numbered
        if isinstance(data, MediaReadError):
            raise ValueError(data.reason)
        return decode(data, row)

    yield from decode_each(enumerate(read_media(block["media"], max_bytes)), read)
