"""Served model without weights, for tests of servers."""

from dataclasses import dataclass
from typing import Any


@dataclass
class StubModel:
    """Model that answers each row with itself."""

    def describe(self) -> Any:
        """Return the description of a model with one task for searches."""
        return {
            "model": "stub",
            "manifest": "",
            "packages": [],
            "tasks": {},
            "search": {"text": ["text_to_image"]},
            "page": {"text": ["text_to_image"]},
            "ready": True,
            "indexes": {},
            "problem": "",
            "manifest_ns": 1,
        }

    def read_rows(self, request: Any, budget: Any) -> Any:
        """Return a request as it is."""
        return request

    def predict(self, requests: Any, budget: Any = None) -> Any:
        """Answer each row with its text."""
        return [
            {
                "predictions": [
                    {"row": row, "task": "stub", "answer": each_row.item.text}
                    for row, each_row in enumerate(each.rows)
                ],
                "rejected": [],
            }
            for each in requests
        ]

    def read_query(self, request: Any, budget: Any) -> Any:
        """Return what :meth:`search` needs."""
        return (request.query,)

    def search(self, request: Any, query: Any) -> Any:
        """Answer without hits, or with a page."""
        if request.is_page:
            return {"html": "<p>stub</p>"}
        return {"task": "text_to_image", "searched": 0, "hits": []}
