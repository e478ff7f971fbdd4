"""The record of a request for embeddings: what was accepted, and what is asked for again when its worker is gone."""

from __future__ import annotations

from sllmdask.batching.sequence import SamplingParams
from sllmdask.cluster.journal import Embedded, EmbedRequest, GenerateRequest, Journal

INPUTS = [[1, 2], [3], [4, 5, 6]]


def test_vectors_are_accepted_once_by_index_and_not_from_an_epoch_that_is_over():
    journal = Journal(EmbedRequest("r", "m", INPUTS))
    assert journal.accept_vectors(0, [(2, b"c"), (0, b"a")]) == [Embedded(2, b"c"), Embedded(0, b"a")]
    assert journal.accept_vectors(0, [(2, b"x")]) == []
    journal.epoch = 1
    assert journal.accept_vectors(0, [(1, b"x")]) == []
    assert journal.accept_vectors(1, [(1, b"b"), (2, b"x")]) == [Embedded(1, b"b")]
    assert journal.embedded == {0, 1, 2}


def test_what_is_missing_is_asked_for_again():
    journal = Journal(EmbedRequest("r", "m", INPUTS, dimensions=8), instance="m/1")
    assert journal.submission("k") == ["embed", "k", 0, "m/1", [[0, [1, 2]], [1, [3]], [2, [4, 5, 6]]], 8]
    journal.accept_vectors(0, [(1, b"b")])
    journal.epoch, journal.instance = 1, "m/2"
    assert journal.submission("k") == ["embed", "k", 1, "m/2", [[0, [1, 2]], [2, [4, 5, 6]]], 8]
    assert journal.as_row()["n_prompt_tokens"] == 6


def test_a_request_for_text_takes_its_adapter_and_its_priority_along():
    request = GenerateRequest("r", "m", [1, 2], SamplingParams(), 2, adapter=("polite", "org/polite"), group="g")
    journal = Journal(request, instance="m/1", output_ids=[7])
    adapter = ("polite", "org/polite")
    assert journal.submission("k") == ["submit", "k", 0, "m/1", [1, 2], [7], SamplingParams().as_wire(), adapter, "g", 2]


def test_each_loss_is_over_once_with_what_became_of_it():
    journal = Journal(GenerateRequest("r", "m", [1, 2], SamplingParams()), output_ids=[7, 8], node="0")
    assert journal.resume_over("resumed", 3.0) is None
    journal.lost("worker")
    journal.begin_anew()
    assert journal.as_row()["resumes"] == [
        {"node": "0", "reason": "worker", "n_tokens": 2, "outcome": None, "to": None, "pause_ms": None}
    ]
    journal.node = "1"
    over = journal.resume_over("resumed", 812.0)
    assert over is not None and (over["outcome"], over["to"], over["pause_ms"]) == ("resumed", "1", 812.0)
    assert journal.resume_over("resumed", 9.0) is None
    journal.lost("instance")
    assert (journal.resume_over("failed") or {})["to"] is None
    assert [each["outcome"] for each in journal.resumes] == ["resumed", "failed"]
