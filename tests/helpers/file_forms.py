"""The form with which the search page sends a file, and a file for it."""

import io

from PIL import Image
from urllib3.filepost import encode_multipart_formdata


def draw_png() -> bytes:
    """A red picture."""
    picture = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(picture, "PNG")
    return picture.getvalue()


def encode_form(content: bytes, name: str, task: str = "") -> tuple[bytes, str]:
    """Body and content type of the form."""
    return encode_multipart_formdata({"task": task, "file": (name, content)})
