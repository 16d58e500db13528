"""Conversion of an existing tokenizer, a local one of ``transformers`` or ``tokenizers``.

The model knows four ids by number (0 padding, 1 unknown, 2 mask, 3 class), and no text may contain
unknown tokens. A converted tokenizer keeps its tokens and their merges or scores, but its ids are
remapped: those four first, then the 256 bytes, then its own tokens in order. Text that it cannot
represent is encoded as bytes (:func:`pipelines.data.transforms.text.encode_texts`).
"""

import json
from pathlib import Path
from typing import Any

from pipelines.data.tokenizer.guarded_loader import (
    UNUSED_PARTS,
    parse_tokenizer,
    read_tokenizer_tree,
)
from pipelines.data.tokenizer.training import PAD, SPECIAL, UNKNOWN
from pipelines.data.transforms.text import encode_texts
from skillnet_platform.errors import UserError

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
#: Names that tokenizers use for the first four ids.
ALIASES = (
    ("[PAD]", "<pad>", "<|pad|>"),
    ("[UNK]", "<unk>", "<|unk|>"),
    ("[MASK]", "<mask>", "<|mask|>"),
    ("[CLS]", "<s>", "<cls>", "<|startoftext|>"),
)
#: Score of tokens that a Unigram model must never select.
UNUSED_TOKEN_SCORE = -1e4


def convert_tokenizer(path: str | Path) -> str:
    """Return the JSON of an existing tokenizer with remapped ids.

    Args:
        path: a ``tokenizer.json``, or the directory of a saved ``transformers`` tokenizer. It is
            read from the disk only, and none of its code is run.

    Raises:
        UserError: there is no tokenizer.json, it is rejected, or its ids cannot be remapped.
    """
    tree = _read_tree(Path(path))
    if list(_read_vocabulary(tree))[: len(SPECIAL)] == list(SPECIAL) and _has_bytes(tree):
        return json.dumps(tree, ensure_ascii=False, indent=1)  # trained by this project
    model = tree["model"]
    if model["type"] not in ("BPE", "WordPiece", "Unigram", "WordLevel"):
        raise UserError(f"{path}: a tokenizer of type {model['type']}; expected BPE, WordPiece, "
                        "Unigram or WordLevel")  # fmt: skip
    own = _read_vocabulary(tree)
    renamed = {
        alias: SPECIAL[index]
        for index, aliases in enumerate(ALIASES)
        if (alias := next((a for a in aliases if a in own), None)) is not None
    }
    first = dict.fromkeys((*SPECIAL, *BYTE_TOKENS))
    order = [*first, *(token for token in own if token not in first and token not in renamed)]
    id_of = {token: index for index, token in enumerate(order)}
    _remap_ids(model, order, renamed, own)
    kept = [t for t in tree.get("added_tokens") or [] if t["content"] not in renamed]
    tree["added_tokens"] = [
        {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for number, name in enumerate(SPECIAL)
    ] + [
        token | {"id": id_of[token["content"]]}
        for token in kept
        if token["content"] not in SPECIAL
    ]  # fmt: skip
    text = json.dumps(tree, ensure_ascii=False, indent=1)
    _check_converted(path, tree)
    return text


def map_token_ids(path: str | Path) -> tuple[str, list[int | None]]:
    """Return the JSON of a converted tokenizer, and for each of its ids the id before.

    Args:
        path: see :func:`convert_tokenizer`.

    Returns:
        The JSON; ids in the order of the converted ones, None for a token that is new.

    Raises:
        UserError: see :func:`convert_tokenizer`.
    """
    text = convert_tokenizer(path)
    own = _read_vocabulary(_read_tree(Path(path)))
    before = {
        SPECIAL[index]: alias
        for index, aliases in enumerate(ALIASES)
        if (alias := next((a for a in aliases if a in own), None)) is not None
    }
    converted = _read_vocabulary(json.loads(text))
    return text, [own.get(before.get(token, token)) for token in converted]


def _read_tree(path: Path) -> dict[str, Any]:
    """Return the JSON of a tokenizer file or directory, after its checks.

    Without padding, truncation and post-processing: the transforms do these.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        # transformers would build one from other files without the checks of this project.
        raise UserError(
            f"{path}: it has no tokenizer.json; write one with transformers: "
            f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained(…), or give another "
            "directory"
        )
    if not file.is_file():
        raise UserError(f"{path}: no tokenizer there; expected a tokenizer.json, or its directory")
    try:
        tree = read_tokenizer_tree(file) | dict.fromkeys(UNUSED_PARTS)
        parse_tokenizer(tree)
    except ValueError as error:
        raise UserError(f"{file}: not a tokenizer ({error})") from None
    return tree


def _read_vocabulary(tree: dict[str, Any]) -> dict[str, int]:
    """Return token -> id in the order of ids, with added tokens."""
    vocab = tree["model"].get("vocab") or {}
    if isinstance(vocab, list):
        ids = {entry[0]: number for number, entry in enumerate(vocab)}
    else:
        ids = dict(vocab)
    ids |= {token["content"]: token["id"] for token in tree.get("added_tokens") or []}
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _has_bytes(tree: dict[str, Any]) -> bool:
    return set(BYTE_TOKENS) <= set(_read_vocabulary(tree))


def _remap_ids(
    model: dict[str, Any], order: list[str], renamed: dict[str, str], own: dict[str, int]
) -> None:
    """Replace the ids of the model's tokens in place."""
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


def _check_converted(path: str | Path, tree: dict[str, Any]) -> None:
    """Check a converted tokenizer: fixed ids, and no padding tokens in ordinary text.

    Raises:
        UserError: the tokenizer cannot be used.
    """
    try:
        converted = parse_tokenizer(tree)
    except ValueError as error:
        raise UserError(f"{path}: token ids cannot be remapped ({error})") from None
    for number, name in enumerate((*SPECIAL, *BYTE_TOKENS)):
        if converted.token_to_id(name) != number:
            raise UserError(f"{path}: {name} did not get the id {number}")
    if PAD in encode_texts(converted, ["一 a"], 16).to_pylist()[0]:
        raise UserError(f"{path}: the tokenizer produces the padding token for ordinary text")
