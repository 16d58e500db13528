"""A panic of a Rust library is an ordinary error with the name of the file."""

import pytest

from skillnet.rust_panics import panics_as_errors


class PanicException(BaseException):
    """Like that of pyo3, which no module exports."""


def test_panic_becomes_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"^x\.bin is damaged \(the library failed: index 9\)$"):  # noqa: SIM117
        with panics_as_errors("x.bin is damaged"):
            raise PanicException("index 9\nnote: run with RUST_BACKTRACE=1")


def test_panic_of_a_real_library_becomes_a_value_error() -> None:
    from tokenizers import Regex, Tokenizer, models, normalizers

    # A pattern of exponential cost: the library unwraps the error of its engine.
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(Regex("(a+)+b"), "")
    with pytest.raises(ValueError, match=r"cannot be used .*retry-limit"):  # noqa: SIM117
        with panics_as_errors("cannot be used"):
            made.encode("a" * 40)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
def test_other_exceptions_pass(error: type[BaseException]) -> None:
    with pytest.raises(error), panics_as_errors("x"):
        raise error
