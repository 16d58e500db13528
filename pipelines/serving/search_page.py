"""Search results as one self-contained HTML page: images are embedded, text is escaped.

``skillnet search`` calls :func:`render_search_page`.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skillnet_platform.html_page import render_page

#: Minimum side of a thumbnail. Images are enlarged by an integer factor without interpolation.
THUMBNAIL_PIXELS = 144
#: Columns of a spectrogram at most; the frames of longer audio are sampled evenly.
MAX_SPECTROGRAM_COLUMNS = 400


@dataclass(frozen=True)
class ResultCard:
    """One search result on the page.

    Args:
        rank: from 1.
        score: cosine similarity to the query.
        title: caption, plain text.
        details: further lines, plain text.
        media: image (H, W, C) or video (N, H, W, C) uint8; None for other modalities.
        code: source code or text, or None.
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
    tasks: Sequence[str] = (),
    task: str = "",
    problem: str = "",
) -> str:
    """Return the page as HTML text.

    Args:
        query: plain text of the user.
        cards: results, best first.
        facts: (name, value) pairs about the search.
        credit: authors and licences of the shown data.
        tasks: that a server can search; with them the page has an input box.
        task: the selected one.
        problem: reason why no results are shown.
    """
    # A search without results still writes its page.
    top = max((card.score for card in cards), default=1.0)
    low = min((card.score for card in cards), default=0.0)
    values = {
        "query": query,
        "cards": [(card, _bar_percent(card.score, low, top), _media_uri(card)) for card in cards],
        "facts": list(facts),
        "credit": credit,
        "tasks": list(tasks),
        "task": task,
        "problem": problem,
        "wide": any(card.code is not None for card in cards),
    }
    return render_page("search.html", values, package="pipelines.serving")


def media_data_uri(media: np.ndarray, side: int = THUMBNAIL_PIXELS) -> str:
    """Return an image as PNG, or a video as animated PNG, in a data URI.

    Args:
        media: image (H, W, C) or video (N, H, W, C) uint8.
        side: minimum side in pixels.
    """
    from PIL import Image

    frames = media[None] if media.ndim == 3 else media
    factor = max(-(-side // frames.shape[1]), 1)
    images = [
        # Pillow has no images with a channel axis of length 1.
        Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame).resize(
            (frame.shape[1] * factor, frame.shape[0] * factor), Image.Resampling.NEAREST
        )
        for frame in frames
    ]
    buffer = io.BytesIO()
    if len(images) == 1:
        images[0].save(buffer, "PNG", optimize=True)
    else:
        # Each frame is shown for 220 ms; the last one for 1.4 s, before the animation restarts.
        durations_ms = [220] * (len(images) - 1) + [1400]
        images[0].save(
            buffer, "PNG", save_all=True, append_images=images[1:], duration=durations_ms, loop=0
        )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def draw_log_mel(mel_TM: np.ndarray) -> np.ndarray:
    """Return audio as a grey image, dark where it is loud, with low frequencies at the bottom.

    Args:
        mel_TM: log-mel frames (T, mels).

    Returns:
        Image (mels, columns, 1) uint8.
    """
    columns = min(len(mel_TM), MAX_SPECTROGRAM_COLUMNS)
    chosen = np.linspace(0, len(mel_TM) - 1, columns).round().astype(np.int64)
    picture = mel_TM[chosen].T[::-1].astype(np.float32)
    # Percentiles ignore single loud bins.
    low, high = np.percentile(picture, (1, 99))
    shade = np.clip((picture - low) / max(float(high - low), 1e-6), 0, 1)
    return (255 * (1 - shade)).astype(np.uint8)[..., None]


def _bar_percent(score: float, low: float, top: float) -> int:
    """Return the length of a score's bar, in per cent."""
    # Cosines of good results are close together, so the bars show the range of this list. The last
    # bar stays visible.
    return 100 if top <= low else round(15 + 85 * (score - low) / (top - low))


def _media_uri(card: ResultCard) -> str:
    return "" if card.media is None else media_data_uri(card.media)
