"""Fields of request bodies that need more than a look: grammars, biases, log probabilities. Pure, as openai.py."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sllmdask.batching.params import MAX_LOGPROBS, Grammar
from sllmdask.errors import InvalidRequest

#: Where clients write what an answer must look like: OpenAI's field, vLLM's, and vLLM's older ones.
GRAMMAR_FIELDS = frozenset(
    {"response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"}
)
#: What a regular expression does not take literally.
_META = re.compile(r"[\\.+*?()|\[\]{}^$]")
#: What ``structured_outputs`` may hold, by the older field of the same meaning.
_STRUCTURED = {"json": "guided_json", "regex": "guided_regex", "choice": "guided_choice", "grammar": "guided_grammar"}


def brief(value: Any) -> str:
    """`value` as JSON, cut to the length of a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_grammar(body: Mapping[str, Any]) -> tuple[Grammar, str] | None:
    """The grammar that `body` asks for, and the field that it does so by; ``None``: any text will do.

    Raises :class:`InvalidRequest` for a wrong shape, and for two grammars at a time.
    """
    found = [(grammar, name) for name in sorted(GRAMMAR_FIELDS & body.keys()) if (grammar := _read(name, body[name])) is not None]
    if len(found) > 1:
        names = " and ".join(name for _, name in found)
        raise InvalidRequest(f"{names} both say what the answer must look like; send one of them.", found[1][1])
    return found[0] if found else None


def _read(name: str, value: Any) -> Grammar | None:
    if name == "response_format":
        return _response_format(value)
    if name == "structured_outputs":
        return _structured_outputs(value)
    return _guided(name, value, name)


def _response_format(value: Any) -> Grammar | None:
    kind = value.get("type") if isinstance(value, dict) else None
    known = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
    if not isinstance(kind, str) or kind not in known:
        rule = "an object whose type is 'text', 'json_object' or 'json_schema'"
        raise InvalidRequest(f"response_format must be {rule}, not {brief(value)}.", "response_format")
    for key in sorted(value.keys() - known[kind]):
        raise InvalidRequest(f"Unknown field 'response_format.{key}' beside type {kind!r}.", f"response_format.{key}")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_schema", '{"type": "object"}')
    given = value.get("json_schema")
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict | bool):
        where = "response_format.json_schema.schema"
        raise InvalidRequest(f"{where} must be a JSON schema, not {brief(schema)}.", where)
    return Grammar("json_schema", json.dumps(schema))


def _structured_outputs(value: Any) -> Grammar | None:
    name = "structured_outputs"
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be an object, not {brief(value)}.", name)
    given = {key: item for key, item in value.items() if item is not None and item is not False}
    for key in given:
        if key not in _STRUCTURED and key != "json_object":
            known = ", ".join([*_STRUCTURED, "json_object"])
            raise InvalidRequest(f"{name}.{key} is not supported (only {known}).", f"{name}.{key}")
    if len(given) != 1:
        raise InvalidRequest(f"{name} must have exactly one of {', '.join([*_STRUCTURED, 'json_object'])}.", name)
    [(key, item)] = given.items()
    if key == "json_object":
        return Grammar("json_schema", '{"type": "object"}')
    return _guided(_STRUCTURED[key], item, f"{name}.{key}")


def _guided(name: str, value: Any, where: str) -> Grammar:
    if name == "guided_json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise InvalidRequest(f"{where} must be a JSON schema, not {brief(value)}.", where) from None
        if not isinstance(value, dict | bool):
            raise InvalidRequest(f"{where} must be a JSON schema, not {brief(value)}.", where)
        return Grammar("json_schema", json.dumps(value))
    if name == "guided_choice":
        if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
            raise InvalidRequest(f"{where} must be a list of texts, none of them empty, not {brief(value)}.", where)
        return Grammar("regex", "|".join(_META.sub(r"\\\g<0>", text) for text in value))
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{where} must be a text, not {brief(value)}.", where)
    return Grammar("regex" if name == "guided_regex" else "lark", value)


def read_bias(body: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    """``logit_bias``: token ids, as JSON's keys are texts, to what is added to their logits."""
    given = body.get("logit_bias", {})
    if not isinstance(given, dict):
        raise InvalidRequest(f"logit_bias must be an object of token ids and numbers, not {brief(given)}.", "logit_bias")
    read = []
    for token, bias in given.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 10):
            raise InvalidRequest(f"logit_bias must be for token ids, and {brief(token)} is none.", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise InvalidRequest(f"logit_bias must be a number for token {token}, not {brief(bias)}.", "logit_bias")
        read.append((int(token), float(bias) if abs(bias) < 1e308 else float("inf")))
    return tuple(read)


def read_logprobs(body: Mapping[str, Any], is_chat: bool) -> int | None:
    """How many alternatives are told for each token; ``None``: nothing is. The two routes say it in two ways."""
    wanted = body.get("logprobs", False)
    n_top = body.get("top_logprobs", 0)
    if is_chat:
        if not isinstance(wanted, bool):
            raise InvalidRequest(f"logprobs must be true or false in a chat, not {brief(wanted)}.", "logprobs")
        name, value = "top_logprobs", n_top
        if not wanted and value:
            raise InvalidRequest("top_logprobs is allowed only with logprobs: true.", "top_logprobs")
    else:
        name, value = "logprobs", wanted
        if wanted is False:
            return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_LOGPROBS:
        raise InvalidRequest(f"{name} must be an integer between 0 and {MAX_LOGPROBS}, not {brief(value)}.", name)
    return value if not is_chat or wanted else None
