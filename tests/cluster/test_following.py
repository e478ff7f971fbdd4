"""Whose tokens a front door takes while a request moves: words of two connections in any order."""

from __future__ import annotations

import itertools
from typing import Any

from sllmdask.batching.params import SamplingParams
from sllmdask.cluster.following import Following, Stop
from sllmdask.cluster.journal import EPOCHS_PER_DISPATCH, GenerateRequest, Journal

RECORD = {"epoch": 1, "source": "0", "destination": "1", "kind": "kv", "stop_ms": None}


def followed(*output_ids: int) -> Following:
    request = GenerateRequest("r", "m", [1, 2], SamplingParams())
    return Following(Journal(request, output_ids=list(output_ids), node="0", worker="w0", instance="m/1", path=["0"]))


def moved(epoch: int, ids: list[int], node: int) -> list[Any]:
    return ["moved", "key", epoch, ids, f"m/{node + 1}", f"w{node}", str(node), RECORD]


def take(following: Following, message: list[Any]) -> None:
    """What a front door does with one message."""
    journal = following.journal
    if message[0] == "moved":
        assert following.moved(message) == []
    elif message[2] == journal.epoch:
        journal.accept(*message[2:5])
        following.told()
    else:
        following.hold(message)
    for held in following.settled():
        take(following, held)


def in_any_order(*streams: list[list[Any]]) -> Any:
    """All ways in which messages of several connections may come, each connection's in its own order."""
    labels = [i for i, stream in enumerate(streams) for _ in stream]
    for order in sorted(set(itertools.permutations(labels))):
        iterators = [iter(stream) for stream in streams]
        yield [next(iterators[i]) for i in order]


def test_nothing_is_lost_or_doubled_in_whatever_order_two_instances_are_heard():
    source = [["tokens", "key", 0, i, [10 + i]] for i in range(3)]
    destination = [moved(1, [10, 11, 12], 1), *(["tokens", "key", 1, i, [10 + i]] for i in range(3, 6))]
    for order in in_any_order(source, destination):
        following = followed()
        for message in order:
            take(following, message)
        journal = following.journal
        assert journal.output_ids == [10, 11, 12, 13, 14, 15], order
        assert (journal.epoch, journal.worker, journal.instance, journal.path) == (1, "w1", "m/2", ["0", "1"])
        assert not following.waits and len(journal.moves) == 1


def test_a_request_may_go_on_before_the_words_of_the_instance_in_between_are_heard():
    first = [["tokens", "key", 0, 0, [10]], ["tokens", "key", 0, 1, [11]]]
    between = [moved(1, [10, 11], 1), ["tokens", "key", 1, 2, [12]]]
    last = [moved(2, [10, 11, 12], 0), ["tokens", "key", 2, 3, [13]]]
    for order in in_any_order(first, between, last):
        following = followed()
        for message in order:
            take(following, message)
        assert following.journal.output_ids == [10, 11, 12, 13], order
        assert following.journal.path == ["0", "1", "0"] and following.journal.epoch == 2


def test_an_instance_that_speaks_under_an_epoch_that_is_over_is_stopped():
    following = followed(10)
    following.journal.begin_anew()
    assert following.journal.epoch == EPOCHS_PER_DISPATCH
    assert following.moved(moved(1, [10], 1)) == [Stop("w1", "m/2", 1)]
    assert following.stayed(["stayed", "key", 0, 2, "m/1", "w0", RECORD]) == [Stop("w0", "m/1", 2)]


def test_a_source_that_keeps_the_request_has_it_back_from_a_destination_that_was_believed_dead():
    following = followed(10)
    following.moved(moved(1, [10], 1))
    assert following.settled() == [] and following.journal.worker == "w1"
    assert following.stayed(["stayed", "key", 0, 2, "m/1", "w0", {**RECORD, "outcome": "stayed"}]) == [Stop("w1", "m/2", 1)]
    journal = following.journal
    assert (journal.worker, journal.instance, journal.node, journal.epoch) == ("w0", "m/1", "0", 2)
    assert [move["outcome"] for move in journal.moves] == ["moved", "stayed"]


def test_what_the_old_instance_owes_is_known_from_the_new_one():
    following = followed(10)
    following.moved(moved(1, [10, 11, 12], 1))
    assert following.settled() == [] and following.waits
    assert following.rest() == [11, 12] and following.elsewhere() == [Stop("w1", "m/2", 1)]


def test_the_pause_of_a_move_is_the_time_between_two_tokens():
    following = followed()
    following.heard(0, 1.0)
    following.heard(0, 1.5)
    following.moved(moved(1, [], 1))
    following.settled()
    assert following.journal.moves[0]["pause_ms"] is None
    following.heard(1, 1.625)
    following.told()
    assert following.journal.moves[0]["pause_ms"] == 125.0


def test_what_the_source_knows_in_the_end_is_in_the_record_whoever_is_heard_first():
    last = {**RECORD, "stop_ms": 1.5}
    for early in (True, False):
        following = followed(10)
        if early:
            assert not following.left(1, last)
        following.moved(moved(1, [10], 1))
        following.settled()
        if not early:
            assert following.left(1, last)
        assert following.journal.moves[0]["stop_ms"] == 1.5


def test_an_instance_that_was_lost_before_it_was_followed_is_lost_whoever_is_at_its_address_by_then():
    following = followed(10)
    message = moved(1, [10, 11], 1)
    following.announced(message)
    following.lose("w1")
    assert not following.lost
    following.moved(message)
    following.journal.accept(0, 1, [11])
    assert following.settled() == [] and following.journal.worker == "w1" and following.lost
    back = ["stayed", "key", 0, 2, "m/1", "w0", {**RECORD, "outcome": "stayed"}]
    following.announced(back)
    following.stayed(back)
    assert not following.lost
    following.lose("w0")
    assert following.lost


def test_who_has_most_of_a_request_is_where_it_went_or_was_going():
    following = followed(10)
    assert following.nearest is None
    following.moving(0, "w1")
    assert following.nearest == "w1"
    following.moved(moved(1, [10, 11], 2))
    assert following.nearest == "w2"
