"""Tokenizer whose patterns nobody knows: it runs in a child process, with a limit of time.

The library matches patterns by backtracking. A pattern of thirty characters can take hours for one
line, and no check of its syntax finds all of them.
:func:`pipelines.data.tokenizer.guarded_loader.parse_tokenizer` returns a :class:`BoundedTokenizer`
for a file with a pattern of its own, and :func:`pipelines.data.transforms.text.encode_texts` asks
it for ids.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.data.transforms.decode_guard import describe_timeout
from pipelines.data.transforms.decoder_process import decode_media
from pipelines.data.transforms.text import UNTOKENIZED

#: Seconds for the texts of one request, which takes milliseconds with any known tokenizer.
SECONDS = 10.0
#: Characters of one request; a longer text is a request by itself.
REQUEST_CHARACTERS = 1 << 20
#: Parts of a tokenizer that change or divide texts, and hold patterns.
TEXT_PARTS = ("normalizer", "pre_tokenizer", "decoder")


class BoundedTokenizer:
    """Tokenizer in a child process, with the vocabulary in this one.

    Args:
        tree: checked JSON of the tokenizer.

    Raises:
        ValueError: the library cannot build it, or not in time.
    """

    def __init__(self, tree: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._tree = dict(tree)
        plain = json.dumps(self._tree | dict.fromkeys(TEXT_PARTS), ensure_ascii=False)
        self._vocabulary = Tokenizer.from_str(plain)
        # The JSON is too large for each request. The file ends with this object.
        self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115
            "w", encoding="utf-8", prefix="skillnet-", suffix=".json"
        )
        json.dump(self._tree, self._file, ensure_ascii=False)
        self._file.flush()
        self.encode_ids([""], 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return BoundedTokenizer, (self._tree,)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None if there is no such token."""
        return self._vocabulary.token_to_id(token)

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Return token -> id."""
        return self._vocabulary.get_vocab(with_added_tokens)

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """Return the number of tokens."""
        return self._vocabulary.get_vocab_size(with_added_tokens)

    def encode_ids(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Return the ids of each text, as :func:`pipelines.data.transforms.text.list_ids` does.

        Args:
            texts: B texts.
            limit: maximum number of tokens of a text.

        Raises:
            ValueError: the tokenizer fails for a text, or takes too much time or memory.
        """
        ids: list[list[int]] = []
        for part in _divide(texts):
            data = json.dumps(part).encode()
            try:
                ids += decode_media("tokens", data, self._file.name, limit, seconds=SECONDS)
            except ValueError as error:
                if str(error).startswith(UNTOKENIZED):
                    raise
                is_late = str(error) == describe_timeout(SECONDS)
                took = "its tokenizer took " if is_late else ""
                raise ValueError(f"{UNTOKENIZED}: {took}{error}") from None
        return ids


def _divide(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield consecutive texts whose requests have a bounded number of characters."""
    part: list[str] = []
    characters = 0
    for text in texts:
        if part and characters + len(text) > REQUEST_CHARACTERS:
            yield part
            part, characters = [], 0
        part.append(text)
        characters += len(text)
    if part:
        yield part
