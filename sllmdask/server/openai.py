"""OpenAI's schema to ours and back: bodies in, chunks and answers out, and the error envelope. Pure: no sockets, no clock.

A body is read in two steps. :func:`read_chat` and :func:`read_completion` check it on its own and give an :class:`Ask`; once
the model is known, :meth:`Ask.tokenise` and :meth:`Ask.params` fit it into that model's window. A field that would change the
answer and is not supported is refused unless it has its neutral value; fields of OpenAI's that change nothing here are
accepted; any other is refused with the nearest known name, because a misspelt ``temperature`` must not pass in silence.
"""

from __future__ import annotations

import difflib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sllmdask.batching.params import SamplingParams, choice_seed
from sllmdask.batching.sequence import FinishReason
from sllmdask.engine.text import Tokenizer, is_unicode
from sllmdask.errors import Cancelled, ContextTooLong, EngineError, InvalidRequest, ModelNotFound, SllmError
from sllmdask.server.fields import GRAMMAR_FIELDS, brief, read_bias, read_grammar, read_logprobs

Json = dict[str, Any]

#: Answers that one body may ask for, over all of its prompts; each is a request of its own in the queue.
MAX_PROMPTS = 128
#: OpenAI's bound.
MAX_STOPS = 4
MAX_TOKEN_ID = 2**31 - 1
#: Longest ``Retry-After`` that the OpenAI client honours; above it, it does not retry at all.
MAX_RETRY_AFTER_S = 120

ROLES = ("system", "developer", "user", "assistant", "tool")

#: A model's state in its record, as llama.cpp's router names it in ``GET /v1/models``.
STATUS = {
    "host": "sleeping",
    "fetching": "loading",
    "reading": "loading",
    "loading": "loading",
    "ready": "loaded",
    "draining": "loaded",
    "failed": "failed",
}

_SAMPLING = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "stop_token_ids",
        "min_tokens",
        "ignore_eos",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "n",
    }
)
_COMMON = _SAMPLING | GRAMMAR_FIELDS | {"model", "stream", "stream_options", "max_tokens", "max_completion_tokens"}
_CHAT = _COMMON | {"messages", "chat_template_kwargs", "top_logprobs"}
_COMPLETION = _COMMON | {"prompt", "echo", "best_of"}

#: Fields of OpenAI's and its extensions' that do not change an answer made here.
_HARMLESS = frozenset(
    {
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)

#: Fields that would change the answer: what they may be, since it means "as usual". ``None`` always may.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}


# --- bodies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A body that was checked on its own. `prompts` holds texts or token ids; a chat has `messages` instead."""

    model: str
    #: ``max_tokens`` in it is a placeholder; see :meth:`params`.
    sampling: SamplingParams
    #: ``None``: as many as the window holds.
    max_tokens: int | None = None
    #: ``None``: every prompt draws its own.
    seed: int | None = None
    #: Answers to each prompt.
    n: int = 1
    #: Whether each answer begins with its prompt.
    echo: bool = False
    #: The field that the grammar came in.
    grammar_field: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    prompts: tuple[str | tuple[int, ...], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    #: Fields of the body; what is not among them is the model's to choose.
    given: frozenset[str] = field(default=frozenset(), compare=False)
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)

    @property
    def prompt_only(self) -> bool:
        """Whether nothing is to be shown but the prompts; the one token that the engine draws is dropped."""
        return self.max_tokens == 0

    @property
    def n_chars(self) -> int:
        """Characters of text to tokenise."""
        return sum(len(message["content"]) for message in self.messages) + sum(
            len(text) for text in self.prompts if _is(text, str)
        )

    def with_defaults(self, defaults: Mapping[str, Any]) -> Ask:
        """The same, drawn by what the model's ``generation_config.json`` says where the body says nothing."""
        changes = {name: value for name, value in defaults.items() if name not in self.given}
        return replace(self, sampling=replace(self.sampling, **changes))

    def tokenise(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of each prompt; raises :class:`InvalidRequest` for what this model's tokenizer cannot mean."""
        strange = [token for token, _ in self.sampling.logit_bias if token >= tokenizer.n_vocab]
        if strange:
            raise InvalidRequest(
                f"logit_bias names the token id {strange[0]}, but {self.model!r} knows {tokenizer.n_vocab} ids. "
                "Were the ids made with another model's tokenizer?",
                "logit_bias",
            )
        if self.is_chat:
            return [tokenizer.encode_chat([dict(message) for message in self.messages], **self.template_kwargs)]
        encoded = []
        for prompt in self.prompts:
            if isinstance(prompt, str):
                ids = tokenizer.encode(prompt)
            else:
                ids = list(prompt)
                if ids and max(ids) >= tokenizer.n_vocab:
                    raise InvalidRequest(
                        f"prompt has the token id {max(ids)}, but {self.model!r} knows {tokenizer.n_vocab} ids. "
                        "Were the ids made with another model's tokenizer? Send text instead.",
                        "prompt",
                    )
            if not ids:
                raise InvalidRequest("prompt is empty: the model needs at least one token to go on from.", "prompt")
            encoded.append(ids)
        return encoded

    def params(self, n_prompt_tokens: int, max_model_len: int) -> SamplingParams:
        """How to sample after a prompt of this length: the answer is cut to what the window still holds."""
        room = max_model_len - n_prompt_tokens
        if room < 1:
            raise ContextTooLong(n_prompt_tokens, max_model_len)
        max_tokens = min(room, 1 if self.prompt_only else self.max_tokens or room)
        seed = secrets.randbits(64) if self.seed is None else self.seed
        return replace(self.sampling, max_tokens=max_tokens, min_tokens=min(self.sampling.min_tokens, max_tokens), seed=seed)

    def choices(self, n_prompt_tokens: int, max_model_len: int) -> list[SamplingParams]:
        """How to sample each of the `n` answers to a prompt of this length."""
        params = self.params(n_prompt_tokens, max_model_len)
        return [replace(params, seed=choice_seed(params.seed, index)) for index in range(self.n)]

    def echoed(self, prompt: int, tokenizer: Tokenizer) -> str | None:
        """What the answers to prompt number `prompt` begin with; ``None``: nothing was asked for."""
        if not self.echo:
            return None
        given = self.prompts[prompt]
        return given if isinstance(given, str) else tokenizer.decode(given)


def read_chat(body: Any) -> Ask:
    """Check a body of ``POST /v1/chat/completions``; raises :class:`InvalidRequest` with the field."""
    body = _known(body, _CHAT)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list of at least one message.", "messages")
    template_kwargs = body.get("chat_template_kwargs") or {}
    if not isinstance(template_kwargs, dict):
        raise _wrong(body, "chat_template_kwargs", "an object")
    read = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))
    return Ask(messages=read, template_kwargs=template_kwargs, **_common(body, is_chat=True))


def read_completion(body: Any) -> Ask:
    """Check a body of ``POST /v1/completions``; raises :class:`InvalidRequest` with the field."""
    body = _known(body, _COMPLETION)
    prompt = body.get("prompt")
    prompts: list[Any] = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts or not (all(_is(p, str) for p in prompts) or all(map(_is_ids, prompts))):
        raise InvalidRequest("prompt must be a text, a list of texts, a list of token ids, or a list of those.", "prompt")
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt has {len(prompts)} prompts; send at most {MAX_PROMPTS} at once.", "prompt")
    ask = Ask(prompts=tuple(p if isinstance(p, str) else tuple(p) for p in prompts), **_common(body, is_chat=False))
    if len(prompts) * ask.n > MAX_PROMPTS:
        raise InvalidRequest(f"n is {ask.n} for each of {len(prompts)} prompts; send at most {MAX_PROMPTS} answers at once.", "n")
    best_of = _integer(body, "best_of", ask.n)
    if best_of != ask.n:
        raise InvalidRequest(f"best_of is supported only where it equals n ({ask.n}), and it is {best_of}.", "best_of")
    echo = _flag(body, "echo")
    if not echo:
        return ask
    return replace(ask, echo=True, sampling=replace(ask.sampling, prompt_logprobs=ask.sampling.logprobs))


def _known(body: Any, known: frozenset[str]) -> dict[str, Any]:
    """`body` without its nulls, once no field in it is unknown or asks for what is not supported."""
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    for name, value in body.items():
        if name in known or name in _HARMLESS or value is None:
            continue
        if name in ("tools", "functions") and body.get("tool_choice", body.get("function_call")) == "none":
            continue
        if name not in _NEUTRAL:
            near = difflib.get_close_matches(name, [*known, *_NEUTRAL, *_HARMLESS], n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Remove it."
            raise InvalidRequest(f"Unknown field {name!r}. {hint}", name)
        if not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
            hint = f" (only {' or '.join(json.dumps(neutral) for neutral in _NEUTRAL[name])})" if _NEUTRAL[name] else ""
            raise InvalidRequest(f"{name} is not supported{hint}, and the answer would not be what was asked for.", name)
    return {name: value for name, value in body.items() if value is not None}


def _common(body: Mapping[str, Any], is_chat: bool) -> dict[str, Any]:
    """The fields that both kinds of body share, as arguments of :class:`Ask`."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model must be the name of a model; GET /v1/models lists them.", "model")
    asked = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    max_tokens = _integer(body, asked)
    # An echo alone, for the log probabilities of a prompt, is an answer too.
    if max_tokens is not None and max_tokens < (0 if not is_chat and body.get("echo") is True else 1):
        raise _wrong(body, asked, "at least 1")
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    good = isinstance(stop, list) and all(_is(text, str) and text and is_unicode(text) for text in stop)
    if not good or len(stop) > MAX_STOPS:
        raise _wrong(body, "stop", f"a text or up to {MAX_STOPS} texts, none of them empty")
    stop_ids = body.get("stop_token_ids", [])
    if stop_ids != [] and not _is_ids(stop_ids):
        raise _wrong(body, "stop_token_ids", "a list of token ids")
    top_k = _integer(body, "top_k", 0)
    min_tokens = _integer(body, "min_tokens", 0)
    seed = _integer(body, "seed")
    n = _integer(body, "n", 1)
    if not 1 <= n <= MAX_PROMPTS:
        raise _wrong(body, "n", f"between 1 and {MAX_PROMPTS}")
    grammar, grammar_field = read_grammar(body) or (None, None)
    sampling = SamplingParams(
        max_tokens=max_tokens or max(min_tokens, 1),
        temperature=_number(body, "temperature", 1.0),
        top_p=_number(body, "top_p", 1.0),
        top_k=0 if top_k == -1 else top_k,  # vLLM's clients switch it off with -1
        min_p=_number(body, "min_p", 0.0),
        stop=tuple(stop),
        stop_token_ids=tuple(stop_ids),
        min_tokens=min_tokens,
        ignore_eos=_flag(body, "ignore_eos"),
        repetition_penalty=_number(body, "repetition_penalty", 1.0),
        presence_penalty=_number(body, "presence_penalty", 0.0),
        frequency_penalty=_number(body, "frequency_penalty", 0.0),
        logit_bias=read_bias(body),
        logprobs=read_logprobs(body, is_chat),
        grammar=grammar,
    )
    stream = _flag(body, "stream")
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise _wrong(body, "stream_options", "an object")
    if "stream_options" in body and not stream:
        raise InvalidRequest("stream_options is allowed only with stream: true.", "stream_options")
    for name in options:
        if name not in ("include_usage", "continuous_usage_stats", "include_obfuscation"):
            raise InvalidRequest(f"Unknown field 'stream_options.{name}'.", f"stream_options.{name}")
    continuous = _flag(options, "continuous_usage_stats")
    return {
        "model": model,
        "sampling": sampling,
        "max_tokens": max_tokens,
        "seed": None if seed is None else seed % 2**64,
        "n": n,
        "grammar_field": grammar_field,
        "stream": stream,
        "include_usage": _flag(options, "include_usage") or continuous,
        "continuous_usage": continuous,
        "given": frozenset(body),
    }


def _message(message: Any, where: str) -> dict[str, Any]:
    """One message of a chat as a template wants it: content a text, ``developer`` the ``system`` of older templates."""
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object with a role and a content.", where)
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}, not {brief(role)}.", f"{where}.role")
    content, calls = message.get("content"), message.get("tool_calls")
    if calls and (role != "assistant" or not isinstance(calls, list) or not all(_is(call, dict) for call in calls)):
        raise InvalidRequest(f"{where}.tool_calls must be a list of calls in an assistant's message.", f"{where}.tool_calls")
    read = {"role": "system" if role == "developer" else role, "content": _content(content, f"{where}.content", bool(calls))}
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            read[name] = message[name]
        elif message.get(name) is not None:
            raise InvalidRequest(f"{where}.{name} must be a text.", f"{where}.{name}")
    return {**read, "tool_calls": calls} if calls else read


def _content(content: Any, where: str, may_be_null: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_null:
        return ""
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{where} must be a text or a list of text parts, not {brief(content)}.", where)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise InvalidRequest(f"{where}[{i}] must be a part of type 'text' with a text, not {brief(kind)}.", f"{where}[{i}]")
    return "\n".join(part["text"] for part in content)


def _is(value: Any, cls: type) -> bool:
    return isinstance(value, cls)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_integer(v) and 0 <= v <= MAX_TOKEN_ID for v in value)


def _same(value: Any, neutral: Any) -> bool:
    """Equal in JSON's eyes: ``0`` is ``0.0`` and not ``false``."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _wrong(body: Mapping[str, Any], name: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {rule}, not {brief(body[name])}.", name)


def _integer(body: Mapping[str, Any], name: str, default: int | None = None) -> Any:
    value = body.get(name, default)
    if value is not None and not _is_integer(value):
        raise _wrong(body, name, "an integer")
    return value


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(body, name, "a number")
    return float(value) if abs(value) < 1e308 else float("inf")  # an integer may be larger than any float


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _wrong(body, name, "true or false")
    return value


# --- answers ---------------------------------------------------------------------------------------------------------


def usage(n_prompt_tokens: int, n_tokens: int) -> dict[str, Any]:
    """OpenAI's account of one response."""
    return {
        "prompt_tokens": n_prompt_tokens,
        "completion_tokens": n_tokens,
        "total_tokens": n_prompt_tokens + n_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def finish_reason(reason: FinishReason) -> str:
    """OpenAI's word for how a sequence ended; an end that is no answer raises."""
    if reason is FinishReason.ABORT:
        raise Cancelled("The request was cancelled.")
    if reason is FinishReason.ERROR:
        raise EngineError("The engine could not finish this request. Send it again.")
    return reason.value


@dataclass(frozen=True)
class Choice:
    """One finished answer."""

    text: str
    finish_reason: str
    n_tokens: int
    #: In the shape of its route; see server/choices.py.
    logprobs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Shape:
    """What every object of one response shares: its kind, id, time (seconds since the epoch) and model."""

    is_chat: bool
    id: str
    created: int
    model: str
    #: Streams that were asked for usage carry ``usage: null`` in every other chunk.
    with_usage: bool = False

    def answer(self, choices: Sequence[Choice], n_prompt_tokens: int) -> dict[str, Any]:
        """The whole answer; `n_prompt_tokens` counts a prompt once, however many answers it has."""
        made = []
        for i, choice in enumerate(choices):
            content: dict[str, Any] = {"text": choice.text}
            if self.is_chat:
                content = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            made.append({"index": i, **content, "logprobs": choice.logprobs, "finish_reason": choice.finish_reason})
        total = usage(n_prompt_tokens, sum(choice.n_tokens for choice in choices))
        return {**self._head(streamed=False), "choices": made, "usage": total}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before the first text: a chat says who speaks."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None, None) if self.is_chat else None

    def piece(self, index: int, text: str, logprobs: Json | None = None, running_usage: Json | None = None) -> Json:
        content: dict[str, Any] = {"delta": {"content": text}} if self.is_chat else {"text": text}
        return self._chunk(index, content, logprobs, None, running_usage)

    def end(self, index: int, reason: str, logprobs: Json | None = None, running_usage: Json | None = None) -> Json:
        return self._chunk(index, {"delta": {}} if self.is_chat else {"text": ""}, logprobs, reason, running_usage)

    def total(self, n_prompt_tokens: int, n_tokens: int) -> dict[str, Any]:
        """The chunk after the last choice's end, sent only when asked for."""
        return {**self._head(streamed=True), "choices": [], "usage": usage(n_prompt_tokens, n_tokens)}

    def _chunk(self, index: int, content: Json, logprobs: Json | None, reason: str | None, used: Json | None) -> Json:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head(streamed=True), "choices": [choice]}
        return {**chunk, "usage": used} if self.with_usage else chunk

    def _head(self, streamed: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if streamed else "chat.completion") if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


# --- models and errors -----------------------------------------------------------------------------------------------


def model_object(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the gateway's mirror as an object of ``GET /v1/models``."""
    return {
        "id": row["model"],
        "object": "model",
        "created": int(row["created"]),
        "owned_by": "sllmdask",
        "max_model_len": row["max_model_len"],
        "status": {"value": STATUS.get(row["state"], "unloaded")},
        **({"parent": row["parent"]} if "parent" in row else {}),
    }


def find_model(rows: Iterable[Mapping[str, Any]], model: str) -> Mapping[str, Any]:
    """The row of `model`; raises :class:`ModelNotFound` with near names."""
    by_name = {row["model"]: row for row in rows}
    if model not in by_name:
        raise ModelNotFound(model, difflib.get_close_matches(model, by_name, n=3))
    return by_name[model]


def envelope(error: SllmError) -> dict[str, Any]:
    """The body of every error."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def retry_after_s(error: SllmError) -> int | None:
    """Whole seconds for ``Retry-After``; ``None``: say nothing."""
    seconds = getattr(error, "retry_after_s", None)
    return None if seconds is None else max(1, min(MAX_RETRY_AFTER_S, round(seconds)))


def dumps(value: Any) -> bytes:
    """JSON in UTF-8, without escapes for what UTF-8 can say; half a surrogate pair, which it cannot, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def loads(body: bytes) -> Any:
    """The JSON in `body`; raises :class:`InvalidRequest`."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise InvalidRequest("The body is not acceptable JSON: it is nested too deeply.") from None
    except ValueError as error:  # also what is not Unicode, and numbers of thousands of digits
        raise InvalidRequest(f"The body is not valid JSON: {error}") from None
