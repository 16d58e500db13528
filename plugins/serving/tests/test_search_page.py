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


def test_cards_keep_their_order_and_a_bar_depends_on_its_score_alone():
    for scores, widths in (
        ((0.9, 0.1, -0.4, 1.0000001), [90, 10, 0, 100]),
        ((0.966, 0.964), [97, 96]),
        ((0.966,), [97]),
        ((0.5, 0.5), [50, 50]),
        ((), []),
    ):
        html = render_search_page("x", [ResultCard(1, score, f"card {score}") for score in scores])
        assert re.findall(r"card ([-\d.]+)", html) == [str(score) for score in scores]
        assert [int(width) for width in re.findall(r'style="width:(\d+)%"', html)] == widths
        assert ("No results" in html) == (not scores)


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
