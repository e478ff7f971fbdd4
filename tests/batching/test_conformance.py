"""The examination of engines: it finds what is broken, and says what. Whole engines are examined where they are tested."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from sllmdask.batching import conformance as c
from sllmdask.batching.conformance import checks_of
from sllmdask.batching.protocol import EngineStats, FollowsWeights, MovesRequests, ParksRequests, StepOutput, TakesGrammars
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.sim.engine import CostModelEngine
from tests.cost_model import COST_MODEL, subject_of


def test_what_an_engine_cannot_do_is_not_asked():
    names = {check.__name__ for check in checks_of(COST_MODEL)}
    assert {"a_grammar_is_refused_by_who_takes_none", "a_request_that_moves_goes_on_where_it_was"} <= names
    assert not {"a_request_that_fails_fails_alone", "weights_that_are_there_are_not_waited_for"} & names
    untight = {check.__name__ for check in checks_of(replace(COST_MODEL, make_tight=None))}
    assert names - untight == {
        "an_answer_does_not_depend_on_scarce_memory",
        "the_urgent_go_first",
        "a_receiver_without_room_refuses",
    }


def test_what_an_engine_can_do_is_told_by_its_methods():
    engine = COST_MODEL.make()
    assert isinstance(engine, ParksRequests) and isinstance(engine, MovesRequests)
    assert not isinstance(engine, TakesGrammars) and not isinstance(engine, FollowsWeights)


# --- defects ---------------------------------------------------------------------------------------------------------


class SkipsAnIndex(CostModelEngine):
    def step(self) -> list[StepOutput]:
        return [replace(output, index=output.index + (output.index >= 3)) for output in super().step()]


class EndsTwice(CostModelEngine):
    def step(self) -> list[StepOutput]:
        outputs = super().step()
        return outputs + [output for output in outputs if output.final]


class SaysNothing(CostModelEngine):
    def step(self) -> list[StepOutput]:
        return [replace(output, token_id=None) for output in super().step()]


class FailsInSilence(CostModelEngine):
    def step(self) -> list[StepOutput]:
        return [replace(output, finish_reason=FinishReason.ERROR) for output in super().step()]


class CountsFromZero(CostModelEngine):
    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self.brought = {**getattr(self, "brought", {}), sequence.request_id: len(sequence.output_ids)}

    def step(self) -> list[StepOutput]:
        return [replace(output, index=output.index - self.brought.get(output.request_id, 0)) for output in super().step()]


class LosesAnAbort(CostModelEngine):
    def abort(self, request_id: str) -> bool:
        return self.find(request_id) is not None


class LeaksABlock(CostModelEngine):
    def abort(self, request_id: str) -> bool:
        sequence = self.find(request_id)
        if sequence is not None:
            self._pool.share(sequence.block_table[:1])
        return super().abort(request_id)


class ForgetsARequest(CostModelEngine):
    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        if sequence.request_id == "r3":
            self.abort("r3")


class SleepsTooSoon(CostModelEngine):
    @property
    def has_work(self) -> bool:
        return self._n_steps < 7 and super().has_work


class NeverRests(CostModelEngine):
    @property
    def has_work(self) -> bool:
        return self._n_steps > 0 or super().has_work


class CountsTooMuch(CostModelEngine):
    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self._n_output_tokens += 1


class AnswersAfterClose(CostModelEngine):
    def close(self) -> None:
        super().close()
        self._closed = False


class KeepsItsRequests(CostModelEngine):
    def close(self) -> None:
        self._closed = True


class SeesItsNeighbours(CostModelEngine):
    def _token(self, sequence: Sequence) -> int:
        return (super()._token(sequence) + (len(self.sequences) > 2)) % self.n_vocab


class ForgetsItsPlace(CostModelEngine):
    def _token(self, sequence: Sequence) -> int:
        return (super()._token(sequence) + sequence.n_preemptions) % self.n_vocab


class TakesNonsense(CostModelEngine):
    def _check(self, sequence: Sequence) -> None:
        if sequence.prompt_ids[:1] != [-1]:
            super()._check(sequence)


class CountsWhatItRefuses(CostModelEngine):
    def add(self, sequence: Sequence) -> None:
        self._n_prompt_tokens += 1
        super().add(sequence)
        self._n_prompt_tokens -= 1


class MiscountsItsBlocks(CostModelEngine):
    def stats(self) -> EngineStats:
        stats = super().stats()
        return replace(stats, blocks_used=max(0, stats.blocks_used - 1))


class KnowsNoPriority(CostModelEngine):
    def add(self, sequence: Sequence) -> None:
        sequence.priority = 0
        super().add(sequence)


class StopsTooEarly(CostModelEngine):
    def _token(self, sequence: Sequence) -> int:
        sequence.params = replace(sequence.params, min_tokens=0)
        return super()._token(sequence)


class IgnoresItsSeeds(CostModelEngine):
    def _token(self, sequence: Sequence) -> int:
        sequence.params = replace(sequence.params, temperature=0.0)
        return super()._token(sequence)


class DoesNotPark(CostModelEngine):
    def park(self, request_id: str) -> bool:
        return self.recompute(request_id)


class KeepsItsMemory(CostModelEngine):
    def park_all(self) -> None:
        self._paused = True


class KeepsWhatItSent(CostModelEngine):
    def _unpin(self, leaving: Any) -> None:
        leaving.pinned = []


class SendsAndStays(CostModelEngine):
    def export_commit(self, request_id: str, epoch: int) -> bool:
        sequence = self.find(request_id)
        committed = super().export_commit(request_id, epoch)
        if committed and sequence is not None:
            self._scheduler.add(Sequence(request_id, sequence.prompt_ids, sequence.params))
        return committed


class TakesTokensTwice(CostModelEngine):
    def import_tokens(self, request_id: str, epoch: int, since: int = 0, token_ids: Iterable[int] = ()) -> dict[str, Any]:
        known = super().import_tokens(request_id, epoch)["n_known"]
        return super().import_tokens(request_id, epoch, max(since, known) if since <= known else since, token_ids)


class TakesAnyBytes(CostModelEngine):
    def import_write(self, request_id: str, epoch: int, chunk: Mapping[str, Any]) -> dict[str, Any]:
        return super().import_write(request_id, epoch, {**chunk, "crc32": zlib.crc32(chunk["data"])})


class StaysStopped(CostModelEngine):
    def export_abort(self, request_id: str, epoch: int) -> bool:
        leaving = self._leaving.get(request_id)
        if leaving is not None:
            leaving.was_held = True
        return super().export_abort(request_id, epoch)


class LosesTheLastToken(CostModelEngine):
    def import_commit(self, request_id: str, epoch: int, state: Mapping[str, Any], kv: Mapping[str, Any] | None = None) -> bool:
        return super().import_commit(request_id, epoch, {**state, "output_ids": state.get("output_ids", [])[:-1]}, kv)


@pytest.mark.parametrize(
    ("defect", "check", "sentence"),
    [
        (SkipsAnIndex, c.outputs_come_in_order_and_end_once, r"R\d: an output of index 4 came where 3 was due\."),
        (EndsTwice, c.outputs_come_in_order_and_end_once, r"R\d had its last output, and was answered after that\."),
        (SaysNothing, c.outputs_come_in_order_and_end_once, r"R\d: output 0 has neither a token nor a reason to end\."),
        (FailsInSilence, c.outputs_come_in_order_and_end_once, r"R\d: an error and the reason error do not go together\."),
        (ForgetsARequest, c.outputs_come_in_order_and_end_once, r"R3 has not ended, and is not here any more\."),
        (
            SleepsTooSoon,
            c.outputs_come_in_order_and_end_once,
            r"R\d.* has not ended, but the engine says that there is nothing to do\.",
        ),
        (
            NeverRests,
            c.outputs_come_in_order_and_end_once,
            r"All requests have ended, but the engine says that there is still work\.",
        ),
        (
            MiscountsItsBlocks,
            c.outputs_come_in_order_and_end_once,
            r"Blocks do not add up: \d+ in all, but \d+ free, \d+ used .*",
        ),
        (TakesNonsense, c.nonsense_is_refused_and_changes_nothing, r"A negative token was not refused\."),
        (
            CountsWhatItRefuses,
            c.nonsense_is_refused_and_changes_nothing,
            r"An empty prompt was refused, and something has changed\.",
        ),
        (LosesAnAbort, c.an_abort_frees_at_once_and_is_the_last_that_is_heard, r"R1 was aborted, and is still here\."),
        (
            LeaksABlock,
            c.an_abort_frees_at_once_and_is_the_last_that_is_heard,
            r"No request is here, but \d+ of \d+ blocks are used .*",
        ),
        (CountsTooMuch, c.what_was_done_is_counted, r"\d+ tokens were given, and \d+ are counted\."),
        (AnswersAfterClose, c.a_closed_engine_is_empty_and_refuses, r"The engine is closed, and takes a request\."),
        (KeepsItsRequests, c.a_closed_engine_is_empty_and_refuses, r"The engine is closed, and has work\."),
        (
            SeesItsNeighbours,
            c.an_answer_does_not_depend_on_its_company,
            r"R\d is answered differently in a crowd, from token \d+ on\.",
        ),
        (CountsFromZero, c.a_request_that_brings_tokens_goes_on_behind_them, r"R0: an output of index 0 came where 1 was due\."),
        (StopsTooEarly, c.a_stop_token_ends_an_answer_but_not_too_early, r"An answer ended before min_tokens\."),
        (IgnoresItsSeeds, c.a_seed_decides_on_an_answer, r"Two seeds gave one answer of 20 tokens\."),
        (
            ForgetsItsPlace,
            c.an_answer_does_not_depend_on_scarce_memory,
            r"L\d is answered differently where memory is scarce, .*",
        ),
        (KnowsNoPriority, c.the_urgent_go_first, r"A request of higher priority began after one of a lower priority\."),
        (DoesNotPark, c.a_request_that_is_stopped_goes_on_where_it_was, r"R1 is stopped, and was answered\."),
        (
            KeepsItsMemory,
            c.memory_that_was_given_away_comes_back,
            r"The engine has given its memory away, but \d+ blocks are used\.",
        ),
        (KeepsWhatItSent, c.a_request_that_moves_goes_on_where_it_was, r"No request is here, but \d+ of \d+ blocks are used .*"),
        (SendsAndStays, c.a_request_that_moves_goes_on_where_it_was, r"R\d has moved to another engine, and is still here\."),
        (
            LosesTheLastToken,
            c.a_request_that_moves_goes_on_where_it_was,
            r"R\d: its output_ids are not the tokens that were given\.",
        ),
        (
            StaysStopped,
            c.a_move_that_is_called_off_changes_nothing,
            r"R3 has not ended, but the engine says that there is nothing to do\.",
        ),
        (
            TakesTokensTwice,
            c.a_request_that_moves_by_its_tokens_goes_on_where_it_was,
            r"Told twice of \d+ tokens, it knows .*",
        ),
        (TakesAnyBytes, c.a_receiver_refuses_what_is_damaged, r"KV that was changed on its way was taken\."),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_defect_is_found_and_named(defect: type[CostModelEngine], check: c.Check, sentence: str):
    with pytest.raises(AssertionError) as caught:
        check(subject_of(defect))
    assert re.fullmatch(sentence, str(caught.value)), str(caught.value)
