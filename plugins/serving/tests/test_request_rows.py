"""Requests are checked before Python builds objects of them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skillnet_platform.errors import UserError
from skillnet_serving.server import request_rows
from skillnet_serving.server.request_rows import read_prediction_request, read_search_request

MIB = 2**20


@pytest.mark.parametrize(
    "body",
    [
        b'{"query": [' + b"[]," * MIB + b"[]]}",
        b"{" + b",".join(b'"%d":0' % number for number in range(MIB // 8)) + b"}",
        b'{"query": ' + b" " * MIB + b'"a"}',
        b'""' * MIB,
        b'{"query": "a", "top": ' + b"1" * MIB + b"}",
        b"[" * MIB,
    ],
    ids=["lists", "keys", "blanks", "strings", "number", "depth"],
)
def test_a_request_of_many_values_is_refused_before_it_is_parsed(body, monkeypatch):
    def parse(*given: Any, **options: Any) -> None:
        raise AssertionError("it is parsed")

    monkeypatch.setattr(request_rows.json, "loads", parse)
    for read in (read_search_request, lambda body: read_prediction_request(body, 64)):
        with pytest.raises(UserError, match="bytes outside of its texts"):
            read(body)


NASTY = st.text(st.sampled_from('"\\[]{},:\n心/') | st.characters(codec="utf-8"), max_size=40)


@given(NASTY, st.booleans(), st.sampled_from([None, 4]))
def test_any_text_may_be_in_a_request(text: str, is_ascii: bool, indent: int | None) -> None:
    document = {"rows": [{"text": f"a{text * 200}"}, {"text": f"{text}\\"}], "top": 3}
    body = json.dumps(document, ensure_ascii=is_ascii, indent=indent).encode()
    found = read_prediction_request(body, 2)
    assert [row.item and row.item.text for row in found.rows] == [f"a{text * 200}", f"{text}\\"]


@given(st.binary(max_size=60) | st.lists(st.sampled_from(b'"\\{}[]:,a1 '), max_size=60).map(bytes))
def test_no_bytes_end_in_anything_but_a_message(body: bytes) -> None:
    for read in (read_search_request, lambda body: read_prediction_request(body, 3)):
        try:
            read(body)
        except UserError:
            continue


def test_a_row_may_be_indented() -> None:
    rows = [{"text": f"{number}", "task": "a", "keywords": "b"} for number in range(1000)]
    assert (
        len(read_prediction_request(json.dumps({"rows": rows}, indent=8).encode(), 1000).rows)
        == 1000
    )
