"""JPEG encoding of images and videos in shards; a row is decoded when a batch is made.

A raw row of 224 x 224 pixels takes 150 KB, as JPEG 10 to 30 KB. Rows up to ``MAX_RAW_BYTES`` stay
raw, because reading them costs nothing. With larger raw rows a corpus would soon exceed the memory
and then the disk, while decoding a row takes less than a millisecond.

A row is one grey or coloured JPEG. A video of F frames of H x W is a strip of them, F * H high.
"""

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.shards.row_threads import map_row_slices
from skillnet_platform.errors import UserError

PixelStorage = Literal["auto", "raw", "encoded"]

#: Rows up to this number of bytes stay raw with the storage "auto".
MAX_RAW_BYTES = 64 * 1024
QUALITY = 90
#: Pixels; the JPEG format allows no longer side.
MAX_JPEG_SIDE = 65_535
#: Key of a field's metadata, and its only value.
ENCODING, JPEG = b"encoding", b"jpeg"


def uses_jpeg(shape: Sequence[int], storage: PixelStorage) -> bool:
    """Return whether rows of a shape are stored as JPEG.

    Args:
        shape: (H, W, 3), or (F, H, W, 1 or 3) of uint8 rows.
        storage: option of the corpus.

    Raises:
        ValueError: the storage is "encoded", and the rows are too high for JPEG.
    """
    if storage == "raw":
        return False
    fits = int(np.prod(shape[:-2])) <= MAX_JPEG_SIDE
    if storage == "encoded" and not fits:
        raise ValueError(
            f"storage encoded: a strip of {shape[0]} frames of {shape[1]} lines is higher than "
            f"{MAX_JPEG_SIDE}, the limit of JPEG; use fewer or smaller frames, or storage raw"
        )
    return storage == "encoded" or (fits and int(np.prod(shape)) > MAX_RAW_BYTES)


def jpeg_field(name: str, shape: Sequence[int]) -> pa.Field:
    """Return the Arrow field of a JPEG column.

    Args:
        name: name of the column.
        shape: shape of a row, (H, W, 3) or (F, H, W, 1 or 3).
    """
    text = "[" + ",".join(str(length) for length in shape) + "]"
    return pa.field(name, pa.binary(), metadata={b"shape": text.encode(), ENCODING: JPEG})


def encode_jpeg(row: NDArray[np.uint8]) -> bytes:
    """Encode an image (H, W, 3) or video (F, H, W, 1 or 3) as JPEG. Equal rows give equal bytes."""
    from PIL import Image

    # JPEG is two-dimensional: the frames of a video are stacked vertically.
    strip = (-1, row.shape[-2], 3) if row.shape[-1] == 3 else (-1, row.shape[-2])
    flat = row.reshape(strip)
    target = io.BytesIO()
    Image.fromarray(flat).save(target, "JPEG", quality=QUALITY)
    return target.getvalue()


def decode_jpegs(cells: Sequence[Any], shape: Sequence[int], where: str = "") -> NDArray[np.uint8]:
    """Decode rows in several threads.

    Args:
        cells: bytes or buffers of JPEG files.
        shape: shape of a row.
        where: name of the column in messages.

    Returns:
        uint8 (len(cells), *shape).

    Raises:
        UserError: a cell is not a JPEG of that shape.
    """
    out: NDArray[np.uint8] = np.empty((len(cells), *shape), np.uint8)

    def decode_rows(span: slice) -> None:
        for cell, row in zip(cells[span], out[span], strict=True):
            _decode_into(cell, row, where)

    map_row_slices(len(cells), decode_rows)
    return out


def _decode_into(cell: Any, row: NDArray[np.uint8], where: str) -> None:
    from PIL.JpegImagePlugin import JpegImageFile

    mode, width = ("RGB" if row.shape[-1] == 3 else "L"), row.shape[-2]
    try:
        # The class is called directly: ``Image.open`` would probe other formats.
        image = JpegImageFile(io.BytesIO(cell))
        if (
            image.mode == mode
            and image.width == width
            and image.height * width * len(image.getbands()) == row.size
        ):
            row[...] = np.frombuffer(image.tobytes(), np.uint8).reshape(row.shape)
            return
    except (OSError, SyntaxError):
        raise UserError(f"{where}: a row is not a JPEG; prepare the corpus again") from None
    raise UserError(
        f"{where}: a row holds {image.mode} pixels, {image.width} x {image.height}, the column "
        f"declares {row.shape}; prepare the corpus again"
    )
