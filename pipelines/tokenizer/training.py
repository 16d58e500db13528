"""The one tokenizer of text and code: every Chinese character a token, byte pairs for the rest.

Identifiers are cut at underscores, at capitals and between letters and digits, and lose their
case; white space is not kept. What the vocabulary lacks is spelt in bytes, so nothing is
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

#: The tokenizer that the corpora of a folder share, and what says where it comes from.
TOKENIZER = "tokenizer.json"
TOKENIZER_MANIFEST = "tokenizer.manifest.json"


VERSION = 1
PAD, UNKNOWN, MASK, CLASS = 0, 1, 2, 3
SPECIAL = ("[PAD]", "[UNK]", "[MASK]", "[CLS]")
VOCABULARY_SIZE = 12_000
#: A Chinese character that only pretraining text holds gets a token from this many occurrences.
MIN_OCCURRENCES = 10
_ALWAYS = string.ascii_lowercase + string.digits + string.punctuation
_CJK = (
    r"\u2e80-\u2fdf\u3007\u31c0-\u31ef\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORDS = rf"[{_CJK}]|[a-z]+|[0-9]{{1,3}}|_+|[^\s\w]+|[^\s{_CJK}a-z0-9_]+"
_CAMEL = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"


def train_tokenizer(
    task_texts: Iterable[str],
    other_texts: Iterable[str],
    terms: Sequence[str] = (),
    size: int = VOCABULARY_SIZE,
) -> str:
    """Learn a tokenizer; returns its JSON. Equal texts in any order give equal JSON.

    Args:
        task_texts: texts whose Chinese characters all get a token.
        other_texts: texts of pretraining.
        terms: words that stay whole wherever they stand.
        size: tokens in all. Where the characters alone would take more than three quarters of
            them, the rarest are spelt in bytes.
    """
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN], byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _normalizer(), _pre_tokenizer()
    cjk = re.compile(f"[{_CJK}]")
    task, other, words = Counter[str](), Counter[str](), Counter[str]()
    for texts, characters in ((task_texts, task), (other_texts, other)):
        for chunk in _chunks(texts):
            normal = tokenizer.normalizer.normalize_str(chunk)
            characters.update(normal)
            # Chinese characters never join, so pairs are learnt from the rest alone.
            words.update(re.findall(_WORDS, cjk.sub(" ", normal)))
    room = size - len(set(terms))
    alphabet = _alphabet(task, other, (room - len(SPECIAL) - 256) * 3 // 4)
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        min_frequency=2,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    ordered = sorted(words.items())
    tokenizer.train_from_iterator(_repeated(ordered), trainer)
    return _finish(json.loads(tokenizer.to_str()), terms)


@lru_cache(maxsize=4)
def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a file, kept for the next call.

    Raises:
        ValueError: the file is missing or is no tokenizer.
    """
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise ValueError(f"{path}: no tokenizer there; run `skillnet prepare`")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as problem:
        raise ValueError(f"{path}: not a tokenizer ({problem}); run `skillnet prepare`") from None


def _normalizer() -> Any:
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(_CAMEL), " "), normalizers.Lowercase()]
    )


def _pre_tokenizer() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
        ]
    )


def _chunks(texts: Iterable[str], size: int = 1 << 16) -> Iterable[str]:
    """Texts joined by newlines: one call for many short ones."""
    waiting: list[str] = []
    length = 0
    for text in texts:
        waiting.append(text)
        length += len(text) + 1
        if length >= size:
            yield "\n".join(waiting)
            waiting, length = [], 0
    yield "\n".join(waiting)


def _alphabet(task: Counter[str], other: Counter[str], most: int) -> list[str]:
    """Characters that get a token; if they are more than ``most``, the commonest of them."""
    both = task + other
    kept = {c for c, n in both.items() if n >= MIN_OCCURRENCES} | set(task) | set(_ALWAYS)
    kept = {c for c in kept if not c.isspace() and c.isprintable()}
    if len(kept) > most:
        rest = sorted(kept - set(_ALWAYS), key=lambda c: (-both[c], c))
        kept = {*_ALWAYS, *rest[: max(0, most - len(_ALWAYS))]}
    return sorted(kept)


def _repeated(words: Sequence[tuple[str, int]]) -> Iterable[str]:
    """Words as often as they occur. The logarithmic loss of exactness above 1,000 is harmless:
    pairs of so frequent words are learnt first anyway."""
    for word, count in words:
        if len(word) <= 64:
            yield " ".join([word] * min(count, 1000))


def _finish(model: dict[str, Any], terms: Sequence[str]) -> str:
    """Bytes stop being special (they must not match in a text); terms are added at the end."""
    named = set(SPECIAL)
    model["added_tokens"] = [t for t in model["added_tokens"] if t["content"] in named]
    first = len(model["model"]["vocab"])
    for number, term in enumerate(sorted(set(terms))):
        model["added_tokens"].append(
            {
                "id": first + number,
                "content": term,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": True,
                "special": False,
            }
        )
    return json.dumps(model, ensure_ascii=False, indent=1)
