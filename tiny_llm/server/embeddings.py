"""Owns POST /v1/embeddings: texts to vectors, as OpenAI has it."""

from __future__ import annotations

from array import array
from base64 import b64encode
from collections.abc import Sequence

from fastapi import Request
from fastapi.responses import Response

from tiny_llm.data import Completion
from tiny_llm.errors import CapacityError
from tiny_llm.server.answers import WrittenArray
from tiny_llm.server.events import large_json
from tiny_llm.server.params import inputs_of, salt_of
from tiny_llm.server.problems import problem_of
from tiny_llm.server.service import Service, aside
from tiny_llm.server.text_bodies import EmbeddingBody


async def embed(service: Service, request: Request, body: EmbeddingBody) -> Response:
    """The vector of each text. Raises what the request is refused with."""
    service.require_model(body.model)
    asked = await aside(request, lambda: inputs_of(service.llm, body))
    salt = salt_of(request.state.salt, body.cache_salt)
    try:
        ended = await service.pooled(request, asked, priority=body.priority, salt=salt)
    except CapacityError as error:
        raise problem_of(error, asked_by="input") from error
    return await large_json(lambda: _told(service.settings.name, body.encoding_format, ended))


def _told(name: str, encoding: str, ended: Sequence[Completion]) -> dict[str, object]:
    vectors = [completion.embedding for completion in ended]
    read = sum(len(completion.prompt_token_ids) for completion in ended)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, encoding)}
        for index, vector in enumerate(vectors)
        if vector is not None
    ]
    usage = {"prompt_tokens": read, "total_tokens": read}
    return {"object": "list", "data": data, "model": name, "usage": usage}


def _written(vector: array[float], encoding: str) -> object:
    """Float32 in little-endian bytes, or as numbers of so many digits that none is another's."""
    if encoding == "base64":
        return b64encode(vector.tobytes()).decode()
    return WrittenArray(lambda: (f"{value:.9g}" for value in vector))
