"""Which tokenizer the user's corpora get: the one that is there, one of their own, or a learnt one.

One directory of prepared corpora has one tokenizer, since one model reads them all. So a tokenizer
that is there stays: corpora that come later are spelt with it, and what it lacks is spelt in bytes.
"""

import hashlib
from pathlib import Path

from pipelines.foreign_tokenizer import adopt
from skillnet_platform import storage
from skillnet_platform.errors import UserError

#: ``--tokenizer learn``: learn one from these corpora, whatever is there.
LEARN = "learn"
#: Key of the tokenizer's manifest that says whose it is; the built-in lesson has none.
OF = "of"


def take(path: str, tokenizer: Path, manifest: Path, replaced: set[str]) -> None:
    """Put a tokenizer of the user's in place.

    Args:
        path: what the user named.
        tokenizer: where it goes.
        manifest: where it is said whose it is.
        replaced: names of corpora that are prepared anew now.

    Raises:
        UserError: there is no usable tokenizer, or other corpora are spelt with another one.
    """
    text = adopt(path)
    now = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if not tokenizer.is_file() or storage.sha256_file(tokenizer) != now:
        keep_spelling(tokenizer, replaced)
        with storage.atomic_write(tokenizer, "w") as stream:
            stream.write(text)
    storage.write_json(manifest, {OF: [Path(path).name], "sha256": now})


def keep_spelling(tokenizer: Path, replaced: set[str]) -> None:
    """Refuse to replace a tokenizer that other corpora beside it are spelt with.

    Raises:
        UserError: naming them.
    """
    if not tokenizer.is_file():
        return
    spelt = storage.sha256_file(tokenizer)
    others = []
    for found in sorted(tokenizer.parent.glob("*/manifest.json")):
        entry = storage.read_json(found).get("tokenizer") or {}
        if entry.get("sha256") == spelt and found.parent.name not in replaced:
            others.append(found.parent.name)
    if others:
        raise UserError(
            f"{tokenizer}: {', '.join(others)} there are prepared with it; a model reads corpora "
            "of one tokenizer. Give another --data, or prepare them again in the same call"
        )


def is_the_users(manifest: Path) -> bool:
    """Whether the tokenizer that is there is the user's, and not that of the built-in lesson."""
    try:
        return OF in storage.read_json(manifest)
    except UserError:
        return False
