"""Answers that fit a grammar: what a random model writes is parsed by Python's own json, re and pydantic."""

from __future__ import annotations

import json
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, Field

from sllmdask.batching.params import Grammar
from sllmdask.batching.sequence import FinishReason
from sllmdask.engine.engine import StepOutput
from sllmdask.engine.grammar import GrammarCompiler, check_grammar
from sllmdask.engine.text import Tokenizer
from sllmdask.errors import InvalidRequest
from tests.engine.models import TinyModel, drain, make_engine, make_model, prompts, request, tokens_of
from tests.engine.test_text import byte_fallback, save
from tests.fakes import byte_tokenizer

EOS = 256


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Thing(BaseModel, extra="forbid"):
    name: str = Field(max_length=8)
    size: int = Field(ge=0, le=999)
    colours: list[Colour] = Field(max_length=3)
    inner: bool | None


SCHEMA = Grammar("json_schema", json.dumps(Thing.model_json_schema()))
DATE = Grammar("regex", r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
ARITHMETIC = Grammar("lark", 'start: term (("+" | "*") term){2,5}\nterm: /[0-9]{1,3}/ | "(" term "-" term ")"\n')


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model of 300 outputs, of which its tokenizer knows the first 257."""
    directory = tmp_path_factory.mktemp("llama")
    made = make_model(directory, eos_token_id=EOS)
    byte_tokenizer()._hf.save_pretrained(directory)
    return made


def ask(model: TinyModel, grammar: Grammar, **params: Any) -> tuple[str, list[int], FinishReason | None]:
    engine = make_engine(model)
    outputs: list[StepOutput] = []
    engine.add(request("a", [1, 2, 3], 400, **{"temperature": 1.0, "grammar": grammar, **params}))
    tokens = drain(engine, outputs)["a"]
    return byte_tokenizer().decode(tokens), tokens, outputs[-1].finish_reason


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_fits_its_json_schema(model: TinyModel, seed: int):
    text, _, reason = ask(model, SCHEMA, seed=seed, frequency_penalty=0.5)
    assert reason is FinishReason.STOP
    Thing.model_validate_json(text)


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_fits_its_regular_expression(model: TinyModel, seed: int):
    text, _, reason = ask(model, DATE, seed=seed)
    assert reason is FinishReason.STOP
    assert re.fullmatch(DATE.text, text)


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_fits_its_lark_grammar(model: TinyModel, seed: int):
    text, _, reason = ask(model, ARITHMETIC, seed=seed)
    assert reason is FinishReason.STOP
    assert re.fullmatch(r"[0-9()+*-]+", text)
    assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)  # Python reads no leading zeros


def test_a_greedy_answer_fits_too_and_is_always_the_same(model: TinyModel):
    text, tokens, _ = ask(model, DATE, temperature=0.0)
    assert re.fullmatch(DATE.text, text)
    assert ask(model, DATE, temperature=0.0)[1] == tokens


def test_an_object_without_a_schema_is_some_object(model: TinyModel):
    for seed in range(20):
        # Strings of random bytes are long: many objects are still open in the end.
        text, _, reason = ask(model, Grammar("json_schema", '{"type": "object"}'), seed=seed, logit_bias=((ord("}") - 33, 5.0),))
        if reason is FinishReason.STOP:
            assert isinstance(json.loads(text), dict)
            return
    raise AssertionError("no object was ever closed")


def test_an_answer_may_end_where_its_grammar_lets_it_by_any_of_the_models_end_tokens(model: TinyModel):
    digits = Grammar("regex", "[0-9]+")
    compiler = GrammarCompiler(model.directory, 300, frozenset([256, 299]))
    matcher = compiler.matcher(digits)
    one = byte_tokenizer().encode("1")
    assert set(np.flatnonzero(matcher.allowed())) == set(byte_tokenizer().encode("0123456789"))
    matcher.consume(one)
    assert set(np.flatnonzero(matcher.allowed())) == {*byte_tokenizer().encode("0123456789"), 256, 299}
    assert not matcher.ended


def test_an_answer_ends_with_its_grammar_where_the_model_has_no_end_token(tmp_path: Path):
    model = make_model(tmp_path)
    byte_tokenizer()._hf.save_pretrained(tmp_path)
    text, tokens, reason = ask(model, DATE, seed=1)
    assert re.fullmatch(DATE.text, text)
    assert (len(tokens), reason) == (10, FinishReason.STOP)


def test_grammars_are_followed_in_a_crowd_that_is_preempted_as_alone(model: TinyModel):
    grammars = [SCHEMA, DATE, None, ARITHMETIC]
    asked = prompts(8, 5, 60)
    params: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": i, "grammar": grammars[i % 4], "top_p": 0.95} for i in range(len(asked))
    ]
    alone = {}
    for i, prompt in enumerate(asked):
        engine = make_engine(model)
        engine.add(request(str(i), prompt, 60, **params[i]))
        alone |= drain(engine)
    engine = make_engine(model, n_blocks=30, block_size=8, max_batch_tokens=40)
    outputs: list[StepOutput] = []
    for i, prompt in enumerate(asked):
        engine.add(request(str(i), prompt, 60, **params[i]))
        outputs += engine.step()
    assert drain(engine, outputs) == alone
    assert engine.stats().n_preemptions > 0


@pytest.mark.parametrize("n_brought", [1, 5, 9])
def test_a_request_that_moved_goes_on_in_its_grammar(model: TinyModel, n_brought: int):
    _, whole, _ = ask(model, DATE, seed=3)
    engine = make_engine(model)
    engine.add(request("a", [1, 2, 3], 400, output_ids=whole[:n_brought], temperature=1.0, seed=3, grammar=DATE))
    assert drain(engine)["a"] == whole[n_brought:]


def test_a_request_that_brings_what_its_grammar_forbids_fails_alone(model: TinyModel):
    engine = make_engine(model)
    outputs: list[StepOutput] = []
    engine.add(request("bad", [1, 2, 3], 40, output_ids=byte_tokenizer().encode("12x"), grammar=DATE))
    engine.add(request("good", [1, 2, 3], 20))
    while engine.has_work:
        outputs += engine.step()
    [failed] = [output for output in outputs if output.error]
    assert failed.request_id == "bad" and "grammar" in str(failed.error)
    good = tokens_of([output for output in outputs if not output.error])["good"]
    expected = model.generate([1, 2, 3], 20)
    assert good == expected[: len(good)]


BAD = [
    (Grammar("json_schema", '{"type": "nonsense"}'), "nonsense"),
    (Grammar("json_schema", '{"type": "object", "properties": 3}'), "properties"),
    (Grammar("json_schema", "not json"), "line 1"),
    (Grammar("regex", "(a"), "unclosed group"),
    (Grammar("lark", "start: missing"), "missing"),
]


@pytest.mark.parametrize(("grammar", "reason"), BAD, ids=lambda value: getattr(value, "text", ""))
def test_what_is_no_grammar_is_refused_with_the_reason(model: TinyModel, grammar: Grammar, reason: str):
    with pytest.raises(InvalidRequest, match=reason) as caught:
        check_grammar(grammar, "response_format")
    assert caught.value.param == "response_format"
    assert caught.value.message.startswith("response_format cannot be made into a grammar: ")
    engine = make_engine(model)
    with pytest.raises(InvalidRequest):
        engine.add(request("a", [1], grammar=grammar))
    assert not engine.has_work


@pytest.mark.parametrize("grammar", [SCHEMA, DATE, ARITHMETIC])
def test_what_is_a_grammar_is_not_refused(grammar: Grammar):
    check_grammar(grammar)


def test_without_the_package_a_grammar_is_refused_with_what_to_install(model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'sllmdask\[json\]'") as caught:
        check_grammar(DATE, "guided_regex")
    assert caught.value.param == "guided_regex"
    engine = make_engine(model)
    with pytest.raises(InvalidRequest, match="llguidance"):
        engine.add(request("a", [1], grammar=DATE))
    engine.add(request("b", [1], 3))
    assert len(drain(engine)["b"]) == 3


def test_a_model_without_a_tokenizer_refuses_a_grammar_and_serves_the_rest(tmp_path: Path):
    model = make_model(tmp_path)
    engine = make_engine(model)
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        engine.add(request("a", [1], grammar=DATE))
    engine.add(request("b", [1], 3))
    assert len(drain(engine)["b"]) == 3


def test_a_compiled_grammar_is_shared_and_its_matchers_are_not(model: TinyModel):
    compiler = GrammarCompiler(model.directory, 300, frozenset([EOS]))
    compiler.prepare(DATE)
    first, second = compiler.matcher(DATE), compiler.matcher(DATE)
    before = second.allowed().copy()
    first.consume(byte_tokenizer().encode("2026"))
    assert set(np.flatnonzero(first.allowed())) == set(byte_tokenizer().encode("-"))
    assert np.array_equal(second.allowed(), before)


@pytest.mark.parametrize("layout", [{"separators": (",", ":")}, {}, {"indent": 2}, {"indent": 4}], ids=str)
def test_json_may_be_laid_out_as_python_does(model: TinyModel, layout: dict[str, Any]):
    thing = {"name": "a b", "size": 7, "colours": ["red", "green"], "inner": None}
    matcher = GrammarCompiler(model.directory, 300, frozenset([EOS])).matcher(SCHEMA)
    matcher.consume(byte_tokenizer().encode(json.dumps(thing, **layout)))
    assert matcher.ended


@pytest.mark.parametrize("text", ["{  ", "{\n\n", '{"name":\n \n'])
def test_json_is_not_stretched_with_empty_space(model: TinyModel, text: str):
    matcher = GrammarCompiler(model.directory, 300, frozenset([EOS])).matcher(SCHEMA)
    with pytest.raises(ValueError, match="grammar cannot go on"):
        matcher.consume(byte_tokenizer().encode(text))


def test_tokens_that_are_text_with_marks_for_spaces_and_bytes_are_matched_by_what_they_stand_for(tmp_path: Path):
    tokenizer = Tokenizer.from_directory(save(byte_fallback(), tmp_path))
    matcher = GrammarCompiler(tmp_path, tokenizer.n_vocab + 5, frozenset([2])).matcher(Grammar("regex", "b ab?[öü]"))

    def allowed() -> set[str]:
        return set(tokenizer._hf.convert_ids_to_tokens(np.flatnonzero(matcher.allowed()).tolist()))

    def consume(token: str) -> None:
        matcher.consume([tokenizer._hf.convert_tokens_to_ids(token)])

    assert "b" in allowed() <= {"b", "<0x62>"}
    consume("b")
    assert {"▁a", "▁ab"} < allowed() <= {"▁", "▁a", "▁ab", "<0x20>"}
    consume("▁ab")
    assert allowed() == {"ö", "<0xC3>"}
    consume("<0xC3>")
    assert allowed() == {"<0xB6>", "<0xBC>"}
    consume("<0xBC>")
    assert matcher.ended
