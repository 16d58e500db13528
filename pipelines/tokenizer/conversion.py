"""A tokenizer of the user's for text and code: any local one of ``transformers`` or ``tokenizers``.

The model knows four ids by number (0 padding, 1 unknown, 2 mask, 3 class), and nothing may be
unknown to it. So an adopted tokenizer keeps its tokens and their merges or scores, and its ids
are counted anew: those four first, then the 256 bytes, then its own tokens in their order. What
it would call unknown is spelt in bytes (``pipelines.transforms.text.encode_texts``).
"""

import json
from pathlib import Path
from typing import Any

from pipelines.tokenizer.training import PAD, SPECIAL, UNKNOWN
from skillnet_platform.errors import UserError

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
#: Names under which tokenizers know the four that come first.
ALIASES = (
    ("[PAD]", "<pad>", "<|pad|>"),
    ("[UNK]", "<unk>", "<|unk|>"),
    ("[MASK]", "<mask>", "<|mask|>"),
    ("[CLS]", "<s>", "<cls>", "<|startoftext|>"),
)
#: Score of tokens that a Unigram model must never choose by itself.
UNUSED_TOKEN_SCORE = -1e4


def convert_tokenizer(path: str | Path) -> str:
    """The JSON of an adopted tokenizer.

    Args:
        path: a ``tokenizer.json``, or a folder of a saved ``transformers`` tokenizer. Read from
            the disk alone, and no code of it is run.

    Raises:
        UserError: there is none, it has no fast form, or it is of a kind without a vocabulary
            that can be counted anew.
    """
    tree = json.loads(_read(Path(path)))
    if list(_vocabulary(tree))[: len(SPECIAL)] == list(SPECIAL) and _has_bytes(tree):
        return json.dumps(tree, ensure_ascii=False, indent=1)  # one of ours
    model = tree["model"]
    if model["type"] not in ("BPE", "WordPiece", "Unigram", "WordLevel"):
        raise UserError(f"{path}: a tokenizer of type {model['type']}; expected BPE, WordPiece, "
                        "Unigram or WordLevel")  # fmt: skip
    own = _vocabulary(tree)
    renamed = {
        alias: SPECIAL[place]
        for place, aliases in enumerate(ALIASES)
        if (alias := next((a for a in aliases if a in own), None)) is not None
    }
    first = dict.fromkeys((*SPECIAL, *BYTE_TOKENS))
    order = [*first, *(token for token in own if token not in first and token not in renamed)]
    number_of = {token: number for number, token in enumerate(order)}
    _number(model, order, renamed, own)
    kept = [t for t in tree.get("added_tokens") or [] if t["content"] not in renamed]
    tree["added_tokens"] = [
        {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for number, name in enumerate(SPECIAL)
    ] + [
        token | {"id": number_of[token["content"]]}
        for token in kept
        if token["content"] not in SPECIAL
    ]  # fmt: skip
    # What is put around a text, cut from it or added to it is decided here, not there.
    tree |= {"post_processor": None, "truncation": None, "padding": None}
    text = json.dumps(tree, ensure_ascii=False, indent=1)
    _check(path, text)
    return text


def _read(path: Path) -> str:
    """The JSON of the fast form of what lies there."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file() and file.suffix == ".json":
        try:
            text = file.read_text(encoding="utf-8")
            _parse(text)
            return text
        except Exception as problem:
            raise UserError(f"{file}: not a tokenizer ({problem})") from None
    if not path.is_dir():
        raise UserError(
            f"{path}: no tokenizer there; expected a tokenizer.json, or a folder of one"
        )
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as problem:
        line = str(problem).strip().splitlines() or [""]
        raise UserError(f"{path}: transformers reads no tokenizer there ({line[0]})") from None
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{path}: this tokenizer has no fast form (no tokenizer.json)")
    return str(backend.to_str())


def _parse(text: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(text)


def _vocabulary(tree: dict[str, Any]) -> dict[str, int]:
    """Token -> id, in the order of ids; with the added tokens."""
    vocab = tree["model"].get("vocab") or {}
    if isinstance(vocab, list):
        found = {entry[0]: number for number, entry in enumerate(vocab)}
    else:
        found = dict(vocab)
    found |= {token["content"]: token["id"] for token in tree.get("added_tokens") or []}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _has_bytes(tree: dict[str, Any]) -> bool:
    return set(BYTE_TOKENS) <= set(_vocabulary(tree))


def _number(
    model: dict[str, Any], order: list[str], renamed: dict[str, str], own: dict[str, int]
) -> None:
    """Give the model's tokens their new numbers, in place."""
    if model["type"] == "Unigram":
        scores = dict(model["vocab"])
        model["vocab"] = [[token, scores.get(token, UNUSED_TOKEN_SCORE)] for token in order]
        model["unk_id"] = UNKNOWN
        return
    model["vocab"] = {token: number for number, token in enumerate(order)}
    before = model.get("unk_token")
    # A byte-level BPE has no unknown token and needs none.
    if before is not None or model["type"] != "BPE":
        model["unk_token"] = SPECIAL[UNKNOWN]


def _check(path: str | Path, text: str) -> None:
    """Hold what was made against what is promised.

    Raises:
        UserError: it would not do.
    """
    try:
        made = _parse(text)
    except Exception as problem:
        raise UserError(f"{path}: cannot be counted anew ({problem})") from None
    for number, name in enumerate((*SPECIAL, *BYTE_TOKENS)):
        if made.token_to_id(name) != number:
            raise UserError(f"{path}: {name} did not get the number {number}")
    if made.encode("一 a").ids and PAD in made.encode("一 a").ids:
        raise UserError(f"{path}: it spells a text with the padding token")
