"""Replica of ``skillnet serve`` in Ray Serve: requests that arrive together become one batch.

The module imports Ray Serve; :mod:`pipelines.serve` loads it after Ray's environment is set.
"""

import asyncio
from typing import Any

from ray import serve

from pipelines.serving.request_rows import PredictionRequest, SearchRequest
from pipelines.serving.served_model import ServedAnswer, ServedModel, ServedModelConfig


class ModelReplica:
    """Replica of Ray Serve: a served model whose requests run in batches, one batch at a time.

    Args:
        config: of the server.
    """

    def __init__(self, config: ServedModelConfig) -> None:
        self._model = ServedModel(config)
        self._turn = asyncio.Lock()
        # Ray Serve adds these methods to the decorated one.
        batch: Any = self._predict_batch
        batch.set_max_batch_size(config.max_batch_size)
        batch.set_batch_wait_timeout_s(config.batch_wait_s)

    async def predict(self, request: PredictionRequest) -> ServedAnswer:
        """Answer a prediction request, together with others that arrive at the same time."""
        answer: ServedAnswer = await self._predict_batch(request)
        return answer

    @serve.batch
    async def _predict_batch(self, requests: list[PredictionRequest]) -> list[ServedAnswer]:
        # In a thread: health checks of Ray Serve must not wait for the model.
        async with self._turn:
            return await asyncio.to_thread(self._model.predict, requests)

    async def search(self, request: SearchRequest) -> ServedAnswer:
        """Answer a search request."""
        async with self._turn:
            return await asyncio.to_thread(self._model.search, request)

    async def render_search(self, request: SearchRequest) -> ServedAnswer:
        """Answer a search request with its page."""
        async with self._turn:
            return await asyncio.to_thread(self._model.render_search, request)
