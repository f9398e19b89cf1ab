"""A chat API whose traffic is judged in shadow mode: users see what they always saw, and the log fills.

    pip install -e ".[serve,openai]"
    CAI_MODEL=openai:gpt-5-mini uvicorn --app-dir examples shadow_api:api
    curl -N localhost:8000/chat -H 'content-type: application/json' -d '{"message": "hello"}'

`mode="shadow"` lets each answer leave untouched, streams included; critique and revision run behind it.
One answer in two is judged here; CAI_SAMPLE says another share, from 0 to 1. `/tally` shows what became of
them: nothing is lost without being counted.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from cai_graph import constitutional, models

guarded = constitutional(
    models.load(os.environ.get("CAI_MODEL", "local")),
    mode="shadow",
    sample=float(os.environ.get("CAI_SAMPLE", "0.5")),
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Judge what still waits before the server goes."""
    yield
    await guarded.shadow.aclose()


api = FastAPI(title="A chat in shadow mode", lifespan=lifespan)


class Asked(BaseModel):
    """A user's message."""

    message: str
    user: str | None = None


@api.post("/chat")
async def chat(asked: Asked) -> StreamingResponse:
    """Answer as the bare model would, word by word."""
    config: Any = {"metadata": {"user": asked.user}}

    async def words() -> AsyncIterator[str]:
        async for chunk in guarded.astream(asked.message, config):
            yield chunk.text

    return StreamingResponse(words(), media_type="text/plain; charset=utf-8")


@api.get("/tally")
async def tally() -> dict[str, int]:
    """Return what became of the answers so far."""
    return asdict(guarded.shadow.tally)
