"""``POST /v1/embeddings``: OpenAI's schema to ours and back. Pure: no sockets, no clock.

ServerlessLLM's two fields work too: `task_instruct` and `max_length`. As in :mod:`sllmdask.server.openai`, a field that nobody
knows is refused.
"""

from __future__ import annotations

import base64
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sllmdask.engine.text import Tokenizer
from sllmdask.errors import ContextTooLong, InvalidRequest
from sllmdask.units import float32s

#: OpenAI's bound on the inputs of one request.
MAX_INPUTS = 2048
_MAX_TOKEN_ID = 2**31 - 1

_FIELDS = frozenset({"model", "input", "dimensions", "encoding_format", "prompt_name", "task_instruct", "max_length"})
#: Fields of OpenAI's and its extensions' that do not change a vector made here.
_HARMLESS = frozenset({"user", "metadata", "request_id", "priority", "safety_identifier"})

_Input = str | tuple[int, ...]


@dataclass(frozen=True)
class EmbeddingsAsk:
    """A body that was checked on its own."""

    model: str
    inputs: tuple[_Input, ...]
    as_base64: bool = False
    dimensions: int | None = None
    prompt_name: str | None = None
    task_instruct: str = ""
    #: Longer texts are cut to so many tokens; ``None``: they are refused if they are longer than the window.
    max_length: int | None = None

    @property
    def n_chars(self) -> int:
        """Characters of text to tokenise."""
        return sum(len(each) for each in self.inputs if isinstance(each, str))

    def tokenise(self, tokenizer: Tokenizer, info: Mapping[str, Any], window: int) -> list[list[int]]:
        """Token ids of each input, for the model that `info` (an ``EmbeddingInfo`` as plain types) describes.

        Raises :class:`InvalidRequest`, and :class:`ContextTooLong` for an input of more than `window` tokens.
        """
        prefix = self._prefix(info)
        encoded = []
        for i, each in enumerate(self.inputs):
            if isinstance(each, str):
                text = prefix + each
                ids = tokenizer.encode(text.lower() if info.get("lower_case") else text, self.max_length)
            else:
                ids = list(each)
                if max(ids) >= tokenizer.n_vocab:
                    raise InvalidRequest(
                        f"input[{i}] has the token id {max(ids)}, but {self.model!r} knows {tokenizer.n_vocab} ids. "
                        "Were the ids made with another model's tokenizer? Send text instead.",
                        "input",
                    )
                ids = ids[: self.max_length]
            if not ids:
                raise InvalidRequest(f"input[{i}] has no token.", "input")
            if len(ids) > window:
                raise ContextTooLong(len(ids), window)
            encoded.append(ids)
        return encoded

    def _prefix(self, info: Mapping[str, Any]) -> str:
        """What is put in front of each text: a prompt of the model's, or an instruction."""
        if self.task_instruct:
            return f"Instruct: {self.task_instruct}\nQuery: "
        prompts = info.get("prompts") or {}
        name = info.get("default_prompt") if self.prompt_name is None else self.prompt_name
        if name is None:
            return ""
        if name not in prompts:
            known = f"Known are {', '.join(map(repr, prompts))}." if prompts else "It has none."
            raise InvalidRequest(f"{self.model!r} has no prompt {name!r}. {known}", "prompt_name")
        return str(prompts[name])

    def check_dimensions(self, info: Mapping[str, Any]) -> None:
        """Raise :class:`InvalidRequest` if the model makes fewer numbers than were asked for."""
        if self.dimensions is not None and self.dimensions > info["dimensions"]:
            raise InvalidRequest(
                f"dimensions is {self.dimensions}, but the vectors of {self.model!r} have {info['dimensions']} numbers.",
                "dimensions",
            )


def read_embeddings(body: Any) -> EmbeddingsAsk:
    """Check a body of ``POST /v1/embeddings``; raises :class:`InvalidRequest` with the field."""
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    body = {name: value for name, value in body.items() if value is not None}
    for name in body.keys() - _FIELDS - _HARMLESS:
        near = difflib.get_close_matches(name, _FIELDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Remove it."
        raise InvalidRequest(f"Unknown field {name!r}. {hint}", name)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model must be the name of a model; GET /v1/models lists them.", "model")
    encoding = body.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise InvalidRequest(f"encoding_format must be 'float' or 'base64', not {encoding!r}.", "encoding_format")
    inputs = _inputs(body.get("input"))
    for name in ("prompt_name", "task_instruct"):
        if not isinstance(body.get(name, ""), str):
            raise InvalidRequest(f"{name} must be a text.", name)
        if body.get(name) and not isinstance(inputs[0], str):
            raise InvalidRequest(f"{name} is put in front of texts; input has token ids.", name)
    if body.get("task_instruct") and "prompt_name" in body:
        raise InvalidRequest("Give task_instruct or prompt_name, not both.", "task_instruct")
    return EmbeddingsAsk(
        model=model,
        inputs=inputs,
        as_base64=encoding == "base64",
        dimensions=_count(body, "dimensions"),
        prompt_name=body.get("prompt_name"),
        task_instruct=body.get("task_instruct", ""),
        max_length=_count(body, "max_length"),
    )


def answer(ask: EmbeddingsAsk, vectors: Sequence[bytes], n_tokens: int) -> dict[str, Any]:
    """The whole answer; `vectors` are little-endian float32, in the order of the inputs."""
    data = [
        {"object": "embedding", "index": i, "embedding": base64.b64encode(vector).decode() if ask.as_base64 else float32s(vector)}
        for i, vector in enumerate(vectors)
    ]
    used = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": ask.model, "usage": used}


def _inputs(value: Any) -> tuple[_Input, ...]:
    listed: Any = [value] if isinstance(value, str) or _is_ids(value) else value
    good = isinstance(listed, list) and bool(listed)
    if good and all(isinstance(each, str) for each in listed):
        if "" in listed:
            raise InvalidRequest("input must not hold an empty text.", "input")
    elif not good or not all(map(_is_ids, listed)):
        raise InvalidRequest(
            "input must be a text, a list of texts, a list of token ids, or a list of those; none empty.", "input"
        )
    if len(listed) > MAX_INPUTS:
        raise InvalidRequest(f"input has {len(listed)} inputs; send at most {MAX_INPUTS} at once.", "input")
    return tuple(each if isinstance(each, str) else tuple(each) for each in listed)


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= _MAX_TOKEN_ID for v in value)
    )


def _count(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise InvalidRequest(f"{name} must be a positive integer, not {str(value)[:60]}.", name)
    return value
