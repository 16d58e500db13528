"""Search results as one self-contained HTML page: images are embedded, text is escaped.

``skillnet search`` and ``skillnet serve`` call :func:`render_search_page`. The page has no script:
forms send text and files, and browsers accept a dropped file on a file input.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from pipelines.serving.inputs import PredictionItem, list_suffixes
from skillnet.modality import find_modality
from skillnet_platform.html_page import render_page

#: Minimum side of a thumbnail. Images are enlarged by an integer factor without interpolation.
THUMBNAIL_PIXELS = 144
#: Bytes of a text or code that the page shows as the query.
MAX_PREVIEW_BYTES = 4000
#: Largest recording that the page plays; a longer one is shown only.
MAX_PLAYER_BYTES = 4 * 2**20
#: What a score is.
COSINE = "cosine similarity, not a probability"
PROBABILITY = "probability by the model"
#: Suffix of an audio file -> its MIME type below ``audio``; others are ``mpeg``.
AUDIO_TYPES = {
    ".wav": "wav",
    ".flac": "flac",
    ".ogg": "ogg",
    ".opus": "ogg",
    ".m4a": "mp4",
    ".aac": "aac",
}


@dataclass(frozen=True)
class ResultCard:
    """One search result on the page.

    Args:
        rank: from 1.
        score: cosine similarity to the query, or probability of an answer.
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


@dataclass(frozen=True)
class QueryPreview:
    """A file as the query, as the page shows it.

    Args:
        modality: medium of the file.
        media: image (H, W, C) or video (N, H, W, C) uint8; None for text and code.
        code: text or source code, or None.
        recording: bytes of an audio file for a player, or None.
    """

    modality: str
    media: np.ndarray | None = None
    code: str | None = None
    recording: bytes | None = None


def render_search_page(
    query: str,
    cards: Sequence[ResultCard],
    facts: Sequence[tuple[str, str]] = (),
    credit: str = "",
    tasks: Mapping[str, Sequence[str]] = MappingProxyType({}),
    task: str = "",
    problem: str = "",
    preview: QueryPreview | None = None,
    measure: str = COSINE,
) -> str:
    """Return the page as HTML text.

    Args:
        query: plain text of the user.
        cards: results, best first.
        facts: (name, value) pairs about the search.
        credit: authors and licences of the shown data.
        tasks: modality of queries -> tasks that a server offers; with them the page has an
            input box and a file input.
        task: the selected one.
        problem: reason why no results are shown.
        preview: picture or player of a file as the query.
        measure: what the scores are.
    """
    values = {
        "query": query,
        "cards": [(card, _bar_percent(card.score), _media_uri(card)) for card in cards],
        "facts": list(facts),
        "credit": credit,
        "tasks": tasks,
        "suffixes": [suffix for each in tasks for suffix in list_suffixes(each)],
        "task": task,
        "problem": problem,
        "wide": any(card.code is not None for card in cards),
        "preview": preview,
        "measure": measure,
        # A search by file goes by the type of the next file.
        "chosen": task if measure == PROBABILITY else "",
        "preview_uri": "" if preview is None else _media_uri(preview),
        "recording_uri": "" if preview is None else _recording_uri(preview, query),
    }
    return render_page("search.html", values, package="skillnet_serving")


def preview_query(
    query: PredictionItem, query_row: np.ndarray, modality: str
) -> QueryPreview | None:
    """Return what the page shows of a file as the query; None for a text.

    Args:
        query: text or file of the user.
        query_row: the query as the model reads it: decoded in the guard, and small.
        modality: medium of the query.
    """
    if query.data is None:
        return None
    found = find_modality(modality)
    if found.reads_tokens:
        text = query.data[:MAX_PREVIEW_BYTES].decode("utf-8-sig", "ignore")
        return QueryPreview(modality, code=text)
    recording = query.data if found.file_half.is_played else None
    return QueryPreview(modality, found.file_half.draw(query_row), recording=recording)


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


def _bar_percent(score: float) -> int:
    """Return the length of a cosine's bar, in per cent: equal scores have equal bars anywhere."""
    return round(100 * min(max(score, 0.0), 1.0))


def _media_uri(shown: ResultCard | QueryPreview) -> str:
    return "" if shown.media is None else media_data_uri(shown.media)


def _recording_uri(preview: QueryPreview, name: str) -> str:
    if preview.recording is None or len(preview.recording) > MAX_PLAYER_BYTES:
        return ""
    # Chromium looks at the bytes as well, but plays nothing of an unknown type.
    kind = AUDIO_TYPES.get(Path(name).suffix.lower(), "mpeg")
    return f"data:audio/{kind};base64,{base64.b64encode(preview.recording).decode()}"
