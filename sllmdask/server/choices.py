"""One choice of an answer as its tokens come: its text, the prompt before it, and log probabilities in its route's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sllmdask.batching.params import TokenLogprobs
from sllmdask.cluster.journal import Delta
from sllmdask.engine.text import TextStream, Tokenizer

#: What OpenAI writes for a token that is most unlikely; JSON has no infinity.
LOWEST = -9999.0


class ChoiceWriter:
    """Turns the deltas of one choice into what is shown of it.

    :param echo: the prompt's text, where the answer begins with it
    :param scores: collects log probabilities, where they are asked for
    """

    def __init__(self, echo: str = "", scores: ChatScores | CompletionScores | None = None) -> None:
        self._echo = echo
        self._scores = scores

    def add(self, delta: Delta) -> str:
        """The text to show now, maybe none."""
        if self._scores is not None:
            self._scores.add(delta)
        text, self._echo = self._echo + delta.text, ""
        return text

    def scores(self) -> dict[str, Any] | None:
        """``logprobs`` of the tokens that came since this was asked last; ``None``: none came, or they were not asked for."""
        return None if self._scores is None else self._scores.take()


def make_writer(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], *, is_chat: bool, n_top: int | None, echo: str | None
) -> ChoiceWriter:
    """`n_top`: alternatives per token, ``None`` for no log probabilities; `echo`: the prompt's text, ``None`` for no echo."""
    if n_top is None:
        return ChoiceWriter(echo or "")
    scores = ChatScores(tokenizer) if is_chat else CompletionScores(tokenizer, prompt_ids if echo is not None else (), echo or "")
    return ChoiceWriter(echo or "", scores)


class ChatScores:
    """``logprobs`` of a chat: one entry for each token that ``usage`` counts, the end of the answer included."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._entries: list[dict[str, Any]] = []

    def add(self, delta: Delta) -> None:
        for token_id, told in zip(delta.token_ids, delta.logprobs, strict=True):
            top = [self._named(*each) for each in zip(told.top_ids, told.top_logprobs, strict=True)]
            self._entries.append({**self._named(token_id, told.logprob), "top_logprobs": top})

    def take(self) -> dict[str, Any] | None:
        entries, self._entries = self._entries, []
        return {"content": entries, "refusal": None} if entries else None

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelt = self._tokenizer.token_bytes(token_id)
        return {"token": shown(spelt), "logprob": max(logprob, LOWEST), "bytes": list(spelt)}


class CompletionScores:
    """``logprobs`` of a completion, those of its prompt first where it is echoed.

    ``top_logprobs`` always has the token itself, so it may hold one more than were asked for. ``text_offset`` is where the
    text of a token begins, in characters; parts of one character begin where it does.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], echo: str) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._echo = echo
        self._text: TextStream = tokenizer.stream()
        self._offset = 0
        self._clear()

    def add(self, delta: Delta) -> None:
        if self._prompt_ids and delta.prompt_logprobs is not None:
            for token_id, told in zip(self._prompt_ids, (None, *delta.prompt_logprobs), strict=True):
                self._append(token_id, told)
            # The answer's text begins where the prompt's ends, however the prompt's tokens add up.
            self._prompt_ids, self._offset, self._text = (), len(self._echo), self._tokenizer.stream()
        for token_id, told in zip(delta.token_ids, delta.logprobs, strict=True):
            self._append(token_id, told)

    def take(self) -> dict[str, Any] | None:
        taken = self._made
        self._clear()
        return taken if taken["tokens"] else None

    def _append(self, token_id: int, told: TokenLogprobs | None) -> None:
        self._made["tokens"].append(self._shown(token_id))
        self._made["text_offset"].append(self._offset)
        self._offset += len(self._text.push([token_id]))
        if told is None:
            self._made["token_logprobs"].append(None)
            self._made["top_logprobs"].append(None)
            return
        own = max(told.logprob, LOWEST)
        top = {self._shown(i): max(value, LOWEST) for i, value in zip(told.top_ids, told.top_logprobs, strict=True)}
        self._made["token_logprobs"].append(own)
        self._made["top_logprobs"].append({**top, self._shown(token_id): own})

    def _shown(self, token_id: int) -> str:
        return shown(self._tokenizer.token_bytes(token_id))

    def _clear(self) -> None:
        self._made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def shown(spelt: bytes) -> str:
    r"""A token as text; bytes that are only a part of a character as ``\xe2``, as OpenAI writes them."""
    return spelt.decode("utf-8", "backslashreplace")
