"""Pictures and clips kept as JPEG in the shards, decoded when a batch is made.

A raw row of 224 x 224 pixels takes 150 KB, as JPEG 10 to 30. Up to ``RAW_BYTES`` a row is kept
raw: reading it costs nothing. Beyond, a corpus would soon be larger than memory and then than the
disk, and to decode a row takes less than a millisecond.

A row is one grey or coloured JPEG. A clip of F frames of H x W is a strip of them, F * H high.
"""

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.shards.row_threads import map_row_slices
from skillnet_platform.errors import UserError

PixelStorage = Literal["auto", "raw", "encoded"]

#: Rows of up to so many bytes are kept raw, unless the user says otherwise.
MAX_RAW_BYTES = 64 * 1024
QUALITY = 90
#: JPEG knows no longer side.
MAX_JPEG_SIDE = 65_535
#: Key of a field's metadata, and its only value today.
ENCODING, JPEG = b"encoding", b"jpeg"


def uses_jpeg(shape: Sequence[int], storage: PixelStorage) -> bool:
    """Whether rows of that shape (uint8) are kept as JPEG.

    Raises:
        ValueError: they shall be, and are too high for it.
    """
    if storage == "raw":
        return False
    fits = int(np.prod(shape[:-2])) <= MAX_JPEG_SIDE
    if storage == "encoded" and not fits:
        raise ValueError(
            f"storage encoded: a strip of {shape[0]} frames of {shape[1]} lines is higher than "
            f"{MAX_JPEG_SIDE}, which JPEG allows; take fewer or smaller frames, or storage raw"
        )
    return storage == "encoded" or (fits and int(np.prod(shape)) > MAX_RAW_BYTES)


def jpeg_field(name: str, shape: Sequence[int]) -> pa.Field:
    """The column of rows of that shape, (H, W, 3) or (F, H, W, 1)."""
    text = "[" + ",".join(str(length) for length in shape) + "]"
    return pa.field(name, pa.binary(), metadata={b"shape": text.encode(), ENCODING: JPEG})


def encode_jpeg(row: NDArray[np.uint8]) -> bytes:
    """A picture (H, W, 3) or clip (F, H, W, 1) as JPEG. Equal rows, equal bytes."""
    from PIL import Image

    flat = row if row.shape[-1] == 3 else row.reshape(-1, row.shape[-2])
    target = io.BytesIO()
    Image.fromarray(flat).save(target, "JPEG", quality=QUALITY)
    return target.getvalue()


def decode_jpegs(cells: Sequence[Any], shape: Sequence[int], where: str = "") -> NDArray[np.uint8]:
    """(len(cells), *shape) pixels of encoded rows, by several threads.

    Args:
        cells: bytes, or buffers of them.
        shape: of a row.
        where: names the column in messages.

    Raises:
        UserError: a cell is no JPEG of that shape.
    """
    out: NDArray[np.uint8] = np.empty((len(cells), *shape), np.uint8)

    def some(span: slice) -> None:
        for cell, row in zip(cells[span], out[span], strict=True):
            _into(cell, row, where)

    map_row_slices(len(cells), some)
    return out


def _into(cell: Any, row: NDArray[np.uint8], where: str) -> None:
    from PIL.JpegImagePlugin import JpegImageFile

    mode, width = ("RGB" if row.shape[-1] == 3 else "L"), row.shape[-2]
    try:
        image = JpegImageFile(io.BytesIO(cell))
        if (
            image.mode == mode
            and image.width == width
            and image.height * width * len(image.getbands()) == row.size
        ):
            row[...] = np.frombuffer(image.tobytes(), np.uint8).reshape(row.shape)
            return
    except (OSError, SyntaxError):
        raise UserError(f"{where}: a row is no JPEG; prepare the corpus again") from None
    raise UserError(
        f"{where}: a row holds {image.mode} pixels, {image.width} x {image.height}, the column "
        f"says {row.shape}; prepare the corpus again"
    )
