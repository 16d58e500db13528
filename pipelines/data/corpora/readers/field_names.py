"""Names of fields, in which capitals and surrounding blanks do not matter.

:func:`find_field` and :func:`choose_fields` find the fields of a corpus among the names of sampled
rows. :func:`read_field` reads a field of a row, because files can write its name differently.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pipelines.data.corpora.formats.schema_sample import fold_name
from skillnet_platform.errors import UserError, suggest_name

#: Names of a text beside the usual one. A field of another name counts if it holds sentences.
SECOND_TEXT_FIELDS = frozenset(
    (
        "text_pair", "text1", "text2", "text_a", "text_b", "title", "headline", "body", "premise",
        "hypothesis", "question", "question1", "question2", "context", "sentence1", "sentence2",
        "sentence_a", "sentence_b", "query", "passage", "answer", "summary", "document", "abstract",
        "reply", "response", "prompt",
    )
)  # fmt: skip
#: The same words before numbers and marks were normalized, as in LJSpeech and FLEURS.
RAW_TEXT_FIELDS = frozenset(("raw_text", "raw_transcription"))


def find_field(names: Collection[str], common: Iterable[str], option: str = "") -> str | None:
    """Return the first field that has one of some common names, None without any.

    Args:
        names: names of fields.
        common: common names in small letters, the most likely one first.
        option: option that names the field, for the message; "" to take the first of equal names.

    Raises:
        UserError: names of two fields differ only in capitals and blanks.
    """
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(fold_name(name), []).append(name)
    found = next((folded[name] for name in common if name in folded), [])
    if len(found) > 1 and option:
        raise _ambiguous_error(found, option)
    return found[0] if found else None


def match_field(names: Collection[str], wanted: str, option: str) -> str:
    """Return the field that a user names; its exact name wins.

    Args:
        names: names of fields.
        wanted: name in the option.
        option: the option, for the message.

    Raises:
        UserError: no field has the name, or several do except for capitals and blanks.
    """
    if wanted in names:
        return wanted
    found = [name for name in names if fold_name(name) == fold_name(wanted)]
    if len(found) > 1:
        raise _ambiguous_error(found, option)
    if not found:
        hint = suggest_name(wanted, names)
        more = hint if "did you mean" in hint else f"; rows have {', '.join(names) or 'none'}"
        raise UserError(f"{option}: no field {wanted!r}{more}")
    return found[0]


def choose_fields(names: Collection[str], wanted: str, option: str) -> tuple[str, ...]:
    """Return the fields that a user names, with commas between several.

    Args:
        names: names of fields.
        wanted: value of the option.
        option: the option, for the message.

    Raises:
        UserError: see :func:`match_field`.
    """
    is_single = "," not in wanted or wanted in names
    parts = [wanted] if is_single else [part.strip() for part in wanted.split(",") if part.strip()]
    return tuple(match_field(names, part, option) for part in parts or [wanted])


def read_field(fields: Mapping[str, Any], name: str | None) -> Any:
    """Return the value of a field, None if there is no such field.

    Args:
        fields: fields of a row.
        name: name of the field; another row can write it with other capitals or blanks.
    """
    if name is None or name in fields:
        return fields.get(name or "")
    wanted = fold_name(name)
    return next((value for each, value in fields.items() if fold_name(each) == wanted), None)


def list_further_texts(
    names: Iterable[str], sentences: Collection[str], used: Collection[str]
) -> list[str]:
    """Return the fields of texts that are not read.

    Args:
        names: fields that hold a text in the sampled rows.
        sentences: those whose texts are sentences, different ones in most rows.
        used: fields that are read.
    """
    known = {fold_name(name) for name in used} | RAW_TEXT_FIELDS
    texts = (name for name in names if name in sentences or fold_name(name) in SECOND_TEXT_FIELDS)
    return [name for name in texts if fold_name(name) not in known]


def _ambiguous_error(found: list[str], option: str) -> UserError:
    return UserError(
        f"{option}: the fields {', '.join(found)} differ only in capitals or blanks. Name one of "
        f"them: --{option} {found[0]!r}"
    )
