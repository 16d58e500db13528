"""A search result as one HTML page that needs nothing else: pictures inside, text escaped."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

#: Thumbnails are enlarged by whole factors to at least this many pixels a side, edges kept hard.
THUMBNAIL = 144


@dataclass(frozen=True)
class Card:
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


def page(
    query: str,
    cards: Sequence[Card],
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
    wide = any(card.code is not None for card in cards)
    body = "\n".join(_card(card, low, top) for card in cards)
    listed = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    footer = f"<footer>{escape(credit)}</footer>" if credit else ""
    empty = "" if cards else "<p>Nothing was found.</p>"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(query)} · SkillNet search</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="what">SkillNet search</p>
<h1 lang="zh">{escape(query)}</h1>
<dl>{listed}</dl>
</header>
<main>{empty}
<ol class="{"wide" if wide else "grid"}">
{body}
</ol>
</main>
{footer}
</body>
</html>
"""


def data_uri(media: np.ndarray, side: int = THUMBNAIL) -> str:
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


def _card(card: Card, low: float, top: float) -> str:
    share = 100 if top <= low else round(15 + 85 * (card.score - low) / (top - low))
    picture = ""
    if card.media is not None:
        picture = f'<img src="{data_uri(card.media)}" alt="{escape(card.title)}">'
    code = ""
    if card.code is not None:
        code = f'<pre tabindex="0"><code>{escape(card.code)}</code></pre>'
    details = "".join(f"<p>{escape(line)}</p>" for line in card.details)
    return f"""<li>
{picture}
<div class="words">
<h2 lang="zh">{escape(card.title)}</h2>
<div class="score" title="cosine similarity, not a probability">
<span class="bar"><span style="width:{share}%"></span></span>
<span>{card.score:.3f}</span></div>
{details}
</div>
{code}
<span class="rank">{card.rank}</span>
</li>"""


STYLE = """
:root { color-scheme: light dark; --ink: #1c1d21; --soft: #666b75; --page: #f6f6f4;
 --card: #fff; --line: #e2e2de; --mark: #2f6f5e; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececea; --soft: #a0a4ad;
 --page: #17181b; --card: #212327; --line: #34373d; --mark: #6fc3a9; } }
* { box-sizing: border-box; margin: 0; }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
 color: var(--ink); background: var(--page); max-width: 1120px; margin: 0 auto;
 padding: 32px 20px; }
.what { color: var(--soft); font-size: 13px; }
h1 { font-size: 30px; line-height: 1.3; overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 10px 0 24px; font-size: 13px; }
dl div { display: flex; gap: 6px; min-width: 0; }
dt { color: var(--soft); }
dd { overflow-wrap: anywhere; }
ol { list-style: none; padding: 0; display: grid; gap: 14px; }
.grid { grid-template-columns: repeat(auto-fill, minmax(184px, 1fr)); }
li { position: relative; background: var(--card); border: 1px solid var(--line);
 border-radius: 10px; overflow: hidden; min-width: 0; }
img { display: block; width: 144px; height: 144px; margin: 18px auto 6px; object-fit: contain;
 image-rendering: pixelated; background: #fff; border-radius: 6px; }
.words { padding: 10px 14px 14px; }
h2 { font-size: 16px; line-height: 1.4; overflow-wrap: anywhere; }
.wide h2 { padding-left: 34px; }
.words p { font-size: 12.5px; color: var(--soft); overflow-wrap: anywhere; }
.score { display: flex; align-items: center; gap: 8px; font-size: 12.5px; color: var(--soft);
 font-variant-numeric: tabular-nums; margin: 4px 0; }
.bar { flex: 1; max-width: 220px; height: 5px; border-radius: 3px; background: var(--line); }
.bar span { display: block; height: 100%; border-radius: 3px; background: var(--mark); }
.rank { position: absolute; top: 10px; left: 10px; min-width: 24px; padding: 0 6px;
 text-align: center; font-size: 12.5px; line-height: 22px; border-radius: 11px;
 background: var(--page); border: 1px solid var(--line); color: var(--soft); }
pre { font: 12.5px/1.5 ui-monospace, "SFMono-Regular", Consolas, "DejaVu Sans Mono", monospace;
 padding: 12px 14px; border-top: 1px solid var(--line); overflow: auto; max-height: 320px; }
footer { margin-top: 28px; font-size: 12.5px; color: var(--soft); }
"""
