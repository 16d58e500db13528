"""The search page: no external resources, escaped text, thumbnails that decode."""

import base64
import io
import re

import numpy as np
from PIL import Image

from skillnet_serving.retrieval import search_page
from skillnet_serving.retrieval.search_page import (
    QueryPreview,
    ResultCard,
    media_data_uri,
    render_search_page,
)

HOSTILE = '<script>alert("1")</script> & "红色的心"\''


def test_all_text_is_escaped():
    card = ResultCard(1, 0.5, HOSTILE, details=[HOSTILE], code=HOSTILE, media=None)
    html = render_search_page(HOSTILE, [card], facts=[(HOSTILE, HOSTILE)], credit=HOSTILE)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 8  # title, heading, fact twice, card thrice, credit
    assert "红色的心" in html


def test_text_cannot_end_an_attribute():
    picture = np.zeros((4, 4, 3), np.uint8)
    html = render_search_page("x", [ResultCard(1, 0.5, 'a" onerror="alert(1)', media=picture)])
    assert 'onerror="alert' not in html


def test_the_page_has_no_external_resources():
    picture = np.zeros((4, 4, 3), np.uint8)
    html = render_search_page("心", [ResultCard(1, 0.5, "心", media=picture)])
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "default-src 'none'" in html


def test_an_image_keeps_its_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    image = Image.open(io.BytesIO(base64.b64decode(media_data_uri(picture).partition(",")[2])))
    assert image.size == (144, 144)
    np.testing.assert_array_equal(np.asarray(image)[1::3, 1::3], picture)


def test_a_video_keeps_its_frames():
    clip = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 1), dtype=np.uint8)
    image = Image.open(io.BytesIO(base64.b64decode(media_data_uri(clip).partition(",")[2])))
    assert image.n_frames == 8
    for number in range(8):
        image.seek(number)
        np.testing.assert_array_equal(
            np.asarray(image.convert("L"))[2::5, 2::5], clip[number, ..., 0]
        )


def test_cards_keep_their_order_and_bars_follow_scores():
    scores = (0.9, 0.1, -0.4, 1.0000001)
    cards = [ResultCard(1, score, f"card {score}") for score in scores]
    html = render_search_page("x", cards)
    assert html.index("card 0.9") < html.index("card 0.1")
    assert bar_widths(html) == [90, 10, 0, 100]


def test_a_bar_does_not_depend_on_the_other_results():
    for scores in ((0.966, 0.964), (0.966, 0.1), (0.966,)):
        html = render_search_page("x", [ResultCard(1, score, "a") for score in scores])
        assert bar_widths(html) == [round(100 * score) for score in scores]


def bar_widths(html: str) -> list[int]:
    return [int(width) for width in re.findall(r'style="width:(\d+)%"', html)]


def test_no_results_and_equal_scores():
    assert "No results" in render_search_page("x", [])
    html = render_search_page("x", [ResultCard(1, 0.5, "a"), ResultCard(2, 0.5, "b")])
    assert bar_widths(html) == [50, 50]


def test_a_recording_as_the_query_can_be_played(monkeypatch):
    shown = QueryPreview("sound", np.zeros((8, 8, 1), np.uint8), recording=b"RIFF")
    tasks = {"text": ["sound_to_text"], "sound": ["sound_to_text"]}
    html = render_search_page("a.wav", [], tasks=tasks, task="sound_to_text", preview=shown)
    assert '<audio controls src="data:audio/wav;base64,UklGRg=="' in html
    assert "media-src data:" in html
    assert 'value=""' in html
    monkeypatch.setattr(search_page, "MAX_PLAYER_BYTES", 3)
    html = render_search_page("a.wav", [], tasks=tasks, preview=shown)
    assert ("<audio" in html, "<img" in html) == (False, True)


def test_inputs_follow_the_tasks():
    html = render_search_page("", [], tasks={"image": ["twins"]})
    assert ('name="query"' in html, 'name="file"' in html) == (False, True)
    assert ".png" in html
    assert ".wav" not in html
    assert "<form" not in render_search_page("x", [])
