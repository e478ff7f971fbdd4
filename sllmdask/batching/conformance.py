"""Examines an engine against what :mod:`sllmdask.batching.protocol` promises. Plain Python: any test runner can use it.

A :class:`Subject` says how to make the engine and its requests. :func:`checks_of` gives the checks that apply to it; each
of them, called with the subject, raises :class:`AssertionError` with a sentence that says which promise is broken. With pytest::

    @pytest.mark.parametrize("check", checks_of(SUBJECT), ids=lambda check: check.__name__)
    def test_it_is_an_engine(check):
        check(SUBJECT)

What is right is told by the engine itself: an answer that is given to a request alone, without a pause, is what every other way
to the same answer is compared with. Whether it is the model's answer is for other tests to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sllmdask.batching.listener import (
    Listener,
    Subject,
    accounts_add_up,
    answers_alone,
    at_rest,
    closing,
    made,
    made_tight,
    pair,
    refused,
    require,
    same,
)
from sllmdask.batching.params import Grammar, choice_seed
from sllmdask.batching.protocol import EngineProtocol, EngineStats, FollowsWeights, MovesRequests, ParksRequests, TakesGrammars
from sllmdask.batching.sequence import FinishReason, Sequence
from sllmdask.errors import ContextTooLong, InstanceGone, InvalidRequest, StateRefused

__all__ = ["CHECKS", "Check", "Listener", "Subject", "accounts_add_up", "answers_alone", "at_rest", "checks_of"]

Check = Callable[[Subject], None]


def checks_of(subject: Subject) -> list[Check]:
    """The checks that apply to an engine: to all, to what answers by tokens, and for each thing that it can do besides."""
    with made(subject) as engine:
        applies: dict[str, bool] = {
            "all": True,
            "fails": subject.poison is not None,
            "generates": subject.generates,
            "tight": subject.make_tight is not None,
            "no grammars": subject.generates and not isinstance(engine, TakesGrammars),
            "weights": isinstance(engine, FollowsWeights),
            "parks": isinstance(engine, ParksRequests),
            "moves": isinstance(engine, MovesRequests),
            "moves tight": isinstance(engine, MovesRequests) and subject.make_tight is not None,
        }
    return [check for kind, checks in CHECKS.items() for check in checks if applies[kind]]


# --- every engine ----------------------------------------------------------------------------------------------------


def an_idle_engine_does_nothing(subject: Subject) -> None:
    with made(subject) as engine:
        require(not engine.has_work, "there is no request, but the engine has work")
        require(engine.step() == [], "there is no request, but a step has outputs")
        require(engine.find("r0") is None, "a request is found that was never asked")
        require(engine.abort("r0") is False, "a request was aborted that was never asked")
        at_rest(engine)


def outputs_come_in_order_and_end_once(subject: Subject) -> None:
    with made(subject) as engine:
        heard = Listener(engine)
        asked = subject.crowd()
        for sequence in asked:
            heard.add(sequence)
            require(engine.has_work, "a request was added, but the engine has no work")
            heard.step()
        heard.drain()
        for sequence in asked:
            name, n = sequence.request_id, sequence.params.max_tokens if subject.generates else 0
            reason = FinishReason.LENGTH if subject.generates else FinishReason.STOP
            require(len(heard.answers[name]) == n, f"{name} got {len(heard.answers[name])} tokens of {n}")
            require(heard.ends[name].finish_reason is reason, f"{name} ended by {heard.ends[name].finish_reason}, not {reason}")
        require(
            all(0 <= token < subject.n_vocab for answer in heard.answers.values() for token in answer),
            "a token is not in the vocabulary",
        )


def nonsense_is_refused_and_changes_nothing(subject: Subject) -> None:
    expected = answers_alone(subject, [subject.ask("r", 20)])
    empty, strange, negative, endless = (subject.ask(name) for name in ("empty", "strange", "negative", "endless"))
    empty.prompt_ids = []
    strange.prompt_ids = [*strange.prompt_ids, subject.n_vocab]
    negative.prompt_ids = [-1, *negative.prompt_ids]
    endless.prompt_ids = endless.prompt_ids * 20_000
    nonsense = {
        "an empty prompt": empty,
        "a token beyond the vocabulary": strange,
        "a negative token": negative,
        "a prompt beyond any window": endless,
        "an id that is here already": subject.ask("r", 30),
    }
    if subject.generates:
        complete, adapted = subject.ask("complete", max_tokens=2), subject.ask("adapted")
        complete.output_ids = [1, 2]
        adapted.salt = b"an adapter that nobody has loaded"
        nonsense |= {"an answer that is complete": complete, "an adapter that is not here": adapted}
    with made(subject) as engine:
        heard = Listener(engine)
        heard.add(subject.ask("r", 20))
        if subject.generates:
            heard.step(2)
        for what, sequence in nonsense.items():
            before = _account(engine), engine.sequences
            with refused(f"{what} was not refused", InvalidRequest, ContextTooLong):
                engine.add(sequence)
            require((_account(engine), engine.sequences) == before, f"{what} was refused, and something has changed")
        heard.drain()
        require(heard.answers == expected, "what was refused changed the answer of another request")


def an_abort_frees_at_once_and_is_the_last_that_is_heard(subject: Subject) -> None:
    expected = answers_alone(subject, subject.crowd())
    makes = [subject.make] if subject.make_tight is None else [subject.make, subject.make_tight]
    for make in makes:
        for n_steps in (0, 1, 3) if subject.generates else (0,):
            with closing(make()) as engine:
                heard = Listener(engine)
                heard.add(*subject.crowd())
                heard.step(n_steps)
                for victim in ("r1", "r4"):
                    if victim not in heard.ends:
                        heard.abort(victim)
                heard.drain()
                for name in ("r0", "r2", "r3"):
                    require(heard.answers[name] == expected[name], f"the abort of others changed the answer of {name}")
                for sequence in subject.crowd():
                    sequence.request_id += " again"
                    heard.add(sequence)
                heard.step(min(n_steps, 1))
                for sequence in engine.sequences:
                    heard.abort(sequence.request_id)
                at_rest(engine)


def what_was_done_is_counted(subject: Subject) -> None:
    with made(subject) as engine:
        heard = Listener(engine)
        asked = subject.crowd()
        heard.add(*asked)
        before = engine.stats()
        require(before.n_steps == 0 and before.first_step_s is None, "steps are counted before the first one")
        heard.drain()
        stats = engine.stats()
        n_prompt = sum(len(sequence.prompt_ids) for sequence in asked)
        n_output = sum(map(len, heard.answers.values())) if subject.generates else len(asked)
        require(stats.n_prompt_tokens == n_prompt, f"{n_prompt} prompt tokens came, and {stats.n_prompt_tokens} are counted")
        require(stats.n_output_tokens == n_output, f"{n_output} tokens were given, and {stats.n_output_tokens} are counted")
        require(stats.n_steps > 0 and stats.first_step_s is not None, "steps were made, and are not counted")
        require(stats.step_s >= (stats.first_step_s or 0) >= 0, "the first step took longer than all steps")
        require(_is_plain(stats.as_wire()), "the account is not made of plain types")


def a_closed_engine_is_empty_and_refuses(subject: Subject) -> None:
    engine = subject.make()
    heard = Listener(engine)
    heard.add(*subject.crowd())
    if subject.generates:
        heard.step(2)
    engine.close()
    require(not engine.has_work, "the engine is closed, and has work")
    require(engine.find("r0") is None, "the engine is closed, and still has a request")
    require(engine.step() == [], "the engine is closed, and a step has outputs")
    require(engine.abort("r0") is False, "the engine is closed, and aborts a request")
    with refused("the engine is closed, and takes a request", InstanceGone):
        engine.add(subject.ask("late"))
    require(engine.step() == [], "the engine is closed, and answers a request")
    at_rest(engine)
    engine.close()


def a_request_that_fails_fails_alone(subject: Subject) -> None:
    assert subject.poison is not None
    expected = answers_alone(subject, subject.crowd())
    with made(subject) as engine:
        heard = Listener(engine)
        for i, sequence in enumerate(subject.crowd()):
            bad = subject.ask(f"bad{i}", 4 + 9 * i)
            bad.prompt_ids[i % len(bad.prompt_ids)] = subject.poison
            heard.add(sequence, bad)
            if i % 2:
                heard.step()
        heard.drain()
        for i in range(5):
            end = heard.ends[f"bad{i}"]
            require(end.finish_reason is FinishReason.ERROR, f"bad{i} failed, and its end does not say so")
            require(heard.answers[f"bad{i}"] == [], f"bad{i} failed, and was given tokens")
        for name, answer in expected.items():
            require(heard.ends[name].error is None, f"{name} failed beside a request that fails")
            require(heard.answers[name] == answer, f"the failure of others changed the answer of {name}")


# --- engines that answer by tokens -----------------------------------------------------------------------------------


def an_answer_does_not_depend_on_its_company(subject: Subject) -> None:
    expected = answers_alone(subject, subject.crowd())
    with made(subject) as engine:
        heard = Listener(engine)
        heard.add(*reversed(subject.crowd()))
        heard.drain()
        same(expected, heard.answers, "in a crowd")


def a_request_that_brings_tokens_goes_on_behind_them(subject: Subject) -> None:
    expected = answers_alone(subject, subject.crowd())
    with made(subject) as engine:
        heard = Listener(engine)
        for n, sequence in enumerate(subject.crowd()):
            sequence.output_ids = expected[sequence.request_id][: n + 1]
            heard.add(sequence)
        heard.drain()
        rest = {name: answer[n + 1 :] for n, (name, answer) in enumerate(expected.items())}
        same(rest, heard.answers, "when it brings its first tokens")


def a_stop_token_ends_an_answer_but_not_too_early(subject: Subject) -> None:
    asked = [subject.ask(f"r{i}", 10, 24, temperature=1.0, seed=i) for i in range(8)]
    name, whole, at = next(
        (name, answer, at)
        for name, answer in answers_alone(subject, asked).items()
        for at in range(3, 20)
        if answer[at] not in answer[:at]
    )
    seed = int(name[1:])
    with made(subject) as engine:
        heard = Listener(engine)
        heard.add(subject.ask(name, 10, 24, temperature=1.0, seed=seed, stop_token_ids=(whole[at],)))
        heard.drain()
        require(heard.answers[name] == whole[: at + 1], "the token that ends an answer is not its last one")
        require(heard.ends[name].finish_reason is FinishReason.STOP, "a stop token came, and the reason is not 'stop'")
    with made(subject) as engine:
        heard = Listener(engine)
        heard.add(subject.ask(name, 10, 24, temperature=1.0, seed=seed, stop_token_ids=(whole[at],), min_tokens=at + 3))
        heard.drain()
        answer = heard.answers[name]
        require(answer[:at] == whole[:at], "min_tokens changed tokens before it")
        require(whole[at] not in answer[: at + 3] and len(answer) >= at + 3, "an answer ended before min_tokens")


def a_seed_decides_on_an_answer(subject: Subject) -> None:
    asked = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        sequence = subject.ask("same prompt", 20, 20, temperature=1.0, seed=seed)
        sequence.request_id = name
        asked.append(sequence)
    found = answers_alone(subject, asked)
    require(found["a"] == found["b"], "one seed gave two answers")
    require(found["a"] != found["c"], "two seeds gave one answer of 20 tokens")


def choices_are_answered_each_by_its_seed(subject: Subject) -> None:
    def ask(name: str, seed: int) -> Sequence:
        sequence = subject.ask("r", 40, 16, temperature=1.0, seed=seed)
        sequence.request_id = name
        return sequence

    names = ("r", "r#1", "r#2")
    expected = answers_alone(subject, [ask(name, choice_seed(3, i)) for i, name in enumerate(names)])
    with made(subject) as engine:
        heard = Listener(engine)
        heard.add(subject.ask("other", 30), *ask("r", 3).choices(3))
        heard.drain()
        same(expected, {name: heard.answers[name] for name in names}, "as one of several to its prompt")


def a_grammar_is_refused_by_who_takes_none(subject: Subject) -> None:
    with made(subject) as engine, refused("a grammar was taken by an engine that takes none", InvalidRequest):
        engine.add(subject.ask("r", grammar=Grammar("regex", "[0-9]+")))


# --- little memory ---------------------------------------------------------------------------------------------------


def an_answer_does_not_depend_on_scarce_memory(subject: Subject) -> None:
    def ask() -> list[Sequence]:
        asked = subject.long_ones(6, temperature=1.0, seed=5)
        for i, sequence in enumerate(asked):
            sequence.priority = i % 3
        return asked

    expected = answers_alone(subject, ask())
    with made_tight(subject) as engine:
        heard = Listener(engine)
        for sequence in ask():
            heard.add(sequence)
            heard.step(3)
        heard.drain()
        same(expected, heard.answers, "where memory is scarce")


def the_urgent_go_first(subject: Subject) -> None:
    with made_tight(subject) as engine:
        heard = Listener(engine)
        *others, urgent = subject.long_ones(5)
        urgent.priority = 3
        heard.add(*others, urgent)
        heard.drain()
        first = heard.first_step
        require(
            first[urgent.request_id] == min(first.values()), "a request of higher priority began after one of a lower priority"
        )
    with made_tight(subject) as engine:
        heard = Listener(engine)
        asked = subject.long_ones(5)
        for arrival, sequence in zip((3, 1, 4, 0, 2), asked, strict=True):
            sequence.arrival = arrival
        heard.add(*asked)
        heard.drain()
        began = [heard.first_step[sequence.request_id] for sequence in sorted(asked, key=lambda each: each.arrival)]
        require(began == sorted(began), "of two requests of one priority, the later one began first")


# --- weights on their way --------------------------------------------------------------------------------------------


def weights_that_are_there_are_not_waited_for(subject: Subject) -> None:
    with made(subject) as started:
        engine: Any = started
        calls: list[bool] = []
        engine.on_arrival(lambda: calls.append(True))
        engine.settle()
        engine.interrupt()
        heard = Listener(engine)
        heard.add(subject.ask("r"))
        heard.drain()
        require(len(calls) <= 1, "the arrival of the weights was told more than once")


# --- requests that stop ----------------------------------------------------------------------------------------------


def a_request_that_is_stopped_goes_on_where_it_was(subject: Subject) -> None:
    expected = answers_alone(subject, subject.crowd())
    for n_steps in (0, 3):
        with made(subject) as started:
            engine: Any = started
            heard = Listener(engine)
            heard.add(*subject.crowd())
            heard.step(n_steps)
            require(engine.park("r1") is True, "r1 is here, and park says that it is not")
            heard.quiet.add("r1")
            heard.step(3)
            require(engine.park("nobody") is False, "a request was parked that is not here")
            require(engine.recompute("r2") is True, "r2 is here, and recompute says that it is not")
            heard.step(2)
            require(engine.resume("r1") is True, "r1 is here, and resume says that it is not")
            heard.quiet.clear()
            heard.drain()
            same(expected, heard.answers, "after it was stopped")


def a_request_that_is_stopped_can_be_aborted(subject: Subject) -> None:
    with made(subject) as started:
        engine: Any = started
        heard = Listener(engine)
        heard.add(*subject.crowd())
        heard.step(2)
        engine.park("r1")
        heard.abort("r1")
        require(engine.resume("r1") is False, "a request was resumed that was aborted")
        heard.drain()


def memory_that_was_given_away_comes_back(subject: Subject) -> None:
    expected = answers_alone(subject, [*subject.crowd(), subject.ask("late")])
    with made(subject) as started:
        engine: Any = started
        heard = Listener(engine)
        heard.add(*subject.crowd())
        heard.step(3)
        engine.park_all()
        require(engine.paused and not engine.has_work, "the engine has given its memory away, and has work")
        require(engine.step() == [], "the engine has given its memory away, and a step has outputs")
        stats = engine.stats()
        if isinstance(stats, EngineStats):
            require(stats.blocks_used == 0, f"the engine has given its memory away, but {stats.blocks_used} blocks are used")
        heard.add(subject.ask("late"))
        engine.resume_all()
        require(not engine.paused, "the engine has its memory again, and says that it has not")
        heard.drain()
        same(expected, heard.answers, "after all memory was given away")


# --- requests that move ----------------------------------------------------------------------------------------------


def a_request_that_moves_goes_on_where_it_was(subject: Subject) -> None:
    others = [subject.ask("t0", 30), subject.ask("t1", 12, 20)]
    expected = answers_alone(subject, [*subject.crowd(), *others])
    for name, n_steps in (("r4", 0), ("r1", 1), ("r3", 4)):
        with pair(subject) as (source, target):
            source.add(*subject.crowd())
            target.add(subject.ask("t0", 30), subject.ask("t1", 12, 20))
            source.step(n_steps)
            target.step(2)
            _move(source, target, name)
            require(source.engine.export_commit(name, 1) is False, "a move was committed twice by who sent it")
            source.drain()
            target.drain()
            same(expected, source.answers | target.answers, f"when {name} moved after {n_steps} steps")


def a_request_that_moves_by_its_tokens_goes_on_where_it_was(subject: Subject) -> None:
    expected = answers_alone(subject, [*subject.crowd(), subject.ask("t0", 30)])
    for name, n_steps in (("r4", 0), ("r3", 4)):
        with pair(subject) as (source, target):
            source.add(*subject.crowd())
            target.add(subject.ask("t0", 30))
            source.step(n_steps)
            _hand_over(source, target, name)
            source.drain()
            target.drain()
            same(expected, source.answers | target.answers, f"when {name} was computed elsewhere after {n_steps} steps")


def a_move_that_is_called_off_changes_nothing(subject: Subject) -> None:
    expected = answers_alone(subject, subject.crowd())
    with pair(subject) as (source, target):
        source.add(*subject.crowd())
        source.step(3)
        ticket = target.engine.import_open(source.engine.export_open("r3", 1))
        chunk = source.engine.export_read("r3", 1, ticket["n_tokens"])
        since = target.engine.import_write("r3", 1, chunk)["n_tokens"]
        frozen = source.engine.export_freeze("r3", 1, since)
        source.quiet.add("r3")
        source.step(2)
        require(target.engine.import_abort("r3", 1) is True, "a move was under way, and import_abort says that none was")
        require(target.engine.import_abort("r3", 1) is False, "a move was called off twice by who receives it")
        with refused("a move was committed that had been called off", StateRefused):
            target.engine.import_commit("r3", 1, frozen["state"], frozen["kv"])
        at_rest(target.engine)
        require(source.engine.export_abort("r3", 1) is True, "a move was under way, and export_abort says that none was")
        require(source.engine.export_abort("r3", 1) is False, "a move was called off twice by who sends it")
        source.quiet.clear()
        with refused("a move of an epoch that is over was begun", StateRefused):
            source.engine.export_open("r3", 1)
        source.step()
        _move(source, target, "r2", epoch=2)
        source.drain()
        target.drain()
        same(expected, source.answers | target.answers, "after a move that was called off")


def a_receiver_refuses_what_is_damaged(subject: Subject) -> None:
    expected = answers_alone(subject, [subject.ask("r", 60, 20)])
    with pair(subject) as (source, target):
        source.add(subject.ask("r", 60, 20))
        source.step(4)
        manifest = source.engine.export_open("r", 1)
        with refused("a manifest without its tokens was taken", StateRefused):
            target.engine.import_open({key: value for key, value in manifest.items() if key != "token_ids"})
        since = target.engine.import_open(manifest)["n_tokens"]
        chunk = source.engine.export_read("r", 1, since)
        require(chunk["n_tokens"] > 0, "60 tokens were computed, and there is no KV of them to read")
        with refused("KV that was changed on its way was taken", StateRefused):
            target.engine.import_write("r", 1, _damaged(chunk))
        since = target.engine.import_write("r", 1, chunk)["n_tokens"]
        frozen = source.engine.export_freeze("r", 1, since)
        with refused("a state that cannot be read was taken", StateRefused):
            target.engine.import_commit("r", 1, {}, frozen["kv"])
        require(target.engine.find("r") is None, "a state was refused, and its request is here")
        require(target.engine.import_commit("r", 1, frozen["state"], frozen["kv"]) is True, "a request was there before it came")
        source.engine.export_commit("r", 1)
        target.adopt(source, "r")
        target.drain()
        source.drain()
        same(expected, target.answers, "after damaged pieces had been refused")


def an_abort_ends_a_move(subject: Subject) -> None:
    with pair(subject) as (source, target):
        source.add(subject.ask("r", 60, 20), subject.ask("other"))
        source.step(3)
        since = target.engine.import_open(source.engine.export_open("r", 1))["n_tokens"]
        target.engine.import_write("r", 1, source.engine.export_read("r", 1, since))
        accounts_add_up(target.engine)
        source.abort("r")
        with refused("a request that was aborted was sent away", StateRefused):
            source.engine.export_freeze("r", 1)
        source.engine.export_abort("r", 1)
        target.engine.import_abort("r", 1)
        source.drain()
        target.drain()


def a_receiver_without_room_refuses(subject: Subject) -> None:
    expected = answers_alone(subject, [subject.ask("r", 90, 10)])
    with made(subject) as sender, made_tight(subject) as receiver:
        source, target = Listener(sender), Listener(receiver)
        source.add(subject.ask("r", 90, 10))
        target.add(*(subject.ask(f"t{i}", 90, 10) for i in range(2)))
        source.step(2)
        target.step(2)
        manifest = source.engine.export_open("r", 1)
        before = _account(receiver)
        with refused("90 tokens were taken by an engine that is full", StateRefused):
            target.engine.import_open(manifest)
        require(_account(receiver) == before, "an engine that is full refused a request, and something has changed")
        source.engine.export_abort("r", 1)
        source.drain()
        target.drain()
        same(expected, source.answers, "after it was refused elsewhere")


#: Checks by what an engine must be, or be able to do, so that they apply.
CHECKS: Mapping[str, tuple[Check, ...]] = {
    "all": (
        an_idle_engine_does_nothing,
        outputs_come_in_order_and_end_once,
        nonsense_is_refused_and_changes_nothing,
        an_abort_frees_at_once_and_is_the_last_that_is_heard,
        what_was_done_is_counted,
        a_closed_engine_is_empty_and_refuses,
    ),
    "fails": (a_request_that_fails_fails_alone,),
    "generates": (
        an_answer_does_not_depend_on_its_company,
        a_request_that_brings_tokens_goes_on_behind_them,
        a_stop_token_ends_an_answer_but_not_too_early,
        a_seed_decides_on_an_answer,
        choices_are_answered_each_by_its_seed,
    ),
    "no grammars": (a_grammar_is_refused_by_who_takes_none,),
    "tight": (an_answer_does_not_depend_on_scarce_memory, the_urgent_go_first),
    "weights": (weights_that_are_there_are_not_waited_for,),
    "parks": (
        a_request_that_is_stopped_goes_on_where_it_was,
        a_request_that_is_stopped_can_be_aborted,
        memory_that_was_given_away_comes_back,
    ),
    "moves": (
        a_request_that_moves_goes_on_where_it_was,
        a_request_that_moves_by_its_tokens_goes_on_where_it_was,
        a_move_that_is_called_off_changes_nothing,
        a_receiver_refuses_what_is_damaged,
        an_abort_ends_a_move,
    ),
    "moves tight": (a_receiver_without_room_refuses,),
}


# --- means -----------------------------------------------------------------------------------------------------------


def _move(source: Listener, target: Listener, name: str, epoch: int = 1) -> None:
    """Move a request while both engines run."""
    manifest = _plain("a manifest", source.engine.export_open(name, epoch))
    require(source.engine.export_open(name, epoch) == manifest, "asked again, a manifest is another one")
    since = target.engine.import_open(manifest)["n_tokens"]
    for _ in range(2):
        chunk = _plain("a chunk of KV", source.engine.export_read(name, epoch, since))
        since = target.engine.import_write(name, epoch, chunk)["n_tokens"]
        source.step()
        target.step()
    rest = _plain("a chunk of KV", source.engine.export_read(name, epoch, since, whole=False))
    since = target.engine.import_write(name, epoch, rest)["n_tokens"]
    source.step()
    frozen = _plain("a state", source.engine.export_freeze(name, epoch, since))
    source.quiet.add(name)
    source.step()
    require(target.engine.import_commit(name, epoch, frozen["state"], frozen["kv"]) is True, f"{name} was there before it came")
    require(target.engine.import_commit(name, epoch, frozen["state"]) is False, "a move was committed twice by who receives it")
    require(source.engine.export_commit(name, epoch) is True, f"{name} has moved, and the sender says that it had before")
    source.quiet.clear()
    target.adopt(source, name)


def _hand_over(source: Listener, target: Listener, name: str) -> None:
    """Move a request while both engines run; the receiver computes its KV from its tokens."""
    receiver: Any = target.engine
    ticket = receiver.import_open(_plain("a manifest", source.engine.export_open(name, 1)), tokens_will_do=True)
    require("kv_refused" in ticket, "a receiver does not say whether it takes KV")
    receiver.import_extend(name, 1, 64)
    n_known = receiver.import_tokens(name, 1)["n_known"]
    for _ in range(3):
        source.step()
        target.step()
        sequence = source.engine.find(name)
        assert sequence is not None
        tail = sequence.token_ids(n_known, sequence.n_tokens)
        with refused("tokens were taken, and those before them are missing", StateRefused):
            receiver.import_tokens(name, 1, n_known + 1, [0])
        for _ in range(2):
            known = receiver.import_tokens(name, 1, n_known, tail)
            require(known["n_known"] == n_known + len(tail), f"told twice of {n_known + len(tail)} tokens, it knows {known}")
        n_known += len(tail)
    for _ in range(64):
        if (known := receiver.import_tokens(name, 1))["n_tokens"] >= n_known - 1:
            break
        require(target.engine.has_work, f"{n_known} tokens are to be computed, but the engine has no work")
        target.step()
    require(known["n_tokens"] == n_known - 1, f"after 64 steps, {known['n_tokens']} of {n_known - 1} tokens are computed")
    stats = source.engine.stats()
    require(isinstance(stats, EngineStats), "an engine whose requests move does not tell of its blocks")
    assert isinstance(stats, EngineStats)
    frozen = _plain("a state", source.engine.export_freeze(name, 1, (n_known - 1) // stats.block_size))
    source.quiet.add(name)
    require(receiver.import_commit(name, 1, frozen["state"]) is True, f"{name} was there before it came")
    require(source.engine.export_commit(name, 1) is True, f"{name} has moved, and the sender says that it had before")
    source.quiet.clear()
    target.adopt(source, name)


def _damaged(chunk: Mapping[str, Any]) -> dict[str, Any]:
    """A chunk with one bit of its bytes turned."""
    data = {key: value for key, value in chunk.items() if isinstance(value, bytes | bytearray) and value}
    require(bool(data), "a chunk of KV has no bytes")
    key, value = next(iter(data.items()))
    turned = bytearray(value)
    turned[len(turned) // 2] ^= 1
    return {**chunk, key: bytes(turned)}


def _account(engine: EngineProtocol) -> tuple[int, ...]:
    """What an engine holds."""
    stats = engine.stats()
    held: tuple[int, ...] = (stats.n_running, stats.n_waiting, stats.n_prompt_tokens, stats.n_output_tokens)
    if isinstance(stats, EngineStats):
        held += (stats.blocks_free, stats.blocks_used, stats.blocks_reserved, stats.n_held)
    return held


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes)


def _plain(what: str, value: dict[str, Any]) -> dict[str, Any]:
    require(_is_plain(value), f"{what} is not made of plain msgpack types")
    return value
