"""Training of the tokenizer of text and code: Chinese characters are tokens, the rest byte pairs.

Identifiers are split at underscores, at capitals and between letters and digits, and lower-cased.
White space is not kept. Characters outside of the vocabulary are encoded as bytes, so no token is
unknown. Ids: 0 padding, 1 unknown, 2 mask, 3 class, then 256 bytes, characters, pairs, terms.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.data.transforms.own_words import CJK, WORDS, make_normalizer, make_pre_tokenizer

#: Files of the tokenizer that the corpora of a directory share, and of its origin.
TOKENIZER = "tokenizer.json"
TOKENIZER_MANIFEST = "tokenizer.manifest.json"

#: Increase it when a change of this module changes the tokenizer of any texts.
VERSION = 1
PAD, UNKNOWN, MASK, CLASS = 0, 1, 2, 3
SPECIAL = ("[PAD]", "[UNK]", "[MASK]", "[CLS]")
VOCABULARY_SIZE = 12_000
#: A Chinese character that occurs only in pretraining text needs this number of occurrences.
MIN_OCCURRENCES = 10
_ALWAYS = string.ascii_lowercase + string.digits + string.punctuation


def train_tokenizer(
    task_texts: Iterable[str],
    other_texts: Iterable[str],
    terms: Sequence[str] = (),
    size: int = VOCABULARY_SIZE,
) -> str:
    """Train a tokenizer and return its JSON. Equal texts in any order give equal JSON.

    Args:
        task_texts: texts of tasks; all of their Chinese characters become tokens.
        other_texts: texts for pretraining.
        terms: words that are never split.
        size: number of tokens. If characters would take more than three quarters of them, the
            rarest characters are encoded as bytes.
    """
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN], byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = make_normalizer(), make_pre_tokenizer()
    cjk = re.compile(f"[{CJK}]")
    task, other, words = Counter[str](), Counter[str](), Counter[str]()
    for texts, characters in ((task_texts, task), (other_texts, other)):
        for chunk in _join_chunks(texts):
            normal = tokenizer.normalizer.normalize_str(chunk)
            characters.update(normal)
            # Chinese characters never merge, so pairs are trained on the rest alone.
            words.update(re.findall(WORDS, cjk.sub(" ", normal)))
    room = size - len(set(terms))
    alphabet = _choose_alphabet(task, other, (room - len(SPECIAL) - 256) * 3 // 4)
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        min_frequency=2,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    ordered = sorted(words.items())
    tokenizer.train_from_iterator(_repeat_words(ordered), trainer)
    return _add_terms(json.loads(tokenizer.to_str()), terms)


@lru_cache(maxsize=4)
def load_tokenizer(path: str | Path) -> Any:
    """Load the tokenizer of a file, with a cache.

    Raises:
        ValueError: the file is missing, not a tokenizer, or exceeds the bounds of
            :mod:`pipelines.data.tokenizer.guarded_loader`.
    """
    from pipelines.data.tokenizer.guarded_loader import parse_tokenizer, read_tokenizer_tree

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such tokenizer; run `skillnet prepare`")
    try:
        return parse_tokenizer(read_tokenizer_tree(Path(path)))
    except ValueError as error:
        raise ValueError(f"{path}: not a tokenizer ({error}); run `skillnet prepare`") from None


def _join_chunks(texts: Iterable[str], size: int = 1 << 16) -> Iterable[str]:
    """Join texts by newlines, so that one call normalizes many short texts."""
    parts: list[str] = []
    length = 0
    for text in texts:
        parts.append(text)
        length += len(text) + 1
        if length >= size:
            yield "\n".join(parts)
            parts, length = [], 0
    yield "\n".join(parts)


def _choose_alphabet(task: Counter[str], other: Counter[str], max_size: int) -> list[str]:
    """Return the characters that become tokens: the ``max_size`` most frequent ones."""
    counts = task + other
    chosen = {c for c, n in counts.items() if n >= MIN_OCCURRENCES} | set(task) | set(_ALWAYS)
    chosen = {c for c in chosen if not c.isspace() and c.isprintable()}
    if len(chosen) > max_size:
        rest = sorted(chosen - set(_ALWAYS), key=lambda c: (-counts[c], c))
        chosen = {*_ALWAYS, *rest[: max(0, max_size - len(_ALWAYS))]}
    return sorted(chosen)


def _repeat_words(words: Sequence[tuple[str, int]]) -> Iterable[str]:
    """Yield words as often as they occur, up to 1,000 times.

    The limit is harmless: pairs of more frequent words are merged first in any case.
    """
    for word, count in words:
        if len(word) <= 64:
            yield " ".join([word] * min(count, 1000))


def _add_terms(model: dict[str, Any], terms: Sequence[str]) -> str:
    """Make bytes ordinary tokens, which never match in a text, and append the terms."""
    special = set(SPECIAL)
    model["added_tokens"] = [t for t in model["added_tokens"] if t["content"] in special]
    first = len(model["model"]["vocab"])
    for index, term in enumerate(sorted(set(terms))):
        model["added_tokens"].append(
            {
                "id": first + index,
                "content": term,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": True,
                "special": False,
            }
        )
    return json.dumps(model, ensure_ascii=False, indent=1)
