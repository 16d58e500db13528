"""Are two prepared versions of a corpus equal up to rounding errors?

    python -m lab.equal_versions DATA-A/corpus DATA-B/corpus --output results/study

The order of rows and every value must be equal, but floating-point numbers may differ by
``--tolerance``. With ``--output`` the result is recorded in a study or its kept results, so that
``skillnet compare`` accepts its runs of both versions; see
:mod:`skillnet_studies.analysis.finished_runs`.

NumPy computes some functions with the vector instructions of the processor, and they can round
differently. The version of a processor without AVX-512 is prepared on one with it by
``NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR" skillnet prepare CORPUS``.
"""

import argparse
import datetime
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_studies.analysis.finished_runs import EQUAL_VERSIONS, list_equal_versions
from skillnet_studies.study.kept_results import open_study, write_document


@dataclass
class VersionDifference:
    """Differences of the floating-point numbers of two versions.

    Args:
        rows: compared rows.
        values: compared floating-point numbers.
        different: numbers that differ.
        largest: largest absolute difference.
    """

    rows: int = 0
    values: int = 0
    different: int = 0
    largest: float = 0.0

    def add_table(self, one: pa.Table, other: pa.Table, where: str) -> None:
        """Compare a split of both.

        Args:
            one: rows of the first version.
            other: rows of the second version.
            where: name of the split, for error messages.

        Raises:
            UserError: something else than a floating-point number differs.
        """
        if one.schema != other.schema or len(one) != len(other):
            raise UserError(f"{where}: the versions have other columns or another number of rows")
        self.rows += len(one)
        for name in one.column_names:
            left, right = one[name].combine_chunks(), other[name].combine_chunks()
            while pa.types.is_nested(left.type) and not pa.types.is_struct(left.type):
                # A fixed list has no offsets; the lengths of others decide what belongs together.
                if hasattr(left, "offsets") and not left.offsets.equals(right.offsets):
                    raise UserError(f"{where}: values of {name} have other lengths")
                left, right = left.flatten(), right.flatten()
            if pa.types.is_floating(left.type):
                self._add_values(left, right)
            elif not left.equals(right):
                raise UserError(f"{where}: values of {name} differ")

    def _add_values(self, left: pa.Array, right: pa.Array) -> None:
        left_N, right_N = np.asarray(left, float), np.asarray(right, float)
        gaps_N = np.abs(left_N - right_N)
        gaps_N[np.isnan(left_N) & np.isnan(right_N)] = 0.0
        # A value that only one version has is no rounding error.
        gaps_N[np.isnan(gaps_N)] = np.inf
        self.values += gaps_N.size
        self.different += int((gaps_N > 0).sum())
        self.largest = max(self.largest, float(gaps_N.max(initial=0.0)))


def compare_versions(one: PreparedCorpus, other: PreparedCorpus) -> VersionDifference:
    """Compare two versions of a corpus value by value.

    Args:
        one: the first version.
        other: the second.

    Raises:
        UserError: they are no versions of one corpus, or more differs than rounding explains.
    """
    names = {key: (one.manifest.get(key), other.manifest.get(key)) for key in ("corpus", "symbols")}
    names["splits"] = (sorted(one.splits), sorted(other.splits))
    for key, (first, second) in names.items():
        if first != second:
            raise UserError(f"{other.path}: {key} differs from that of {one.path}")
    difference = VersionDifference()
    for name, split in one.splits.items():
        difference.add_table(split.table(), other.splits[name].table(), f"split {name}")
    return difference


def main(argv: list[str] | None = None) -> int:
    """Compare two versions, and record in a study that they are equal."""
    parser = argparse.ArgumentParser(prog="python -m lab.equal_versions")
    parser.add_argument("first", type=Path, help="a prepared corpus")
    parser.add_argument("second", type=Path, help="another version of it")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="largest difference")
    parser.add_argument("--output", type=Path, help="directory of a study, or its kept results")
    options = parser.parse_args(argv)
    try:
        one, other = (open_corpus(path, verify=True) for path in (options.first, options.second))
        found = compare_versions(one, other)
    except UserError as error:
        parser.error(str(error))
    console.print_note(
        f"{found.rows} rows: {found.different} of {found.values} floating-point numbers differ, by "
        f"{found.largest:.1e} at most; all else is equal"
    )
    if found.largest > options.tolerance:
        console.print_warning(f"more than {options.tolerance:g}: these are different data")
        return 1
    if options.output:
        entry = {
            "corpus": one.manifest["corpus"],
            "versions": [one.digest, other.digest],
            **vars(found),
            "tolerance": options.tolerance,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        known = list_equal_versions(open_study(options.output))
        pairs = [each for each in known if each["versions"] != entry["versions"]]
        write_document(options.output, EQUAL_VERSIONS, {"pairs": [*pairs, entry]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
