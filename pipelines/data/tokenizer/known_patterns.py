"""Regular expressions of this project's tokenizer and of published ones.

Their time grows linearly with any text, so they run in the process of the caller. Each alternative
repeats classes of characters of which a text fits one way only.
:func:`pipelines.data.tokenizer.guarded_loader.parse_tokenizer` compares with them; a tokenizer with
any other pattern runs in a child process.
"""

#: Chinese characters and their radicals, as the inside of a class.
CJK = (
    r"\u2e80-\u2fdf\u3007\u31c0-\u31ef\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WHITE_SPACE = r"\s+"
WORDS = rf"[{CJK}]|[a-z]+|[0-9]{{1,3}}|_+|[^\s\w]+|[^\s{CJK}a-z0-9_]+"
#: Places before the capitals of an identifier.
CAMEL = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"

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
