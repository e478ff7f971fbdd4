"""Which tokens a grammar lets come next: JSON schemas, regular expressions and Lark grammars, by llguidance.

llguidance is optional (``sllmdask[json]``). A matcher is at the place to which its tokens have brought it, and at no other: a
request that moves brings its grammar's text and its tokens, and is matched anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sllmdask.batching.params import Grammar
from sllmdask.engine.text import Tokenizer
from sllmdask.errors import CheckpointNotFound, InvalidRequest

#: What may stand between the parts of JSON: a space, or a new line with an indentation. Were any whitespace allowed, a weak model
#: might write nothing else until its last token.
JSON_WHITESPACE = r"(\n {0,32}| )"
#: Characters of a reason; some go on with the whole state of the parser.
MAX_REASON = 300
#: Compiled grammars that one model keeps; requests for JSON send the same few again and again.
MAX_COMPILED = 64


def _llguidance(param: str) -> ModuleType:
    """The package; raises :class:`InvalidRequest` for the field `param` where it is not installed."""
    try:
        import llguidance
    except ImportError:
        message = f"{param} needs the package llguidance, which is not installed here: pip install 'sllmdask[json]'"
        raise InvalidRequest(message, param) from None
    module: ModuleType = llguidance
    return module


def _source(llguidance: ModuleType, grammar: Grammar, param: str) -> str:
    """`grammar` in the language that a matcher takes."""
    matcher = llguidance.LLMatcher
    try:
        if grammar.kind == "json_schema":
            return str(matcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": JSON_WHITESPACE}))
        if grammar.kind == "regex":
            return str(matcher.grammar_from_regex(grammar.text))
        return str(matcher.grammar_from_lark(grammar.text))
    except ValueError as error:
        raise _refused(error, param) from None


def _refused(reason: object, param: str) -> InvalidRequest:
    said = " ".join(str(reason).split())
    return InvalidRequest(f"{param} cannot be made into a grammar: {said[:MAX_REASON]}", param)


def check_grammar(grammar: Grammar, param: str = "grammar") -> None:
    """Raise :class:`InvalidRequest`, naming the field `param` and the reason, for what no matcher can be made of.

    Takes milliseconds, and up to a second for a very large schema.
    """
    llguidance = _llguidance(param)
    failed, said = llguidance.LLMatcher.validate_grammar_with_warnings(_source(llguidance, grammar, param))
    if failed:
        raise _refused(said[0], param)


class GrammarMatcher:
    """Where one request is in its grammar."""

    def __init__(self, matcher: Any, n_vocab: int, ends: NDArray[np.int64], end: int) -> None:
        self._matcher = matcher
        self._n_vocab = n_vocab
        self._ends, self._end = ends, end

    def consume(self, tokens: Iterable[int]) -> None:
        """Go on by tokens of the answer. Raises ``ValueError`` for one that the grammar does not allow."""
        for token in tokens:
            if not self._matcher.consume_token(token):
                raise ValueError(f"the grammar cannot go on with token {token}: {self._matcher.get_error()}")

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """(vocab,) the tokens that may come next; an end-of-sequence token where the answer may end. Raises ``ValueError``."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot go on: {self._matcher.get_error()}")
        bits = np.unpackbits(packed, count=max(self._n_vocab, self._end + 1), bitorder="little").view(np.bool_)
        allowed = bits[: self._n_vocab]
        allowed[self._ends] = bits[self._end]
        return allowed


class GrammarCompiler:
    """Makes matchers over one model's tokens. May be used by several threads.

    :param directory: of the checkpoint, for its tokenizer, which is read when the first grammar comes (about a second)
    :param n_vocab: width of the model's output
    :param eos_token_ids: tokens that end an answer where its grammar lets it end
    """

    def __init__(self, directory: Path, n_vocab: int, eos_token_ids: frozenset[int]) -> None:
        self._directory = directory
        self._n_vocab = n_vocab
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def prepare(self, grammar: Grammar, directory: Path | None = None) -> None:
        """Compile `grammar`, so that :meth:`matcher` need not. Raises :class:`InvalidRequest`.

        `directory`: where the checkpoint is by now.
        """
        with self._lock:
            self._directory = directory or self._directory
            self._compile(grammar)

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the beginning of `grammar`. Raises :class:`InvalidRequest`."""
        compiled = self._compiled.get(grammar)
        if compiled is None:  # what is there already does not wait for what somebody else compiles
            with self._lock:
                compiled = self._compile(grammar)
        end = int(self._tokenizer.eos_token)
        ends = [token for token in self._eos_token_ids or {end} if token < self._n_vocab]
        return GrammarMatcher(compiled.deep_copy(), self._n_vocab, np.array(ends, dtype=np.int64), end)

    def _compile(self, grammar: Grammar) -> Any:
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar]
        llguidance = _llguidance("grammar")
        if self._tokenizer is None:
            self._tokenizer = self._read_tokenizer(llguidance)
        compiled = llguidance.LLMatcher(self._tokenizer, _source(llguidance, grammar, "grammar"), log_level=0)
        if compiled.is_error():
            raise _refused(compiled.get_error(), "grammar")
        self._compiled[grammar] = compiled
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return compiled

    def _read_tokenizer(self, llguidance: ModuleType) -> Any:
        try:
            tokenizer = Tokenizer.from_directory(self._directory)
        except CheckpointNotFound as error:
            raise InvalidRequest(
                f"The model has no tokenizer that a grammar could be matched with. {error.message}", "grammar"
            ) from None
        n_vocab = max(self._n_vocab, tokenizer.n_vocab)
        return llguidance.LLTokenizer(tokenizer.description, n_vocab=n_vocab, eos_token=min(self._eos_token_ids, default=None))
