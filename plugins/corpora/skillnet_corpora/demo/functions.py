"""Corpus ``functions``: Python functions with Chinese docstrings, of eight published packages.

Code is parsed and never executed. The module decides the split, and one package is a test of its
own. A function of a test or validation split is rejected if training contains a near twin or the
same docstring. Pretraining reads the other functions of these packages, and those of the standard
library of the running Python.
"""

import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from platform import python_version
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipelines.data.corpora.base import (
    Archive,
    Corpus,
    RejectedRow,
    Row,
    SourceArchives,
    stable_hash,
)
from pipelines.data.transforms import code as source_code
from pipelines.data.transforms import text
from skillnet_corpora.archives import iter_archive
from skillnet_corpora.demo import IdAllocator
from skillnet_platform.config import digest_config
from skillnet_platform.storage import sha256_file

#: Minimum length of a function body in characters.
SHORTEST_BODY = 30
#: Minimum number of Chinese characters of a docstring that serves as caption.
FEWEST_CHINESE = 4
HELD_OUT_PACKAGE = "nonebot2"
#: Target numbers of functions. Complete modules are added until both are reached.
TEST, VALIDATION = 600, 240
#: Larger modules are used for training: a test of few modules measures little.
LARGEST_TEST_MODULE = 40
#: Two functions are near twins if their sets of token triples overlap this much (Jaccard).
TWIN = 0.6
STANDARD_LIBRARY = "python-standard-library"

#: Folders of tests and of other people's packages.
_SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "idlelib", "turtledemo"}


def pin_wheel(file: str, size: int, sha256: str, requirement: str, licence: str) -> Archive:
    """Return the pin of a wheel; see :class:`Archive`."""
    return Archive(file, size, sha256, "pypi", requirement, licence)


ARCHIVES = (
    pin_wheel(
        "akshare-1.19.5-py3-none-any.whl",
        1_254_018,
        "4c49141dcdc3b27c43cb38cec628683f6803d6316adf8abc8dfc2adcd1e851cf",
        "akshare==1.19.5",
        "MIT",
    ),
    pin_wheel(
        "quantaxis-1.10.19-py3-none-any.whl",
        1_410_799,
        "ff62e78184ffe8b4927f3c020ce66634acd42425622225d32e3ae24d79ac4085",
        "quantaxis==1.10.19",
        "MIT",
    ),
    pin_wheel(
        "funboost-55.0-py3-none-any.whl",
        3_853_336,
        "aa8f34583fe027110afc5ac4efc8bbd4ed3ebe69349fc2655fe706e009ca2a53",
        "funboost==55.0",
        "BSD",
    ),
    pin_wheel(
        "wechatpy-1.8.18-py2.py3-none-any.whl",
        159_152,
        "bfd0457dfd3f4623a490534cc9cb9c29b53f9397b3ebbee0f11ee7925b9b71f6",
        "wechatpy==1.8.18",
        "MIT",
    ),
    pin_wheel(
        "feapder-1.9.3-py3-none-any.whl",
        224_435,
        "a576152af07de699046d7590589cf24604b44efdd85b9f33be0de31c775d29b0",
        "feapder==1.9.3",
        "MIT",
    ),
    pin_wheel(
        "nonebot2-2.5.0-py3-none-any.whl",
        119_117,
        "12380d396a3d5126eeeae0a1aa53af45e9d99b63896e3e2dd6340ee436869e36",
        "nonebot2==2.5.0",
        "MIT",
    ),
    pin_wheel(
        "jionlp-1.5.31-py2.py3-none-any.whl",
        16_533_609,
        "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f",
        "jionlp==1.5.31",
        "Apache-2.0",
    ),
    pin_wheel(
        "tushare-1.4.29-py3-none-any.whl",
        142_920,
        "82554af953ea5ac3d8771d42330493181031c7e68dccce03a491c7356e9ba4b2",
        "tushare==1.4.29",
        "BSD",
    ),
)


@dataclass(frozen=True)
class FoundFunction:
    """A function of a package.

    Args:
        package: name of its distribution.
        module: path of its file with dots.
        function: its source.
    """

    package: str
    module: str
    function: source_code.SourceFunction

    @property
    def key(self) -> str:
        """Key of the row."""
        return f"{self.package}/{self.module}:{self.function.name}:{self.function.line}"

    @property
    def unit(self) -> str:
        """Name of the rows that stay together in a split: the module, or the held-out package."""
        held_out = self.package == HELD_OUT_PACKAGE
        return self.package if held_out else f"{self.package}/{self.module}"

    @property
    def module_id(self) -> tuple[str, str]:
        """Package and module."""
        return self.package, self.module

    @property
    def is_pair(self) -> bool:
        """Whether a Chinese docstring captions the function."""
        # The standard library depends on the Python version, so no test may contain it.
        if self.package == STANDARD_LIBRARY:
            return False
        return source_code.count_chinese_characters(self.function.summary) >= FEWEST_CHINESE

    def make_row(self, split: str, group: int) -> Row:
        """Return the raw row.

        Args:
            split: split that the row belongs to; ``pretrain`` has no captions.
            group: number of the caption; -1 for none.
        """
        return {
            "split": split,
            "key": self.key,
            "group": group,
            "unit": self.unit,
            "code": self.function.code,
            "captions": [self.function.summary] if group >= 0 else [],
            "package": self.package,
            "module": self.module,
        }


class FunctionsCorpus(Corpus):
    """Functions with the first paragraph of their docstrings as caption."""

    name = "functions"
    modality = "code"
    task = "text_to_code"
    version = 2
    archives: ClassVar[tuple[Archive, ...]] = ARCHIVES
    raw_schema = pa.schema(
        [
            ("code", pa.string()),
            ("captions", pa.list_(pa.string())),
            ("package", pa.string()),
            ("module", pa.string()),
        ]
    )
    columns = pa.schema(
        [
            ("tokens", pa.list_(pa.int32())),
            ("code", pa.string()),
            ("captions", pa.list_(pa.string())),
            ("caption_tokens", pa.list_(pa.list_(pa.int32()))),
            ("package", pa.string()),
            ("module", pa.string()),
        ]
    )
    omitted_columns: ClassVar = {"pretrain": frozenset({"captions", "caption_tokens"})}
    text_columns = ("code", "captions")
    shard_rows = 8_192

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield functions in the order of the packages above, then of the standard library."""
        found: list[FoundFunction] = []
        for item in self._read(sources):
            if isinstance(item, RejectedRow):
                yield item
            else:
                found.append(item)
        reasons = find_defects(found, set())
        # Only functions with a Chinese docstring are captioned; the others serve pretraining.
        pairs = [f for f in found if f.key not in reasons and f.is_pair]
        split = _split(pairs)
        held_out = {f.module_id for f in pairs if split[f.key] != "train"}
        reasons |= _leaks(pairs, split)
        ids = IdAllocator()
        for item in found:
            key = item.key
            final = split.get(key, "pretrain")
            is_evaluated = item.module_id in held_out or item.package == HELD_OUT_PACKAGE
            if key in reasons:
                yield RejectedRow(key, reasons[key])
                continue
            if final == "pretrain" and is_evaluated:
                yield RejectedRow(key, "of a module that is evaluated")
                continue
            yield item.make_row(final, ids(item.function.summary) if key in split else -1)

    def transform(self, block: pa.Table, tokenizer: Any) -> pa.Table:
        """Return the tokens of code and captions."""
        tokens = text.encode_texts(tokenizer, block["code"].to_pylist(), text.CODE_TOKENS)
        captions = block["captions"].to_pylist()
        return pa.table(
            {
                "tokens": tokens,
                "code": block["code"],
                "captions": block["captions"],
                "caption_tokens": text.encode_captions(tokenizer, captions),
                "package": block["package"],
                "module": block["module"],
            }
        )

    def preprocessing(self) -> dict[str, Any]:
        """Return the limits of the selection and of the split."""
        return {
            "shortest_body": SHORTEST_BODY,
            "fewest_chinese": FEWEST_CHINESE,
            "held_out_package": HELD_OUT_PACKAGE,
            "test": TEST,
            "validation": VALIDATION,
            "largest_test_module": LARGEST_TEST_MODULE,
            "near_twin": TWIN,
            "code_tokens": text.CODE_TOKENS,
            "caption_tokens": text.CAPTION_TOKENS,
            "split_by": "module; package",
        }

    def extra_sources(self) -> list[dict[str, str]]:
        """Return the standard library with a digest of its files."""
        root, files = _standard_library()
        content = {path.relative_to(root).as_posix(): sha256_file(path) for path in files}
        return [
            {"file": f"{STANDARD_LIBRARY}-{python_version()}", "sha256": digest_config(content)}
        ]

    def _read(self, sources: SourceArchives) -> Iterator[FoundFunction | RejectedRow]:
        yield from read_functions(sources, ARCHIVES)
        root, files = _standard_library()
        for file in files:
            path = file.relative_to(root).with_suffix("").as_posix()
            yield from _module(STANDARD_LIBRARY, path, file.read_bytes())


def read_functions(
    sources: SourceArchives, archives: tuple[Archive, ...]
) -> Iterator[FoundFunction | RejectedRow]:
    """Yield the functions of packages; test modules and files that do not parse are rejected.

    Args:
        sources: verified archives.
        archives: the packages to read.
    """
    for archive in archives:
        package = archive.requirement.split("==")[0]
        for path, data in iter_archive(sources, archive.file, "", ".py"):
            yield from _module(package, path, data)


def _standard_library() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (p for p in root.rglob("*.py") if not p.is_symlink())
    files = [p for p in found if not _SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
    # ``_sysconfigdata`` is written by the build, so it differs between machines.
    return root, sorted(p for p in files if not p.name.startswith("_sysconfigdata"))


def _module(package: str, path: str, data: bytes) -> Iterator[FoundFunction | RejectedRow]:
    parts = path.split("/")
    module = ".".join(parts)
    if _SKIPPED_FOLDERS & set(parts) or re.match(r"tests?_|conftest$", parts[-1]):
        yield RejectedRow(f"{package}/{module}", "test module")
        return
    try:
        for function in source_code.parse_functions(source_code.decode_source(data)):
            yield FoundFunction(package, module, function)
    except ValueError as error:
        yield RejectedRow(f"{package}/{module}", f"module is {error}")


def find_defects(found: list[FoundFunction], seen: set[str]) -> dict[str, str]:
    """Return key -> why the function is rejected, for any split.

    Args:
        found: functions of all packages.
        seen: results of :func:`squeeze_space` for code that is already used; extended in place.
    """
    reasons: dict[str, str] = {}
    # Documented functions first: of two copies, the copy with a docstring is used.
    for item in sorted(found, key=lambda f: not f.is_pair):
        same = squeeze_space(item.function.code)
        if len(item.function.body) < SHORTEST_BODY:
            reasons[item.key] = f"body shorter than {SHORTEST_BODY} characters"
        elif same in seen:
            reasons[item.key] = "code repeated"
        seen.add(same)
    return reasons


def squeeze_space(code: str) -> str:
    """Return code whose copies that differ in white space only are equal."""
    return re.sub(r"\s+", " ", code)


def _split(pairs: list[FoundFunction]) -> dict[str, str]:
    """Return key -> split, by module."""
    modules = defaultdict(list)
    for item in pairs:
        modules[item.module_id].append(item.key)
    split = {key: "train" for keys in modules.values() for key in keys}
    taken = 0
    for module in sorted(modules, key=lambda module: stable_hash("functions", *module)):
        keys = modules[module]
        if module[0] == HELD_OUT_PACKAGE:
            split |= dict.fromkeys(keys, "test_unseen_package")
        elif len(keys) <= LARGEST_TEST_MODULE and taken < TEST + VALIDATION:
            split |= dict.fromkeys(keys, "test" if taken < TEST else "validation")
            taken += len(keys)
    return split


def _leaks(pairs: list[FoundFunction], split: dict[str, str]) -> dict[str, str]:
    """Return key -> reason, for evaluated functions that training contains in a similar form."""
    train = [item for item in pairs if split[item.key] == "train"]
    evaluated = [item for item in pairs if split[item.key] != "train"]
    captions = {item.function.summary for item in train}
    reasons = {}
    overlaps = compute_overlaps(
        [item.function.code for item in evaluated], [item.function.code for item in train]
    )
    for item, overlap in zip(evaluated, overlaps, strict=True):
        if overlap >= TWIN:
            reasons[item.key] = "near twin of a training function"
        elif item.function.summary in captions:
            reasons[item.key] = "docstring of a training function"
    return reasons


def compute_overlaps(codes: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Return the largest Jaccard overlap of each function with one of the others, float64 (N,).

    Args:
        codes: source of N functions.
        others: source of the functions to compare with; at least one.
    """
    from scipy import sparse

    ids = IdAllocator()

    def matrix(items: Sequence[str]) -> Any:
        rows, columns = [], []
        for row, code in enumerate(items):
            tokens = re.findall(r"\w+|[^\w\s]", code)
            triples = {" ".join(tokens[i : i + 3]) for i in range(max(1, len(tokens) - 2))}
            columns += [ids(triple) for triple in sorted(triples)]
            rows += [row] * len(triples)
        return np.array(rows), np.array(columns)

    # Rows are functions, columns are token triples. The product of the sparse matrices counts the
    # shared triples of all pairs at once; a loop over the pairs would take minutes.
    a_rows, a_columns = matrix(codes)
    b_rows, b_columns = matrix(others)
    width = len(ids.numbers)

    def build(rows: np.ndarray, columns: np.ndarray, height: int) -> Any:
        values = np.ones(len(rows), np.int32)
        return sparse.csr_matrix((values, (rows, columns)), shape=(height, width))

    a, b = build(a_rows, a_columns, len(codes)), build(b_rows, b_columns, len(others))
    shared = (a @ b.T).toarray()
    # |A ∪ B| = |A| + |B| - |A ∩ B|.
    union = np.diff(a.indptr)[:, None] + np.diff(b.indptr)[None, :] - shared
    return (shared / union).max(axis=1)
