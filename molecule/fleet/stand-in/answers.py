"""The tokens that the stand-in engine generates, known to whoever asks: a hash of the prompt."""

from __future__ import annotations

import hashlib
from typing import Any


def tokens(prompt: str, count: int) -> list[int]:
    """The continuation of a prompt, as token ids."""
    texts = (f"{prompt}\n{position}".encode() for position in range(count))
    return [int.from_bytes(hashlib.sha256(text).digest()[:2], "big") for text in texts]


def text(token: int) -> str:
    return f"{token:05d} "


def chat_prompt(messages: list[dict[str, Any]]) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
