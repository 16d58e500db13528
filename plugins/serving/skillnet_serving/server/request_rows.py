"""Requests of ``skillnet serve``: the body is checked before Python builds objects of it.

:mod:`skillnet_serving.server.http_server` calls :func:`read_prediction_request`,
:func:`read_search_request` and :func:`read_search_form`.
"""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipelines.data.transforms.text import check_unicode
from pipelines.serving.inputs import (
    REQUEST_ROW_KEYS,
    InputRow,
    PredictionItem,
    decode_file,
    named_errors,
    parse_request_row,
    parse_row,
)
from pipelines.serving.predictor import DEFAULT_TOP
from skillnet_platform.errors import UserError

#: Seconds for an answer without a limit of the server.
DEFAULT_SECONDS = 60.0
#: Bytes of a request outside of its strings: of all of it, and for each row. Python's parser takes
#: 200 times as much memory for lists in lists as for strings, and stops all threads meanwhile.
MAX_STRUCTURE_BYTES, MAX_ROW_STRUCTURE_BYTES = 2**16, 256
#: Characters of a string, without its end; one match is short.
_CHARACTERS = re.compile(rb'(?:[^"\\]++|\\.){0,65536}+', re.DOTALL)
#: Alternatives that a request may ask for.
MAX_TOP = 100
#: Characters of a text that a search ranks for; an encoder reads fewer tokens.
MAX_QUERY_LENGTH = 1000
#: Bytes of the headers and of the short fields of a form.
MAX_FIELD_BYTES = 2**18


@dataclass(frozen=True)
class PredictionRequest:
    """Request of ``POST /v1/predict``.

    Args:
        rows: usable and unusable ones, in the order of the request.
        top: number of alternatives.
        has_embeddings: whether answers with captions have the embedding of their row.
        client: that sent the request; clients share a replica.
        seconds: that the answer may take.
        manifest_ns: time of the oldest state of the model's folder that may answer.
    """

    rows: list[InputRow]
    top: int = DEFAULT_TOP
    has_embeddings: bool = False
    client: str = ""
    seconds: float = DEFAULT_SECONDS
    manifest_ns: int = 0


@dataclass(frozen=True)
class SearchRequest:
    """Request of ``POST /v1/search``, or of the search page.

    Args:
        query: text or file to rank rows for.
        task: retrieval task; None takes the first one that reads the query.
        top: number of results.
        is_page: whether the answer is a page, which also has the answers of other tasks.
        client: that sent the request; clients share a replica.
        seconds: that the answer may take.
        manifest_ns: time of the oldest state of the model's folder that may answer.
    """

    query: PredictionItem
    task: str | None = None
    top: int = 12
    is_page: bool = False
    client: str = ""
    seconds: float = DEFAULT_SECONDS
    manifest_ns: int = 0


def read_prediction_request(body: bytes, max_rows: int) -> PredictionRequest:
    """Return the request of a JSON body: ``{"rows": [{"text": …}], "top": 5}``.

    ``"embeddings": true`` asks for the embedding of each row that a retrieval task reads.

    Args:
        body: bytes of the request, without its head.
        max_rows: more rows are rejected.

    Raises:
        UserError: the body is not such a request.
    """
    document = _read_object(body, {"rows", "top", "embeddings"}, max_rows)
    rows = document.get("rows")
    if not isinstance(rows, list) or not rows:
        raise UserError('rows: expected a list such as [{"text": "…"}]')
    if len(rows) > max_rows:
        raise UserError(
            f"rows: {len(rows)} rows, at most {max_rows} are allowed; send them in parts"
        )
    parsed = [parse_request_row(row, number) for number, row in enumerate(rows)]
    has_embeddings = document.get("embeddings", False)
    if not isinstance(has_embeddings, bool):
        raise UserError("embeddings: expected true or false")
    return PredictionRequest(parsed, _read_top(document, DEFAULT_TOP), has_embeddings)


def read_search_request(body: bytes) -> SearchRequest:
    """Return the request of a JSON body: ``{"query": "…", "task": "text_to_image", "top": 12}``.

    Instead of the text ``query``, a request may have a ``file`` in base64 and its ``name``.

    Args:
        body: bytes of the request, without its head.

    Raises:
        UserError: the body is not such a request.
    """
    keys = ("query", "file", "name", "task")
    document = _read_object(body, {*keys, "top"})
    query, file, name, task = (document.get(key) for key in keys)
    for key in keys:
        if not isinstance(document.get(key), str | None):
            raise UserError(f"{key} must be a string")
    if (query is None) == (file is None):
        raise UserError("give either query or file, as a string")
    top = _read_top(document, SearchRequest.top)
    if query is not None:
        return build_search_request(query, task, top)
    with named_errors("file"):
        item = parse_row({"file": file, "name": name}, REQUEST_ROW_KEYS, decode_file, "file")
    item = replace(item, where="file")
    return SearchRequest(item, task or None, top)


def read_search_form(content_type: str, body: bytes) -> SearchRequest:
    """Return the request of the search page's form: a ``file``, and a ``task`` or an empty one.

    Args:
        content_type: ``multipart/form-data`` with its boundary.
        body: bytes of the request, without its head.

    Raises:
        UserError: the body is not such a form, or has no file.
    """
    from werkzeug.exceptions import RequestEntityTooLarge
    from werkzeug.formparser import FormDataParser
    from werkzeug.http import parse_options_header

    parser = FormDataParser(
        # The body is in memory already; a temporary file would copy it to the disk.
        stream_factory=lambda *_, **__: io.BytesIO(),
        max_form_memory_size=MAX_FIELD_BYTES,
        max_form_parts=len(("file", "task")),
        silent=False,
    )
    kind, options = parse_options_header(content_type)
    try:
        _, fields, files = parser.parse(io.BytesIO(body), kind, len(body), options)
    except (ValueError, RequestEntityTooLarge):
        raise UserError("the form is damaged; send a file, and optionally a task") from None
    sent = files.get("file")
    content = b"" if sent is None else sent.read()
    if sent is None or not content:
        raise UserError("file: no file, or an empty one; choose another file")
    item = PredictionItem(sent.filename or "file", data=content, where=sent.filename or "file")
    return SearchRequest(item, fields.get("task") or None, is_page=True)


def build_search_request(
    query: str, task: str | None, top: int = SearchRequest.top
) -> SearchRequest:
    """Return a checked request.

    Args:
        query: text of the user.
        task: retrieval task, or None.
        top: number of results.

    Raises:
        UserError: the text is empty or too long.
    """
    query = query.strip()
    if not query:
        raise UserError("query: the text is empty")
    if len(query) > MAX_QUERY_LENGTH:
        raise UserError(f"query: {len(query)} characters, at most {MAX_QUERY_LENGTH} are allowed")
    return SearchRequest(PredictionItem(query, text=query, where="query"), task or None, top)


def _check_structure(body: bytes, most: int) -> None:
    """Check that a JSON text has few bytes outside of its strings.

    Raises:
        UserError: it has more than the limit.
    """
    found = end = 0
    while (start := body.find(b'"', end)) >= 0:
        found += start - end + len(b'""')
        if found > most:
            break
        end = start + 1
        while (match := _CHARACTERS.match(body, end)) and match.end() > end:
            end = match.end()
        end += 1
    else:
        found += max(len(body) - end, 0)
    if found > most:
        raise UserError(
            f"the request has more than {most} bytes outside of its texts. Send fewer rows, "
            "without other values than strings"
        )


def _read_object(body: bytes, keys: set[str], rows: int = 1) -> dict[str, Any]:
    _check_structure(body, MAX_STRUCTURE_BYTES + MAX_ROW_STRUCTURE_BYTES * rows)
    try:
        document = json.loads(body.decode("utf-8"))
        # JSON can escape half a character, which no answer could contain.
        check_unicode(json.dumps(document, ensure_ascii=False))
    except UnicodeDecodeError:
        raise UserError("the request is not UTF-8") from None
    # json raises RecursionError for deeply nested input.
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request is not JSON ({error})") from None
    if not isinstance(document, dict):
        raise UserError("the request is no JSON object")
    if unknown := sorted(document.keys() - keys):
        raise UserError(f"unknown key {unknown[0]!r}; use {', '.join(sorted(keys))}")
    return document


def _read_top(document: Mapping[str, Any], default: int) -> int:
    top = document.get("top", default)
    if not isinstance(top, int) or isinstance(top, bool) or not 1 <= top <= MAX_TOP:
        raise UserError(f"top: expected a number from 1 to {MAX_TOP}")
    return top
