"""Words that the tokenizer of this project encodes apart: their neighbours change no id.

    "SkillNet读取rows of 文本"  ──>  SkillNet 读 取 rows of 文 本

Most words of a corpus repeat, so :func:`pipelines.data.transforms.text.list_ids` encodes each
different one once. The library spends most of its time on normalizing and dividing.
"""

import re
from functools import lru_cache
from typing import Any

#: Chinese characters and their radicals, as the inside of a class.
CJK = (
    r"\u2e80-\u2fdf\u3007\u31c0-\u31ef\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WHITE_SPACE = r"\s+"
WORDS = rf"[{CJK}]|[a-z]+|[0-9]{{1,3}}|_+|[^\s\w]+|[^\s{CJK}a-z0-9_]+"
#: Places before the capitals of an identifier.
CAMEL = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
#: Characters that NFKC keeps and never composes, and that any version of Unicode since 6.1 has.
_IDEOGRAPHS = r"\u3400-\u4db5\u4e00-\u9fcc"
_SPACES = r" \n\t"


def make_normalizer() -> Any:
    """Return the normalizer of the project's tokenizer."""
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(CAMEL), " "), normalizers.Lowercase()]
    )


def make_pre_tokenizer() -> Any:
    """Return the pre-tokenizer of the project's tokenizer."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WHITE_SPACE), "removed"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
        ]
    )


def find_word_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Return the pattern of the words that a tokenizer encodes apart, None if it is not known.

    The ids of a text are those of its words, one after the other.

    Args:
        tokenizer: text encoder of the library ``tokenizers``.
    """
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    if normalizer is None or pre_tokenizer is None:
        return None
    if (normalizer.__getstate__(), pre_tokenizer.__getstate__()) != _describe_own():
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    # Whether such a token matches depends on the words beside it.
    if any(token.single_word for token in added):
        return None
    contents = "".join(token.content for token in added)
    return _compile_words("".join(sorted({*contents, *normalizer.normalize_str(contents)})))


@lru_cache(maxsize=1)
def _describe_own() -> tuple[bytes, bytes]:
    return make_normalizer().__getstate__(), make_pre_tokenizer().__getstate__()


@lru_cache(maxsize=4)
def _compile_words(joined: str) -> re.Pattern[str]:
    """Return the pattern of words; some characters are of added tokens, which it never divides."""
    apart = "".join(re.findall(f"[{_IDEOGRAPHS}{_SPACES}]", joined))
    if not apart:
        return re.compile(f"[{_IDEOGRAPHS}]|[^{_IDEOGRAPHS}{_SPACES}]+")
    return re.compile(f"(?![{apart}])[{_IDEOGRAPHS}]|(?:[{apart}]|[^{_IDEOGRAPHS}{_SPACES}])+")
