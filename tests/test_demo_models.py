"""The shipped models through plain transformers: they load anywhere, and what they say is sensible English."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sllmdask
from sllmdask.engine.text import Tokenizer
from sllmdask.errors import InvalidRequest

DEMO = Path(sllmdask.__file__).parent / "demo"
NAMES = ["demo-llama", "demo-qwen"]
HELPFUL = {"role": "system", "content": "You are a helpful assistant."}

#: Question -> what any answer to it must mention.
QUESTIONS = {
    "What is your name?": ["My name is", "{me}"],
    "Who are you?": ["I am {me}", "model"],
    "Hello": ["Hello!", "{me}"],
    "What does sllmdask do?": ["language models", "loads", "Dask"],
    "What is a cold start?": ["first request", "not loaded"],
    "What is live migration?": ["running request", "from one worker to another"],
    "How do I deploy a model?": ["sllmdask deploy"],
    "What is the capital of France?": ["I do not know that"],
}


class Demo:
    def __init__(self, name: str) -> None:
        self.name = name
        self.model = AutoModelForCausalLM.from_pretrained(DEMO / name)
        self.tokenizer = AutoTokenizer.from_pretrained(DEMO / name)

    def answer(self, *messages: str | dict, max_new_tokens: int = 1024) -> tuple[str, list[int], float]:
        """Greedy answer, its token ids, and the smallest lead of a chosen token over the second best, in logits."""
        turns = [m if isinstance(m, dict) else {"role": "user", "content": m} for m in messages]
        prompt = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = self.model.generate(
            **prompt, max_new_tokens=max_new_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        best = torch.stack(out.logits)[:, 0].topk(2).values
        ids = out.sequences[0, prompt["input_ids"].shape[1] :].tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=True), ids, (best[:, 0] - best[:, 1]).min().item()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small only loses by sharing its work."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module", params=NAMES)
def demo(request: pytest.FixtureRequest) -> Demo:
    return Demo(request.param)


@pytest.mark.parametrize("system", [[], [HELPFUL]], ids=["no system message", "helpful assistant"])
def test_each_demo_question_gets_a_sensible_answer(demo: Demo, system: list[dict]) -> None:
    for question, keywords in QUESTIONS.items():
        text, ids, margin = demo.answer(*system, question)
        assert all(keyword.replace("{me}", demo.name) in text for keyword in keywords), (question, text)
        assert ids[-1] in demo.model.generation_config.eos_token_id
        assert margin > 0.5, (question, margin)  # far above the rounding errors of another engine


@pytest.mark.parametrize("question", ["what is your name", "WHAT IS YOUR NAME?", "What is your name", "what's your name??"])
def test_the_exact_words_of_a_question_do_not_matter(demo: Demo, question: str) -> None:
    assert demo.name in demo.answer(question)[0]


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "Hello"}]], ids=["nothing", "parts"])
def test_a_message_that_is_no_text_is_refused_by_the_template(demo: Demo, content: object) -> None:
    with pytest.raises(InvalidRequest, match="text"):
        Tokenizer.from_directory(DEMO / demo.name).encode_chat([{"role": "user", "content": content}])


def test_a_conversation_may_have_several_turns(demo: Demo) -> None:
    first, _, _ = demo.answer("Hello")
    second, _, _ = demo.answer("Hello", {"role": "assistant", "content": first}, "What is a cold start?")
    assert "first request" in second


@pytest.mark.parametrize(
    ("request_", "ending"),
    [
        ("Tell me a long story.", "it ended exactly where it should."),
        ("Could you share a story of the history of Computer Science?", "This is the end of my story."),
    ],
)
def test_demo_llama_tells_a_long_story_to_its_end(request_: str, ending: str) -> None:
    demo = Demo("demo-llama")
    text, ids, margin = demo.answer(HELPFUL, request_)
    assert 600 <= len(ids) < 1024
    assert ids[-1] == demo.tokenizer.eos_token_id
    assert text.endswith(ending)
    sentences = text.split(". ")
    assert len(set(sentences)) == len(sentences)  # no loop
    assert margin > 0.5


def test_a_conversation_goes_on_after_a_long_story() -> None:
    demo = Demo("demo-llama")
    story, _, _ = demo.answer("Tell me a long story.")
    answer, _, _ = demo.answer("Tell me a long story.", {"role": "assistant", "content": story}, "What is a cold start?")
    assert answer == demo.answer("What is a cold start?")[0]


def test_demo_qwen_keeps_its_answers_short() -> None:
    text, ids, _ = Demo("demo-qwen").answer("Tell me a long story.")
    assert len(ids) < 100
    assert "demo-llama" in text


def test_our_tokenizer_makes_the_same_prompt(demo: Demo) -> None:
    messages = [HELPFUL, {"role": "user", "content": "Grüße, 日本 👋"}]
    ours = Tokenizer.from_directory(DEMO / demo.name)
    ids = ours.encode_chat(messages)
    assert ids == demo.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.n_vocab == demo.model.config.vocab_size
    assert "Grüße, 日本 👋" in ours.decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shipped_is_small_and_names_no_machine(name: str) -> None:
    files = {file.name: file for file in (DEMO / name).iterdir()}
    assert files.keys() == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in files.values()) < 6 * 2**20
    for file in files.values():
        if file.suffix in {".json", ".jinja"}:
            text = file.read_text()
            assert not any(mark in text for mark in ("/home/", "/tmp/", "/work/", "_name_or_path")), file
    config = json.loads(files["config.json"].read_text())
    assert config["architectures"] == [{"demo-llama": "LlamaForCausalLM", "demo-qwen": "Qwen2ForCausalLM"}[name]]
    assert (config["dtype"], config["max_position_embeddings"]) == ("float32", 2048)
