"""A search result as one HTML page that needs nothing else: pictures inside, text escaped."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skillnet_platform.html_page import render_page

#: Thumbnails are enlarged by whole factors to at least this many pixels a side, edges kept hard.
THUMBNAIL_PIXELS = 144


@dataclass(frozen=True)
class ResultCard:
    """One result.

    Args:
        rank: from 1.
        score: cosine similarity to the query.
        title: its name, plain text.
        details: further lines, plain text.
        media: the picture or clip as an array, (H, W, 3) or (N, H, W, C) uint8, or none.
        code: source text, shown as it is, or none.
    """

    rank: int
    score: float
    title: str
    details: Sequence[str] = ()
    media: np.ndarray | None = None
    code: str | None = None


def render_search_page(
    query: str,
    cards: Sequence[ResultCard],
    facts: Sequence[tuple[str, str]] = (),
    credit: str = "",
) -> str:
    """The page as text.

    Args:
        query: what was searched for, plain text from the user.
        cards: results, best first.
        facts: name and value of what the reader may want to know of the search.
        credit: who made what is shown, and its licence.
    """
    top = max((card.score for card in cards), default=1.0)
    low = min((card.score for card in cards), default=0.0)
    values = {
        "query": query,
        "cards": [(card, _share(card.score, low, top), _picture(card)) for card in cards],
        "facts": list(facts),
        "credit": credit,
        "wide": any(card.code is not None for card in cards),
    }
    return render_page("search.html", values, package="pipelines.serving.mlflow_model")


def media_data_uri(media: np.ndarray, side: int = THUMBNAIL_PIXELS) -> str:
    """A picture (H, W, 3) as PNG or a clip (N, H, W, C) as animated PNG, inside a data URI.

    A clip ends with a pause on its last frame and starts again.
    """
    from PIL import Image

    frames = media[None] if media.ndim == 3 else media
    factor = max(-(-side // frames.shape[1]), 1)
    images = [
        Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame).resize(
            (frame.shape[1] * factor, frame.shape[0] * factor), Image.Resampling.NEAREST
        )
        for frame in frames
    ]
    buffer = io.BytesIO()
    if len(images) == 1:
        images[0].save(buffer, "PNG", optimize=True)
    else:
        waits = [220] * (len(images) - 1) + [1400]
        images[0].save(
            buffer, "PNG", save_all=True, append_images=images[1:], duration=waits, loop=0
        )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _share(score: float, low: float, top: float) -> int:
    """Length of a score's bar, in per cent."""
    return 100 if top <= low else round(15 + 85 * (score - low) / (top - low))


def _picture(card: ResultCard) -> str:
    return "" if card.media is None else media_data_uri(card.media)
