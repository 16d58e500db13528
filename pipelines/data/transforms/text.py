"""Transform of texts: token ids."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.transforms.own_words import find_word_pattern
from skillnet.rust_panics import panics_as_errors

#: Start of the messages about a text.
UNTOKENIZED = "the text cannot be tokenized"
TEXT_TOKENS = 64
CAPTION_TOKENS = 48
CODE_TOKENS = 192
#: A text is cut before it is tokenized: to this number of characters per kept token, and not below
#: the next number. Real tokens are far shorter, so the cut changes no kept token.
MAX_CHARACTERS_PER_TOKEN = 256
MIN_CUT_CHARACTERS = 20_000
#: Texts that are tokenized at once. The library takes a hundred bytes per token until it returns.
BATCH_TEXTS = 2048


def encode_texts(tokenizer: Any, texts: Sequence[str], limit: int) -> pa.ListArray:
    """Tokenize texts; encode unknown tokens as bytes if the tokenizer has byte tokens.

    Args:
        tokenizer: text encoder of the library ``tokenizers``, or a
            :class:`pipelines.data.tokenizer.guarded_loader.BoundedTokenizer`.
        texts: B texts.
        limit: maximum number of tokens of a text.

    Returns:
        list<int32> per text, (B,).

    Raises:
        ValueError: a text is no Unicode, or the tokenizer fails.
    """
    ids = tokenize_texts(tokenizer, texts, limit)
    ends = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(ids), np.int32, count=int(ends[-1]))
    return pa.ListArray.from_arrays(_wrap_int32(ends), _wrap_int32(flat))


def tokenize_texts(tokenizer: Any, texts: Sequence[str], limit: int) -> list[list[int]]:
    """Return the token ids of B texts; see :func:`encode_texts`."""
    # The time of a tokenizer grows with the text, although only the first tokens are kept.
    longest = max(limit * MAX_CHARACTERS_PER_TOKEN, MIN_CUT_CHARACTERS)
    texts = [each[:longest] for each in texts]
    if not is_unicode("".join(texts)):
        for each in texts:
            check_unicode(each)
    # A tokenizer with patterns of its own does this in a child process.
    list_own = getattr(tokenizer, "encode_ids", partial(list_ids, tokenizer))
    found: list[list[int]] = list_own(texts, limit)
    return found


def _wrap_int32(values: np.ndarray) -> pa.Array:
    # pa.array imports pandas, which takes longer than a prediction.
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def list_ids(tokenizer: Any, texts: Sequence[str], limit: int) -> list[list[int]]:
    """Return the token ids of texts; see :func:`encode_texts`.

    Args:
        tokenizer: text encoder of the library ``tokenizers``.
        texts: B texts, already cut.
        limit: maximum number of tokens of a text.

    Raises:
        ValueError: the tokenizer fails.
    """
    # The words of one text, such as of a request, hardly repeat.
    pattern = find_word_pattern(tokenizer) if len(texts) > 1 else None
    if pattern is None:
        return [row[:limit] for row in _list_all_ids(tokenizer, texts)]
    # Twice, because all words at once would take a hundred bytes each.
    words = list({word for each in texts for word in pattern.findall(each)})
    ids = dict(zip(words, _list_all_ids(tokenizer, words), strict=True))
    find = ids.__getitem__
    return [
        list(islice(chain.from_iterable(map(find, pattern.findall(each))), limit)) for each in texts
    ]


def _list_all_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), BATCH_TEXTS):
        batch = texts[start : start + BATCH_TEXTS]
        ids += [row.ids for row in _run_tokenizer(partial(_encode_rows, tokenizer, batch))]
    unknown, first = tokenizer.token_to_id("[UNK]"), tokenizer.token_to_id("<0x00>")
    if unknown is not None and first is not None:
        for index, row in enumerate(ids):
            if unknown in row:
                ids[index] = _encode_unknown(tokenizer, texts[index], unknown, first)
    return ids


def _encode_rows(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    # For a batch the library wakes its threads, which costs more than a short text.
    return [tokenizer.encode(texts[0])] if len(texts) == 1 else tokenizer.encode_batch_fast(texts)


@lru_cache(maxsize=2)
def load_checked_tokenizer(path: str) -> Any:
    """Build the tokenizer of a file of checked JSON, in a child process.

    Args:
        path: file to read.

    Raises:
        ValueError: the library cannot build it.
    """
    from tokenizers import Tokenizer

    try:
        with panics_as_errors("the library cannot build it"):
            return Tokenizer.from_file(path)
    # The library raises a plain Exception for each of its errors.
    except Exception as error:
        raise ValueError(str(error)[:200]) from None


def find_labels(
    texts: Sequence[str], pattern: str, count: Sequence[int] | None = None
) -> list[str | None]:
    """Return the label that a pattern finds in each text, None without a match.

    A pattern of a user can take hours, so this runs in a child process.

    Args:
        texts: B texts.
        pattern: regular expression. The label is the name of the group that matches, else the first
            group, else the match.
        count: least and most number of matches, which is the label then.

    Raises:
        ValueError: it is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"no regular expression ({error})") from None
    if count is not None:
        counts = [sum(1 for _ in compiled.finditer(text)) for text in texts]
        return [_name_count(number, *count) for number in counts]
    matches = map(compiled.search, texts)
    # A label of no characters would be a class without a name.
    return [
        (match and (match.lastgroup or match[min(compiled.groups, 1)])) or None for match in matches
    ]


def _name_count(number: int, least: int, most: int) -> str:
    if number >= most:
        return f"{most} or more"
    return f"{least} or fewer" if number <= least and least else str(number)


def is_unicode(text: str) -> bool:
    """Return whether a text passes :func:`check_unicode`."""
    try:
        check_unicode(text)
    except ValueError:
        return False
    return True


def check_unicode(text: str) -> None:
    """Check that a text has no lone surrogate, which JSON and file names can contain.

    Raises:
        ValueError: it has one; no encoding represents it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])[1:-1]
        raise ValueError(
            f"the text has a lone surrogate ({found}), which is no character"
        ) from None


def encode_captions(
    tokenizer: Any, captions: Sequence[Sequence[str]], limit: int = CAPTION_TOKENS
) -> pa.ListArray:
    """Tokenize the captions of rows.

    Args:
        tokenizer: tokenizer of the corpora.
        captions: captions of B rows.
        limit: maximum number of tokens of a caption.

    Returns:
        list<list<int32>> per row, (B,).
    """
    flat = [caption for row in captions for caption in row]
    tokens = encode_texts(tokenizer, flat, limit)
    ends, end = [0], 0
    for row in captions:
        end += len(row)
        ends.append(end)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), tokens)


def append_keywords(text: str, keywords: Any) -> str:
    """Return a text with its keywords appended, if it has any (option of TNEWS).

    Args:
        text: a sentence.
        keywords: comma-separated keywords, or a value that is not a string.
    """
    return f"{text} {keywords}".strip() if isinstance(keywords, str) else text


def _run_tokenizer(action: Callable[[], Any]) -> Any:
    """Return the result of the tokenizer; raise ValueError if it fails."""
    try:
        with panics_as_errors(UNTOKENIZED):
            return action()
    except ValueError:
        raise
    # The library raises a plain Exception for each of its errors.
    except Exception as error:
        raise ValueError(f"{UNTOKENIZED} ({str(error)[:120]})") from None


def _encode_unknown(tokenizer: Any, text: str, unknown: int, first: int) -> list[int]:
    """Return the token ids of a text, with the bytes of each unknown token."""
    encoded = _run_tokenizer(lambda: tokenizer.encode(text))
    ids: list[int] = []
    for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
        if token == unknown:
            ids += [first + byte for byte in text[start:end].encode("utf-8")]
        else:
            ids.append(token)
    return ids
