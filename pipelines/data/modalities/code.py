"""Code: functions in Python without their docstrings."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.config.bounds import BoundedOptions
from pipelines.data.modalities.base import ColumnArrays, InputContext
from pipelines.data.modalities.text import StringFiles
from pipelines.data.transforms import code, text
from pipelines.data.transforms.decode_guard import decode_each
from skillnet_platform.config.bounds import PositiveCount

#: Bytes of the functions of a file together; a function contains the code of its inner ones.
MAX_FUNCTION_BYTES = 64 * 2**20


@dataclass
class CodeOptions(BoundedOptions):
    """Functions without their docstrings.

    Args:
        max_code_tokens: tokens kept of a function; CodeBERT-like models read 256.
        max_code_characters: characters kept of a function before it is tokenized.
    """

    max_code_tokens: PositiveCount = 256
    max_code_characters: PositiveCount = 20_000


class CodeFiles(StringFiles):
    """File half of code."""

    Options = CodeOptions
    noun = "a function"
    row_fields = ("code", "function", "func_code_string", "original_string")
    settings_keys = ("code_tokens", "max_code_tokens", "max_code_characters")
    limit_keys = ("max_code_tokens", "code_tokens")

    def decode(self, data: bytes, *arguments: Any) -> list[dict[str, Any]]:
        """Return the functions of a file.

        Args:
            data: bytes of the file.
            arguments: none.

        Raises:
            ValueError: the file is no Python, or has too much code.
        """
        functions, size = [], 0
        for function in code.parse_functions(code.decode_source(data)):
            functions.append(asdict(function))
            size += len(function.code)
            if size > MAX_FUNCTION_BYTES:
                raise ValueError("its functions are larger than 64 MiB together. Split the file")
        return functions

    def build_columns(
        self, block: pa.Table, tokenizer: Any, options: CodeOptions, max_bytes: int
    ) -> ColumnArrays:
        """Return functions without their docstrings, and their tokens.

        The docstring is the query, so it must not be part of the function that it has to find.
        """

        def read(source: str) -> str:
            kept = code.remove_docstring(source)[: options.max_code_characters]
            if not kept.strip():
                raise ValueError("no code beside the docstring")
            return kept

        results = list(decode_each(block["code"].to_pylist(), read))
        sources = [source or "" for source, _ in results]
        return {
            "code": pa.array(sources, pa.string()),
            "tokens": text.encode_texts(tokenizer, sources, options.max_code_tokens),
            "rejected": pa.array([reason for _, reason in results], pa.string()),
        }

    def make_input(self, value: str, name: str) -> dict[str, Any]:
        return {"name": name, "where": "", "data": value.encode("utf-8", "surrogatepass")}

    def read_inputs(self, item: Any, context: InputContext) -> list[tuple[str, np.ndarray]]:
        # The model was trained on single functions, so a file is one input for each of them.
        functions = context.decode(self.modality.name, item.data or b"")
        if not functions:
            raise ValueError("the file has no functions")
        if context.max_rows is not None and len(functions) > context.max_rows:
            most = f"more than {context.max_rows:,} functions in a request"
            raise ValueError(f"{most}. Split the file")
        if context.is_single:
            # A row of a corpus is a function with its inner ones.
            functions = [each for each in functions if not each["is_inner"]]
            if len(functions) > 1:
                raise ValueError(
                    f"{len(functions)} functions, expected one. Give a file with one function; it "
                    "may contain inner ones"
                )
        limit = context.limit_tokens(self.limit_keys)
        rows = context.tokenize([each["code"] for each in functions], limit)
        names = [f"{item.name}:{each['line']} {each['name']}" for each in functions]
        return list(zip(names, rows, strict=True))
