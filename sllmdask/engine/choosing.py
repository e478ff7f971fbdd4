"""What choosing the next token of one sequence needs to know of its tokens so far.

All of it follows from the tokens: after a preemption it is still true, and on another worker it is made again from them.
"""

from __future__ import annotations

from sllmdask.batching.params import TokenLogprobs
from sllmdask.batching.scheduler import Chunk
from sllmdask.batching.sequence import Sequence
from sllmdask.engine.grammar import GrammarCompiler
from sllmdask.engine.logprobs import PromptLogprobs
from sllmdask.engine.sampler import Draw, TokenCounts
from sllmdask.errors import InvalidRequest


class Chooser:
    """Counts for penalties, the place in the grammar, and what was told of the prompt. It follows its sequence token by token."""

    def __init__(self, sequence: Sequence, n_vocab: int, grammars: GrammarCompiler) -> None:
        """Raises :class:`InvalidRequest` for what this model cannot do."""
        params = sequence.params
        strange = [token for token, _ in params.logit_bias if token >= n_vocab]
        if strange:
            raise InvalidRequest(
                f"logit_bias names token {strange[0]}, but the model has {n_vocab} tokens. Were the ids made with another "
                "model's tokenizer?",
                "logit_bias",
            )
        self._counts = None
        if params.penalised:
            self._counts = TokenCounts(sequence.prompt_ids if params.repetition_penalty != 1 else ())
        self._matcher = None if params.grammar is None else grammars.matcher(params.grammar)
        # A sequence that brings tokens had them told where it got the first of them.
        self._prompt = None
        if params.prompt_logprobs is not None and not sequence.output_ids:
            self._prompt = PromptLogprobs(sequence.prompt_ids, params.prompt_logprobs)
        #: Tokens of the answer that were counted and matched.
        self._n_followed = 0

    def draw(self, sequence: Sequence, banned: frozenset[int]) -> Draw:
        """How to choose the next token. Raises ``ValueError`` if the grammar cannot go on."""
        self._follow(sequence)
        allowed = None if self._matcher is None else self._matcher.allowed()
        return Draw(sequence.params, sequence.n_tokens, banned, self._counts, allowed)

    def ended(self, sequence: Sequence) -> bool:
        """Whether the grammar lets nothing follow."""
        if self._matcher is None:
            return False
        try:
            self._follow(sequence)
        except ValueError:  # said when the next token is to be drawn
            return False
        return self._matcher.ended

    def n_rows(self, chunk: Chunk) -> int:
        """Of how many of its last tokens a chunk must give the logits, for the prompt's log probabilities."""
        return 0 if self._prompt is None else self._prompt.n_rows(chunk.start, chunk.stop)

    @property
    def prompt(self) -> PromptLogprobs | None:
        """What was told of the prompt; ``None`` if it is not asked for, or was told with the first token."""
        return self._prompt

    def take_prompt(self) -> tuple[TokenLogprobs, ...] | None:
        """All that was told of the prompt, once."""
        prompt, self._prompt = self._prompt, None
        return None if prompt is None else tuple(prompt.told)

    def _follow(self, sequence: Sequence) -> None:
        if self._counts is None and self._matcher is None:
            return
        fresh = sequence.output_ids[self._n_followed :]
        self._n_followed += len(fresh)
        if self._counts is not None:
            for token in fresh:
                self._counts.add(token)
        if self._matcher is not None:
            self._matcher.consume(fresh)
