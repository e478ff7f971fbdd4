"""Our engines are engines: the conformance suite over a tiny Llama, and over a tiny BERT as far as it applies."""

from __future__ import annotations

import pytest
import torch

from sllmdask.batching.conformance import CHECKS, Check, Subject, answers_alone, checks_of
from sllmdask.batching.params import SamplingParams
from sllmdask.batching.protocol import EngineProtocol, TakesAdapters
from sllmdask.batching.sequence import Sequence
from sllmdask.engine.embedding import embedding_sequence
from sllmdask.engine.engine import LLMEngine, StepOutput
from tests.engine.encoders import make_embedder, make_encoder
from tests.engine.models import VOCAB, make_engine, make_model

#: All that there is; this engine takes grammars.
OF_LLAMA = [check for kind, checks in CHECKS.items() if kind != "no grammars" for check in checks]
OF_BERT = [*CHECKS["all"], *CHECKS["fails"]]


def fail_at(module: torch.nn.Module, token: int) -> None:
    """Let a forward pass fail whose input has `token`."""

    def explode(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if (inputs[0] == token).any():
            raise RuntimeError("boom")

    module.register_forward_pre_hook(explode)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    model = make_model(tmp_path_factory.mktemp("llama"))
    poison = 0

    def make() -> EngineProtocol:
        engine = make_engine(model, pack_weights="never")
        fail_at(engine._runner.model.get_input_embeddings(), poison)  # type: ignore[operator]
        return engine

    def make_tight() -> EngineProtocol:
        return make_engine(model, n_blocks=16, block_size=16, pack_weights="never")

    for poison in range(VOCAB):
        subject = Subject(make, VOCAB, make_tight, poison=poison)
        try:
            said = answers_alone(subject, subject.crowd())
        except AssertionError:  # it has said the token, and failed
            continue
        if not any(poison in answer for answer in said.values()):
            return subject
    raise AssertionError("the model says every token")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    model = make_encoder(tmp_path_factory.mktemp("bert"), "bert")

    def make() -> EngineProtocol:
        engine = make_embedder(model)
        fail_at(engine._runner.model.get_input_embeddings(), 7)  # type: ignore[operator]
        return engine

    def sequence(request_id: str, prompt_ids: list[int], _params: SamplingParams) -> Sequence:
        return embedding_sequence(request_id, prompt_ids)

    return Subject(make, VOCAB, sequence=sequence, generates=False, poison=7)


@pytest.mark.parametrize("check", OF_LLAMA, ids=lambda check: check.__name__)
def test_a_language_model_is_an_engine(llama: Subject, check: Check):
    check(llama)


@pytest.mark.parametrize("check", OF_BERT, ids=lambda check: check.__name__)
def test_an_embedding_model_is_an_engine(bert: Subject, check: Check):
    check(bert)


def test_all_that_applies_is_checked(llama: Subject, bert: Subject):
    assert checks_of(llama) == OF_LLAMA
    assert checks_of(bert) == OF_BERT
    assert isinstance(llama.make(), TakesAdapters)


def test_a_batch_that_fails_as_a_whole_is_found(llama: Subject, monkeypatch: pytest.MonkeyPatch):
    run = LLMEngine._run

    def fail_all(engine: LLMEngine, chunks: tuple) -> list[StepOutput]:  # type: ignore[type-arg]
        try:
            return run(engine, chunks)
        except RuntimeError as error:
            return [engine._fail(chunk.sequence, error) for chunk in chunks]

    monkeypatch.setattr(LLMEngine, "_run", fail_all)
    [check] = CHECKS["fails"]
    with pytest.raises(AssertionError, match=r"R\d failed beside a request that fails\."):
        check(llama)
