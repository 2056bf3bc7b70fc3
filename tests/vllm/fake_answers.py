"""What a fake engine says, in the shapes of vLLM's OpenAI server."""

import json
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MODEL = "model"
MODEL_LEN_MAX = 4096
VOCABULARY = 50_000

Json = dict[str, Any]


class Wrong(ValueError):
    """A request that vLLM would refuse with 400."""


@dataclass(frozen=True)
class Asked:
    """A request for text."""

    chat: bool
    tokens: list[int]
    max_tokens: int
    stream: bool
    usage: bool
    path: str

    @classmethod
    def of(cls, path: str, body: Json, *, chat: bool) -> "Asked":
        """Reads what the fake understands of a body.

        Raises:
            Wrong: it is too long or has no prompt.

        """
        tokens = tokens_of(as_chat(path, body), chat=chat)
        names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
        max_tokens = int(next((body[name] for name in names if body.get(name)), 16))
        if len(tokens) + max_tokens > MODEL_LEN_MAX:
            raise Wrong(
                f"This model's maximum context length is {MODEL_LEN_MAX} tokens, not {len(tokens)} + {max_tokens}."
            )
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        return cls(chat, tokens, max_tokens, bool(body.get("stream")), usage, path)


def tokens_of(body: Json, *, chat: bool) -> list[int]:
    """The ids of a prompt: given, or one for every word.

    Raises:
        Wrong: there is no prompt.

    """
    prompt = body.get("messages" if chat else "prompt")
    if chat and isinstance(prompt, list):
        prompt = " ".join(f"<{turn.get('role')}> {turn.get('content')}" for turn in prompt)
    if isinstance(prompt, str):
        return [zlib.crc32(word.encode()) % VOCABULARY for word in prompt.split()]
    if not isinstance(prompt, list) or not prompt:
        raise Wrong("the prompt is empty")
    return [int(token) for token in (prompt[0] if isinstance(prompt[0], list) else prompt)]


def as_chat(path: str, body: Json) -> Json:
    """A request of another API as the chat that vLLM makes of it, as far as the tests use it."""
    if path == "/v1/messages":
        before, turns = body.get("system"), body.get("messages", [])
    elif path == "/v1/responses":
        before, given = body.get("instructions"), body.get("input")
        turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
    else:
        return body
    return {**body, "messages": ([{"role": "system", "content": before}] if before else []) + turns}


def next_token(tokens: list[int]) -> int:
    """The greedy continuation of a text: always the same one."""
    return (tokens[-1] * 31 + len(tokens)) % VOCABULARY


def usage(asked: Asked, made: int, cached: int) -> Json:
    """Tokens as vLLM counts them with --enable-prompt-tokens-details."""
    prompt = len(asked.tokens)
    details = {"cached_tokens": cached} if cached else None
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": details,
    }


def envelope(asked: Asked, request_id: str, *, chunk: bool) -> Json:
    """What every answer and every chunk begins with."""
    kind = f"chat.completion{'.chunk' if chunk else ''}" if asked.chat else "text_completion"
    prefix = "chatcmpl" if asked.chat else "cmpl"
    return {"id": f"{prefix}-{request_id}", "object": kind, "created": int(time.time()), "model": MODEL}


def choice(asked: Asked, text: str, finish: str | None, *, chunk: bool) -> Json:
    """The one choice."""
    part: Json = {"text": text}
    if asked.chat:
        said = {"content": text} if chunk else {"role": "assistant", "content": text}
        part = {"delta" if chunk else "message": said}
    return {"index": 0, **part, "logprobs": None, "finish_reason": finish}


def whole(asked: Asked, request_id: str, made: list[int], cached: int) -> Json:
    """An answer in one piece."""
    text = "".join(f" {token}" for token in made)
    counted = {"input_tokens": len(asked.tokens), "output_tokens": len(made)}
    if asked.path == "/v1/messages":
        counted["input_tokens"] -= cached
        counted["cache_read_input_tokens"] = cached
        said = [{"type": "text", "text": text}]
        return {"id": request_id, "type": "message", "role": "assistant", "content": said, "usage": counted}
    if asked.path == "/v1/responses":
        said = [{"type": "output_text", "text": text}]
        output = [{"type": "message", "role": "assistant", "content": said}]
        details = {"input_tokens_details": {"cached_tokens": cached}}
        return {"id": request_id, "object": "response", "output": output, "usage": {**counted, **details}}
    choices = [choice(asked, text, "length", chunk=False)]
    return {**envelope(asked, request_id, chunk=False), "choices": choices, "usage": usage(asked, len(made), cached)}


def sse(value: Json | str) -> bytes:
    """One event of a stream."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def opening(asked: Asked, request_id: str) -> Iterator[bytes]:
    """A chat's first chunk names the role."""
    if asked.chat:
        delta = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield sse({**envelope(asked, request_id, chunk=True), "choices": [delta]})


def step(asked: Asked, request_id: str, token: int, *, last: bool) -> bytes:
    """One token's chunk."""
    piece = choice(asked, f" {token}", "length" if last else None, chunk=True)
    return sse({**envelope(asked, request_id, chunk=True), "choices": [piece]})


def closing(asked: Asked, request_id: str, made: int, cached: int) -> Iterator[bytes]:
    """Usage where it is asked for, and the end mark."""
    if asked.usage:
        yield sse({**envelope(asked, request_id, chunk=True), "choices": [], "usage": usage(asked, made, cached)})
    yield sse("[DONE]")


def error(status: int, kind: str, message: str) -> Json:
    """An error's body."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def models(name: str = MODEL, adapters: Sequence[str] = ()) -> Json:
    """/v1/models."""
    row = {"id": name, "object": "model", "created": 0, "owned_by": "vllm", "root": name, "parent": None}
    rows = [row, *({**row, "id": adapter, "root": f"/adapters/{adapter}", "parent": name} for adapter in adapters)]
    return {"object": "list", "data": [{**it, "max_model_len": MODEL_LEN_MAX, "permission": []} for it in rows]}
