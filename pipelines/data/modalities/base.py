"""File half of a modality: reader options, columns of shards, decoding, raw inputs and previews.

:class:`ModalityFiles` is the base class; the modules beside this one hold the built-in ones.
Readers, ``inspect``, the decoder process, predictions and the search page ask the instance that
:attr:`skillnet.modality.Modality.file_half` loads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa

from pipelines.data.config.bounds import BoundedOptions
from pipelines.data.io.media import MEDIA, MediaReadError, read_media
from pipelines.data.shards.format import tensor_field
from pipelines.data.shards.jpeg import PixelStorage, encode_jpeg, jpeg_field, uses_jpeg
from pipelines.data.transforms.decode_guard import decode_each
from skillnet.modality import Modality

#: Columns by name, one of them ``rejected`` with reasons; see ``Corpus.transform``.
ColumnArrays = dict[str, pa.Array]
Result = TypeVar("Result")

#: Limit of pixels per side, and of video frames. Beyond it a single row takes gigabytes.
MAX_SIDE = 4096
#: Common names of the field of a row's captions, the most likely one first.
CAPTION_FIELDS = (
    *("captions", "caption", "sentences", "docstring", "description", "comment", "text", "txt"),
)
#: Values of a row that is shown as a picture, in per cent. They ignore single loud values.
SHOWN_PERCENTILES = (1, 99)
#: Columns of such a picture at most; longer rows are sampled evenly.
MAX_SHOWN_COLUMNS = 400


@dataclass(frozen=True)
class InputContext:
    """What a raw input is read with.

    Args:
        config: ``SkillNetConfig`` of the model.
        settings: preprocessing of the task's corpus.
        decode: ``decode(modality, data, *arguments)`` decodes a file in a child process.
        tokenize: ``tokenize(texts, limit)`` returns the ids of each text.
        limit_tokens: maps keys of the settings to the largest number of tokens.
        is_caption: whether the tower reads captions.
        is_single: whether a file must have one row.
        max_rows: rows of a file at most; None without a limit.
    """

    config: Any
    settings: Mapping[str, Any]
    decode: Callable[..., Any]
    tokenize: Callable[[Sequence[str], int], list[np.ndarray]]
    limit_tokens: Callable[[Sequence[str]], int]
    is_caption: bool = False
    is_single: bool = False
    max_rows: int | None = None


class ModalityFiles:
    """Base class of file halves: rows from the bytes of files, as arrays of numbers.

    A subclass has at least ``Options``, ``find_shape``, ``reader_arguments`` and ``decode``.

    Args:
        modality: the declaration.
    """

    #: Dataclass of the options of readers, with bounds.
    Options: ClassVar[type] = BoundedOptions
    #: Noun with its article, for reasons of rejected rows.
    noun: ClassVar[str] = "a file"
    #: Common names of the field of the text beside a row, or of the text that is the row.
    text_fields: ClassVar[tuple[str, ...]] = CAPTION_FIELDS
    #: Common names of the field of a row that is a string; "text" reads rows without any.
    row_fields: ClassVar[tuple[str, ...]] = ()
    #: Keys of a manifest that are about the medium; () for those of ``Options``.
    settings_keys: ClassVar[tuple[str, ...]] = ()
    #: Type of the numbers in shards.
    dtype: ClassVar[type[np.generic]] = np.float32
    #: Whether the search page plays the file of a query.
    is_played: ClassVar[bool] = False

    def __init__(self, modality: Modality) -> None:
        self.modality = modality

    # -- preparation -----------------------------------------------------------------------

    def find_shape(self, options: Any) -> tuple[int | None, ...]:
        """Return the shape of a row; the first size is None if rows differ in length.

        Args:
            options: choices of the reader.
        """
        raise NotImplementedError

    def reader_arguments(self, options: Any) -> tuple[Any, ...]:
        """Return the arguments of :meth:`decode` that the options of a reader give."""
        return ()

    def decode(self, data: bytes, *arguments: Any) -> Any:
        """Decode the bytes of a file to an array (see :meth:`find_shape`).

        Args:
            data: bytes of the file.
            arguments: plain values, see :meth:`reader_arguments`.

        Raises:
            ValueError: the bytes cannot be used; the text is a short reason.
        """
        raise NotImplementedError

    def read_row(self, data: bytes, text: str | None, options: Any) -> np.ndarray:
        """Return the array of a row of a corpus.

        Args:
            data: bytes of its file.
            text: its transcript, or None.
            options: choices of the reader.

        Raises:
            ValueError: the row is rejected; the text is the reason.
        """
        row: np.ndarray = self.decode(data, *self.reader_arguments(options))
        return row

    def raw_fields(self) -> list[tuple[str, pa.DataType]]:
        """Return the columns of raw rows: the reference to the file, and the transcript."""
        return [("media", MEDIA), ("text", pa.string())]

    def shard_fields(self, options: Any) -> list[Any]:
        """Return the columns of shards: the numbers of a row, and its length.

        Args:
            options: choices of the reader.
        """
        shape, kind = self.find_shape(options), pa.from_numpy_dtype(np.dtype(self.dtype))
        names = self.modality.batch
        if shape[0] is not None:
            return [tensor_field(self.modality.column, kind, [n for n in shape if n is not None])]
        rows = pa.list_(pa.list_(kind, shape[1]))
        return [(self.modality.column, rows), *((name, pa.int32()) for name in names[1:])]

    def estimate_row_bytes(self, options: Any) -> int:
        """Return the approximate size of a finished row; it decides the rows per shard."""
        return 1024

    def build_columns(
        self, block: pa.Table, tokenizer: Any, options: Any, max_bytes: int
    ) -> ColumnArrays:
        """Return the columns of a block, and reasons in ``rejected``, row for row.

        Args:
            block: raw rows.
            tokenizer: vocabulary of the data directory; None for media.
            options: choices of the reader.
            max_bytes: a larger file is rejected.
        """
        shape = self.find_shape(options)
        texts = block["text"].to_pylist()
        empty: Any = np.zeros([n or 0 for n in shape], self.dtype)
        rows: list[np.ndarray] = []
        rejected: list[str | None] = []

        def read(data: bytes, row: int) -> np.ndarray:
            return self.read_row(data, texts[row], options)

        for values, reason in decode_rows(block, read, max_bytes):
            # Rows without values never reach a shard.
            rows.append(empty if values is None else values)
            rejected.append(reason)
        reasons = {"rejected": pa.array(rejected, pa.string())}
        flat = pa.array(np.concatenate([row.reshape(-1) for row in rows]))
        width = int(np.prod([n for n in shape if n is not None]))
        items = pa.FixedSizeListArray.from_arrays(flat, width)
        if shape[0] is not None:
            return {self.modality.column: items} | reasons
        lengths = np.array([len(row) for row in rows], np.int32)
        ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        found = {self.modality.column: pa.ListArray.from_arrays(ends, items)}
        return found | {name: pa.array(lengths) for name in self.modality.batch[1:]} | reasons

    def describe_constants(self) -> dict[str, Any]:
        """Return the constants of the transform that decide the bytes of shards."""
        return {}

    def list_settings(self) -> tuple[str, ...]:
        """Return the keys of a manifest's preprocessing settings that are about the medium."""
        return self.settings_keys or tuple(each.name for each in fields(self.Options))

    def measure(self, data: bytes) -> dict[str, float]:
        """Return facts of a file for ``inspect``, such as its duration, read from its header.

        Args:
            data: bytes of the file.

        Raises:
            ValueError: the header cannot be read.
        """
        return {}

    def fit_grid(self, sizes: dict[str, Any], default: Callable[[str], Any]) -> None:
        """Add sizes of tokens to the sizes of a model, if the default tokens do not divide them.

        Args:
            sizes: key of the model -> size, changed in place.
            default: returns the default of a key.
        """

    # -- raw inputs of predictions ---------------------------------------------------------

    def model_arguments(self, config: Any, settings: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the arguments of :meth:`decode` for a prediction: those of the corpus.

        Args:
            config: ``SkillNetConfig`` of the model.
            settings: preprocessing of the task's corpus.
        """
        known = {each.name for each in fields(self.Options)} & settings.keys()
        return self.reader_arguments(self.Options(**{key: settings[key] for key in known}))

    def convert(self, content: Any, *arguments: Any) -> np.ndarray:
        """Return the array of an input in memory, as :meth:`decode` returns that of a file.

        Args:
            content: value of a type that :meth:`describe_content` names.
            arguments: see :meth:`decode`.

        Raises:
            ValueError: it cannot be used.
        """
        raise ValueError(f"expected a path or bytes, not {type(content).__name__}")

    def describe_wrong_content(self, content: Any) -> str:
        """Return what Python code should give instead of an input in memory; "" if it fits."""
        return ""

    def read_inputs(self, item: Any, context: InputContext) -> list[tuple[str, np.ndarray]]:
        """Return the named model inputs of a raw input; several for a file with several rows.

        Args:
            item: ``PredictionItem``: its text, bytes or content.
            context: model, settings and decoder.

        Raises:
            ValueError: the input is empty, damaged or of another kind.
        """
        arguments = self.model_arguments(context.config, context.settings)
        if item.content is not None:
            # No decoder runs, so a child process would protect from nothing.
            return [(item.name, self.convert(item.content, *arguments))]
        row = context.decode(self.modality.name, item.data or b"", *arguments)
        return [(item.name, row)]

    # -- pages -----------------------------------------------------------------------------

    def draw(self, row: np.ndarray) -> np.ndarray:
        """Return what a page shows of a row: an image (H, W, C) or a video (N, H, W, C), uint8.

        By default a grey picture of (T, values): time to the right, the first value at the bottom,
        and dark where values are large.

        Args:
            row: as the model reads it.
        """
        values = row.reshape(len(row), -1)
        columns = min(len(values), MAX_SHOWN_COLUMNS)
        chosen = np.linspace(0, len(values) - 1, columns).round().astype(np.int64)
        picture = values[chosen].T[::-1].astype(np.float32)
        low, high = np.percentile(picture, SHOWN_PERCENTILES)
        shade = np.clip((picture - low) / max(float(high - low), 1e-6), 0, 1)
        return (255 * (1 - shade)).astype(np.uint8)[..., None]


class PixelFiles(ModalityFiles):
    """Base of images and videos: rows of pixels, raw or as JPEG. The options have a ``storage``."""

    dtype = np.uint8

    def shard_fields(self, options: Any) -> list[Any]:
        """Return the column of pixels."""
        name, shape = self.modality.column, self._shape(options)
        if uses_jpeg(shape, options.storage):
            return [jpeg_field(name, shape)]
        return [tensor_field(name, pa.uint8(), shape)]

    def estimate_row_bytes(self, options: Any) -> int:
        """Return the size of a row; a JPEG takes about a sixth of it."""
        shape = self._shape(options)
        raw = int(np.prod(shape))
        return raw // 6 if uses_jpeg(shape, options.storage) else raw

    def build_columns(
        self, block: pa.Table, tokenizer: Any, options: Any, max_bytes: int
    ) -> ColumnArrays:
        """Return the column of pixels, raw or one JPEG per row, and the reasons."""
        shape, storage = self._shape(options), options.storage
        if not uses_jpeg(shape, storage):
            return super().build_columns(block, tokenizer, options, max_bytes)
        rejected: list[str | None] = []
        cells: list[bytes] = []

        def encode(data: bytes, row: int) -> bytes:
            return encode_jpeg(self.read_row(data, None, options))

        for value, reason in decode_rows(block, encode, max_bytes):
            cells.append(value or b"")
            rejected.append(reason)
        reasons = pa.array(rejected, pa.string())
        return {self.modality.column: pa.array(cells, pa.binary()), "rejected": reasons}

    def draw(self, row: np.ndarray) -> np.ndarray:
        """Return the pixels."""
        return row

    def _shape(self, options: Any) -> tuple[int, ...]:
        return tuple(n for n in self.find_shape(options) if n is not None)


def decode_rows(
    block: pa.Table, decode: Callable[[bytes, int], Result], max_bytes: int
) -> Iterator[tuple[Result | None, str | None]]:
    """Yield (result, None) or (None, reason) for each row, with one file in memory at a time.

    Args:
        block: raw rows with a column ``media``.
        decode: maps the bytes of a file and the index of its row to a result.
        max_bytes: a larger file is rejected.
    """

    def read(numbered: tuple[int, bytes | MediaReadError]) -> Result:
        row, data = numbered
        if isinstance(data, MediaReadError):
            raise ValueError(data.reason)
        return decode(data, row)

    yield from decode_each(enumerate(read_media(block["media"], max_bytes)), read)


def largest_divisor(size: int, limit: int = 16) -> int:
    """Return the largest side of a token up to a limit, in pixels, that divides a size."""
    return max(part for part in range(1, limit + 1) if size % part == 0)


__all__ = ["InputContext", "ModalityFiles", "PixelFiles", "PixelStorage", "decode_rows"]
