"""Checks of a tokenizer.json before the library ``tokenizers`` builds it.

The library does what a file says. A file of a few bytes can pad each text to a billion tokens,
double it in each of a hundred normalizers, or match it with a pattern of exponential cost. So
:func:`parse_tokenizer` checks the JSON first: only known components, and bounds of their sizes. A
tokenizer with a pattern that is not known runs in a child process, with a limit of time.

The time of a known pattern grows linearly with any text: each alternative repeats classes of
characters of which a text fits one way only.

The library matches patterns by backtracking. A pattern of thirty characters can take hours for one
line, and no check of its syntax finds all of them. :func:`parse_tokenizer` returns a
:class:`BoundedTokenizer` for a file with a pattern of its own.
"""

import base64
import json
import math
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.data.transforms.decode_guard import describe_timeout
from pipelines.data.transforms.decoder_process import decode_media
from pipelines.data.transforms.own_words import CAMEL, WHITE_SPACE, WORDS
from pipelines.data.transforms.text import UNTOKENIZED
from skillnet.rust_panics import panics_as_errors

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
        for part in divide_texts(texts):
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


def divide_texts(texts: Sequence[str]) -> Iterator[list[str]]:
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


#: Bytes of a file. The largest known vocabularies (256,000 tokens) take 35 MB.
MAX_FILE_BYTES = 64 * 2**20
#: Tokens, and merges of pairs.
MAX_TOKENS = 1_000_000
#: Characters of a token.
MAX_TOKEN_LENGTH = 1024
#: Normalizers, pre-tokenizers and decoders together.
MAX_COMPONENTS = 64
#: Factor by which all normalizers together may lengthen a text, beside Unicode's own forms.
MAX_EXPANSION = 16
#: Characters of a pattern, a prefix, or another short text of a component.
MAX_TEXT = 4096
#: Bytes of a precompiled normalizer. That of XLM-RoBERTa takes 316 kB.
MAX_PRECOMPILED_BYTES = 4 * 2**20
#: Bytes of a replacement in it. Unicode's longest (U+FDFA) takes 33.
MAX_REPLACEMENT_BYTES = 64
#: Characters of a word that WordPiece divides, which takes quadratic time.
MAX_WORD = 1000

NORMALIZERS = (
    "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt",
    "BertNormalizer", "Replace", "Prepend", "Precompiled", "ByteLevel",
)  # fmt: skip
PRE_TOKENIZERS = (
    "Sequence", "Split", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "ByteLevel",
    "Metaspace", "Punctuation", "Digits", "CharDelimiterSplit", "UnicodeScripts",
)  # fmt: skip
DECODERS = (
    "Sequence", "ByteLevel", "WordPiece", "BPEDecoder", "Metaspace", "Replace", "ByteFallback",
    "Fuse", "Strip", "CTC",
)  # fmt: skip
#: Keys of a component that hold other components.
CHILDREN = ("normalizers", "pretokenizers", "decoders")
MODEL_KEYS: Mapping[str, frozenset[str]] = {
    "BPE": frozenset(
        ("vocab", "merges", "dropout", "unk_token", "continuing_subword_prefix",
         "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges")
    ),
    "WordPiece": frozenset(
        ("vocab", "unk_token", "continuing_subword_prefix", "max_input_chars_per_word")
    ),
    "Unigram": frozenset(("vocab", "unk_id", "byte_fallback")),
    "WordLevel": frozenset(("vocab", "unk_token")),
}  # fmt: skip
TOP_KEYS = {
    "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
    "post_processor", "decoder", "model",
}  # fmt: skip
#: Parts that the transforms of the corpora do themselves.
UNUSED_PARTS = ("truncation", "padding", "post_processor")


def read_tokenizer_tree(path: Path) -> dict[str, Any]:
    """Read the JSON of a tokenizer file, of a bounded size.

    Args:
        path: file to read.

    Raises:
        ValueError: the file is too large, or no JSON object.
    """
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"a file of {size} bytes; at most {MAX_FILE_BYTES} are read")
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ValueError("not a JSON object")
    return tree


def parse_tokenizer(tree: Any) -> Any:
    """Check the JSON of a tokenizer, and build the tokenizer.

    Args:
        tree: parsed JSON.

    Returns:
        A ``tokenizers.Tokenizer`` without padding, truncation and post-processing, or a
        :class:`BoundedTokenizer` if a pattern is
        unknown.

    Raises:
        ValueError: a component is unknown or exceeds a bound, or the library rejects it.
    """
    from tokenizers import Tokenizer

    try:
        check_tokenizer(tree)
    except RecursionError:
        raise ValueError("components are nested too deeply") from None
    text = json.dumps(tree, ensure_ascii=False)
    try:
        with panics_as_errors("the library cannot build it"):
            if set(_list_patterns([tree.get(part) for part in TEXT_PARTS])) - KNOWN_PATTERNS:
                return BoundedTokenizer(tree)
            return Tokenizer.from_str(text)
    # The library raises a plain Exception for each of its errors.
    except Exception as error:
        raise ValueError(str(error)[:200]) from None


def check_tokenizer(tree: Any) -> None:
    """Check the JSON of a tokenizer; see :func:`parse_tokenizer`.

    Args:
        tree: parsed JSON.

    Raises:
        ValueError: names the part that is wrong.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise ValueError("it has no model")
    _check_keys("the file", tree, TOP_KEYS)
    for key in UNUSED_PARTS:
        if tree.get(key) is not None:
            raise ValueError(f"{key} must be null")
    count = _check_model(tree["model"])
    _check_added_tokens(tree.get("added_tokens") or [], count)
    checker = _ComponentChecker()
    checker.check("normalizer", tree.get("normalizer"), NORMALIZERS)
    checker.check("pre_tokenizer", tree.get("pre_tokenizer"), PRE_TOKENIZERS)
    checker.check("decoder", tree.get("decoder"), DECODERS)


def _list_patterns(part: Any) -> Iterator[str]:
    """Yield the regular expressions anywhere in a checked part of a tokenizer."""
    if isinstance(part, dict) and isinstance(part.get("Regex"), str):
        yield part["Regex"]
    elif isinstance(part, (dict, list)):
        for each in part.values() if isinstance(part, dict) else part:
            yield from _list_patterns(each)


def largest_token_id(tokenizer: Any) -> int:
    """Return the largest id that a tokenizer can produce."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)


class _ComponentChecker:
    """Checks of normalizers, pre-tokenizers and decoders, with bounds over all of them."""

    def __init__(self) -> None:
        self._count = 0
        self._expansion = 1.0

    def check(self, where: str, part: Any, known: tuple[str, ...]) -> None:
        if part is None:
            return
        if not isinstance(part, dict) or part.get("type") not in known:
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"{where}: {str(kind)[:40]!r} is no known component")
        self._count += 1
        if self._count > MAX_COMPONENTS:
            raise ValueError(f"more than {MAX_COMPONENTS} components")
        for key, value in part.items():
            if key in CHILDREN:
                if not isinstance(value, list):
                    raise ValueError(f"{where}.{key}: expected a list")
                for child in value:
                    self.check(where, child, known)
            elif key == "precompiled_charsmap":
                _check_charsmap(where, value)
            else:
                _check_value(f"{where}.{key}", value)
        # Decoders do not run on texts of a user.
        if where == "normalizer":
            self._expansion *= _expansion(part)
            if self._expansion > MAX_EXPANSION:
                raise ValueError(f"normalizer: it lengthens texts more than {MAX_EXPANSION} times")


def _expansion(part: Mapping[str, Any]) -> float:
    """Return the largest factor by which a normalizer lengthens a text of one character."""
    if part["type"] == "Prepend":
        return 1.0 + len(str(part.get("prepend", "")))
    if part["type"] != "Replace":
        return 1.0
    content, pattern = str(part.get("content", "")), part.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if literal:
        return max(1.0, len(content) / len(literal))
    # A regular expression can match the empty text at every position.
    return 1.0 + len(content)


def _check_value(where: str, value: Any) -> None:
    """Check a setting of a component: a short text, a number, or a pattern."""
    if isinstance(value, dict):
        if not set(value) <= {"Regex", "String"} or len(value) != 1:
            raise ValueError(f"{where}: expected a pattern")
        ((kind, pattern),) = value.items()
        if not isinstance(pattern, str):
            raise ValueError(f"{where}: expected a pattern")
        _check_value(where, pattern)
        if kind == "Regex":
            check_pattern(where, pattern)
    elif isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f"{where}: a text of {len(value)} characters")
    elif not (value is None or isinstance(value, (bool, int, float))):
        raise ValueError(f"{where}: expected a text or a number")
    elif isinstance(value, (int, float)) and not abs(value) <= MAX_TEXT:
        raise ValueError(f"{where}: {value} is too large")


def check_pattern(where: str, pattern: str) -> None:
    """Check that no group that can match one text in several ways is repeated.

    Such a pattern, as ``(a+)+b`` or ``(a|a)*b``, takes exponential time. The patterns of known
    tokenizers repeat only classes of characters and groups of a fixed length. This is an early and
    clear answer, and no bound: comments hide groups, and ``a+a+a+b`` takes cubic time.

    Args:
        where: for the message.
        pattern: regular expression of Oniguruma.

    Raises:
        ValueError: the pattern has such a group, or a large counted repetition.
    """
    bare = re.sub(r"\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\.", "e", pattern, flags=re.DOTALL)
    # A class of characters becomes one character. Classes may be nested: [a[b]].
    while (shorter := re.sub(r"\[\^?\]?[^\[\]]*\]", "e", bare)) != bare:
        bare = shorter
    # Whether each open group is ambiguous, and whether the piece before this one was.
    is_ambiguous, before = [False], False
    for piece in re.findall(r"\(\?|[()|*+?]|\{\d*,?\d*\}|.", bare, flags=re.DOTALL):
        counted = re.fullmatch(r"\{(\d*)(,?)(\d*)\}", piece)
        low, high = (counted[1], counted[3]) if counted else ("", "")
        if max(int(low or 0), int(high or 0)) > MAX_TEXT:
            raise ValueError(f"{where}: a pattern that repeats more than {MAX_TEXT} times")
        is_range = counted is not None and bool(counted[2])
        if before and (piece in ("*", "+") or counted is not None):
            raise ValueError(f"{where}: a pattern that repeats an ambiguous group")
        if piece.startswith("("):
            is_ambiguous.append(False)
        closed = piece == ")" and len(is_ambiguous) > 1 and is_ambiguous.pop()
        varies = closed or is_range or piece in ("*", "+", "?", "|")
        is_ambiguous[-1] = is_ambiguous[-1] or varies
        # After a range, + repeats it; after *, + and ? it only forbids to go back.
        before = closed or is_range or (before and piece == "?")


def _check_charsmap(where: str, value: Any) -> None:
    """Check a normalizer of SentencePiece: a trie, then the replacements, each ended by zero."""
    if not isinstance(value, str) or len(value) > MAX_PRECOMPILED_BYTES:
        raise ValueError(f"{where}: a precompiled normalizer of more than 4 MiB")
    try:
        data = base64.b64decode(value, validate=True)
        (size,) = struct.unpack_from("<I", data)
    except (ValueError, struct.error):
        raise ValueError(f"{where}: a damaged precompiled normalizer") from None
    # The library indexes with these numbers without a check.
    if size % 4 or 4 + size > len(data):
        raise ValueError(f"{where}: a damaged precompiled normalizer")
    if any(len(text) > MAX_REPLACEMENT_BYTES for text in data[4 + size :].split(b"\0")):
        raise ValueError(f"{where}: a precompiled normalizer with a long replacement")


def _check_model(model: dict[str, Any]) -> int:
    """Check the model of a tokenizer, and return the number of its tokens."""
    kind = str(model.get("type"))
    if kind not in MODEL_KEYS:
        raise ValueError(f"model: {kind[:40]!r} is none of {', '.join(MODEL_KEYS)}")
    _check_keys("model", model, {"type", *MODEL_KEYS[kind]})
    for key in MODEL_KEYS[kind] - {"vocab", "merges"}:
        value = model.get(key)
        if not (value is None or isinstance(value, (str, int))):
            raise ValueError(f"model.{key}: expected a text or a number")
        if isinstance(value, str):
            _check_token(f"model.{key}", value, may_be_empty=True)
    # Dropout makes the tokens of a text random.
    if model.get("dropout") is not None:
        raise ValueError("model.dropout must be null")
    if not 0 <= (model.get("max_input_chars_per_word") or 0) <= MAX_WORD:
        raise ValueError(f"model.max_input_chars_per_word must be at most {MAX_WORD}")
    vocab = model.get("vocab")
    if not isinstance(vocab, (list, dict)) or not 1 <= len(vocab) <= MAX_TOKENS:
        raise ValueError(f"model.vocab: expected 1 to {MAX_TOKENS} tokens")
    if kind == "Unigram":
        _check_scores(vocab, model.get("unk_id"))
    else:
        _check_ids(vocab)
    if kind == "BPE":
        _check_merges(model.get("merges"))
    return len(vocab)


def _check_ids(vocab: Any) -> None:
    if not isinstance(vocab, dict):
        raise ValueError("model.vocab: expected tokens with ids")
    for token, number in vocab.items():
        _check_token("model.vocab", token, may_be_empty=True)
        if type(number) is not int or not 0 <= number < 2 * MAX_TOKENS:
            raise ValueError(f"model.vocab: {token[:40]!r} has the id {str(number)[:40]}")


def _check_scores(vocab: Any, unknown: Any) -> None:
    if not isinstance(vocab, list):
        raise ValueError("model.vocab: expected tokens with scores")
    for entry in vocab:
        if not isinstance(entry, list) or len(entry) != 2:
            raise ValueError("model.vocab: expected tokens with scores")
        _check_token("model.vocab", entry[0], may_be_empty=True)
        if not isinstance(entry[1], (int, float)) or not math.isfinite(entry[1]):
            raise ValueError(f"model.vocab: {entry[0][:40]!r} has no score")
    if unknown is not None and not 0 <= unknown < len(vocab):
        raise ValueError(f"model.unk_id: {unknown} is no token")


def _check_merges(merges: Any) -> None:
    if not isinstance(merges, list) or len(merges) > MAX_TOKENS:
        raise ValueError(f"model.merges: expected at most {MAX_TOKENS} pairs")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(token, str) for token in pair):
            raise ValueError("model.merges: expected pairs of tokens")
        if max(map(len, pair)) > MAX_TOKEN_LENGTH:
            raise ValueError("model.merges: a token is too long")


def _check_added_tokens(tokens: Any, count: int) -> None:
    if not isinstance(tokens, list) or count + len(tokens) > MAX_TOKENS:
        raise ValueError(f"added_tokens: expected a list; at most {MAX_TOKENS} tokens in total")
    for token in tokens:
        if not isinstance(token, dict):
            raise ValueError("added_tokens: expected objects")
        # An empty token matches everywhere.
        _check_token("added_tokens", token.get("content"), may_be_empty=False)
        number = token.get("id")
        if type(number) is not int or not 0 <= number < 2 * MAX_TOKENS:
            raise ValueError(f"added_tokens: {token['content'][:40]!r} has no valid id")


def _check_token(where: str, token: Any, *, may_be_empty: bool) -> None:
    is_valid = isinstance(token, str) and len(token) <= MAX_TOKEN_LENGTH
    if not is_valid or not (token or may_be_empty):
        raise ValueError(f"{where}: {str(token)[:40]!r} is no token of 1 to {MAX_TOKEN_LENGTH}")


def _check_keys(where: str, part: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(str(key)[:40] for key in part.keys() - known)
    if unknown:
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown[:5])}")


_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_OTHER = r"[^\r\n\p{L}\p{N}]?"
#: GPT-2, Llama 3, Qwen 2, o200k, CLIP, and runs of spaces (XLM-RoBERTa).
PUBLISHED = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{_SUFFIX}|{_OTHER}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    rf"{_SUFFIX}|{_OTHER}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    rf"{_OTHER}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_OTHER}{_UPPER}+{_LOWER}*{_SUFFIX}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    " {2,}",
)
KNOWN_PATTERNS = frozenset((WHITE_SPACE, WORDS, CAMEL, *PUBLISHED))
