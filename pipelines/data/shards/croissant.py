"""Croissant description of a prepared corpus, with the fields of its extension for responsible AI.

:func:`describe_corpus` is the main entry point, for ``skillnet inspect --croissant``. It states the
facts of the manifest. Biases, personal information and social impact are for a person to add.

Source: https://docs.mlcommons.org/croissant/docs/croissant-spec.html (version 1.0).
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipelines.data.shards.dataset import PreparedCorpus
from pipelines.data.shards.format import MANIFEST, SHARD_TABLE
from pipelines.data.shards.row_checks import describe_row_checks

CROISSANT = "http://mlcommons.org/croissant/"
#: The context of the specification: words of the document -> names of schema.org and of Croissant.
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": CROISSANT,
    "rai": f"{CROISSANT}RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{
        word: f"cr:{word}"
        for word in (
            *("citeAs", "column", "equivalentProperty", "extract", "field", "fileObject"),
            *("fileProperty", "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key"),
            *("md5", "parentField", "path", "recordSet", "references", "regex", "repeated"),
            *("replace", "samplingRate", "separator", "source", "subField", "transform"),
        )
    },
}
ARROW = "application/vnd.apache.arrow.file"


def describe_corpus(corpus: PreparedCorpus, licences: Sequence[str]) -> dict[str, Any]:
    """Return the JSON-LD document of a corpus.

    The table of shards has the SHA-256 of each shard, so that its own covers all of them.

    Args:
        corpus: the prepared corpus.
        licences: URL or name of each licence of the data.
    """
    manifest = corpus.manifest
    table = manifest["shards"]
    rejected = [
        f"{count} rows were left out: {why}" for why, count in manifest["quarantine"].items()
    ]
    splits = ", ".join(f"{name} {split.rows}" for name, split in corpus.splits.items())
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": corpus.name,
        "description": f"{corpus.rows} rows ({splits}) of {corpus.modality}, "
        f"prepared from {manifest['rows_in']} rows. The digest is {corpus.digest}.",
        "conformsTo": [f"{CROISSANT}1.0", f"{CROISSANT}RAI/1.0"],
        "license": list(licences),
        "version": f"{manifest['format_version']}.0.0+{corpus.digest[:16]}",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": SHARD_TABLE,
                "name": SHARD_TABLE,
                "description": f"file, rows, bytes and SHA-256 of each shard; see {MANIFEST}",
                "contentUrl": SHARD_TABLE,
                "contentSize": f"{table['bytes']} B",
                "encodingFormat": ARROW,
                "sha256": table["sha256"],
            },
            *(
                {
                    "@type": "cr:FileSet",
                    "@id": name,
                    "name": name,
                    "description": f"{split.rows} rows of the split {name}",
                    "encodingFormat": ARROW,
                    "includes": f"{name}-[0-9]*.arrow",
                }
                for name, split in corpus.splits.items()
            ),
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": f"{name}_rows",
                "name": f"{name}_rows",
                "field": [_describe_field(name, field) for field in split.schema],
            }
            for name, split in corpus.splits.items()
        ],
        "rai:dataCollection": "; ".join(
            f"{source['file']}, SHA-256 {source['sha256']}"
            for source in manifest.get("sources", [])
        ),
        "rai:dataPreprocessingProtocol": [
            f"{name}: {value}" for name, value in manifest["preprocessing"].items()
        ],
        "rai:dataLimitations": [*rejected, *describe_row_checks(manifest)],
        "rai:dataUseCases": [corpus.task] if corpus.task else [],
    }


def _describe_field(split: str, field: pa.Field) -> dict[str, Any]:
    kind, is_list = field.type, False
    while pa.types.is_nested(kind) and not pa.types.is_struct(kind):
        kind, is_list = kind.value_type, True
    word = "sc:Text"
    if pa.types.is_integer(kind):
        word = "sc:Integer"
    elif pa.types.is_floating(kind):
        word = "sc:Float"
    elif pa.types.is_boolean(kind):
        word = "sc:Boolean"
    return {
        "@type": "cr:Field",
        "@id": f"{split}_rows/{field.name}",
        "name": field.name,
        "description": f"{field.type} of Arrow",
        "dataType": word,
        "repeated": is_list,
        "source": {"fileSet": {"@id": split}, "extract": {"column": field.name}},
    }
