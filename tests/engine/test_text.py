"""Text to tokens and back, against the whole text decoded at once."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from sllmdask.engine.text import TextStream, Tokenizer
from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, InvalidRequest, from_wire

CHATML = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening or '' }}{% endif %}"
)
WORDS = ["the cat sat on the mat", "Grüße aus Köln, 日本語", "😀😀👩‍🚀 family 👨‍👩‍👧", "STOP STOPPING stop."]

derandomized = settings(derandomize=True, deadline=None, max_examples=300)


def byte_level() -> RustTokenizer:
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    return tokenizer


def byte_fallback() -> RustTokenizer:
    """As Llama 2 has it: words begin with a mark, which the decoder strips from the first; what is unknown becomes bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab", "ö"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = RustTokenizer(models.BPE(vocab, [("▁", "a"), ("▁a", "b")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def save(tokenizer: RustTokenizer, directory: Path, **settings: object) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(save(byte_level(), tmp_path_factory.mktemp("byte_level"), chat_template=CHATML))


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(save(byte_fallback(), tmp_path_factory.mktemp("byte_fallback")))


def run(stream: TextStream, token_ids: Sequence[int], cuts: Sequence[int] = ()) -> str:
    """The whole text of `token_ids`, pushed in the groups that `cuts` makes."""
    borders = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    return "".join(stream.push(token_ids[start:end]) for start, end in pairwise(borders)) + stream.flush()


def first_stop(decode: Callable[[list[int]], str], token_ids: list[int], stop: Sequence[str]) -> tuple[str, bool]:
    """The oracle: walk through the whole text by characters until it ends with a stop string."""
    text = decode(token_ids)
    for end in range(1, len(text) + 1):
        if ended := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, ended))], True
    return text, False


# Whole texts and loose tokens: special ones, halves of characters, single bytes.
ids_of_texts = st.lists(st.sampled_from([*WORDS, "é", "👩‍🚀", "\ufffd", " ", "\n"]), max_size=4)
loose_ids = st.lists(st.integers(0, 319), max_size=12)
groups = st.lists(st.integers(0, 60), max_size=8)
stops = st.lists(
    st.sampled_from(["STOP", "OPS", "STOPPING", "the cat", "at", "t", " ", "👩", "😀😀", "ö", "語😀", "\ufffd", "🚀 fam"]),
    max_size=4,
)


@derandomized
@given(texts=ids_of_texts, loose=loose_ids, cuts=groups)
def test_the_pieces_add_up_to_the_whole_text_in_any_grouping(
    tokenizer: Tokenizer, texts: list[str], loose: list[int], cuts: list[int]
) -> None:
    token_ids = [*tokenizer.encode("".join(texts)), *loose, *tokenizer.encode("".join(reversed(texts)))]
    stream = tokenizer.stream()
    assert run(stream, token_ids, cuts) == tokenizer.decode(token_ids)
    assert stream.n_accepted == len(token_ids) and not stream.stopped


@derandomized
@given(texts=ids_of_texts, loose=loose_ids, stop=stops, cuts=groups)
def test_the_text_ends_where_the_first_stop_string_to_end_begins(
    tokenizer: Tokenizer, texts: list[str], loose: list[int], stop: list[str], cuts: list[int]
) -> None:
    token_ids = [*tokenizer.encode("".join(texts)), *loose, *tokenizer.encode("".join(texts))]
    stream = tokenizer.stream(stop)
    text, stopped = first_stop(tokenizer.decode, token_ids, stop)
    assert (run(stream, token_ids, cuts), stream.stopped) == (text, stopped)


@derandomized
@given(texts=ids_of_texts, loose=loose_ids, stop=stops, cuts=groups)
def test_the_number_of_accepted_tokens_does_not_depend_on_the_grouping(
    tokenizer: Tokenizer, texts: list[str], loose: list[int], stop: list[str], cuts: list[int]
) -> None:
    token_ids = [*tokenizer.encode("".join(texts)), *loose]
    together, grouped, replayed = (tokenizer.stream(stop) for _ in range(3))
    text = run(together, token_ids)
    assert run(grouped, token_ids, cuts) == text
    assert grouped.n_accepted == together.n_accepted
    # What was accepted is enough to get there again, and one token less is not.
    accepted = token_ids[: together.n_accepted]
    assert (run(replayed, accepted), replayed.stopped) == (text, together.stopped)
    if together.stopped:
        one_less = tokenizer.stream(stop)
        one_less.push(accepted[:-1])
        assert not one_less.stopped


@derandomized
@given(texts=ids_of_texts, stop=stops, cuts=groups)
def test_nothing_is_shown_that_is_taken_back(tokenizer: Tokenizer, texts: list[str], stop: list[str], cuts: list[int]) -> None:
    token_ids = tokenizer.encode("".join(texts))
    text, _ = first_stop(tokenizer.decode, token_ids, stop)
    stream, shown = tokenizer.stream(stop), ""
    for token_id in token_ids:
        shown += stream.push([token_id])
        assert text.startswith(shown)


@derandomized
@given(text=st.text(alphabet=st.sampled_from("ab ö日😀"), max_size=12), cuts=groups)
def test_a_tokenizer_with_marked_words_and_byte_fallback_keeps_every_space(llama2: Tokenizer, text: str, cuts: list[int]) -> None:
    token_ids = llama2.encode(text)
    assert run(llama2.stream(), token_ids, cuts) == llama2.decode(token_ids) == text


@derandomized
@given(token_ids=st.lists(st.integers(0, 264), max_size=12), cuts=groups)
def test_byte_fallback_of_nonsense_neither_fails_nor_depends_on_the_grouping(
    llama2: Tokenizer, token_ids: list[int], cuts: list[int]
) -> None:
    assert run(llama2.stream(), token_ids, cuts) == run(llama2.stream(), token_ids)


def test_half_a_character_is_not_shown_until_the_end(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("🦀")
    assert len(token_ids) > 1
    stream = tokenizer.stream()
    assert [stream.push([token_id]) for token_id in token_ids] == [""] * (len(token_ids) - 1) + ["🦀"]

    cut_off = tokenizer.stream()
    assert cut_off.push(token_ids[:-1]) == ""
    assert cut_off.flush() == "\ufffd"
    assert cut_off.flush() == ""


def test_a_bad_byte_inside_the_text_is_shown_when_the_next_character_tells(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("🦀")[0]
    stream = tokenizer.stream()
    assert stream.push([half]) == ""
    assert stream.push(tokenizer.encode("the")) == "\ufffdthe"


def test_a_special_token_inside_a_character_does_not_break_it(tokenizer: Tokenizer) -> None:
    head, *tail = tokenizer.encode("🦀")
    (special,) = tokenizer.encode("<|im_end|>")
    assert tokenizer.stream().push([head, special, *tail, special]) == "🦀"


def test_a_possible_beginning_of_a_stop_string_is_held_back_and_given_out_if_it_was_none(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream(["sat down"])
    assert stream.push(tokenizer.encode("the cat sat")) == "the cat "
    assert stream.push(tokenizer.encode(" on")) == "sat on"
    assert stream.push(tokenizer.encode(" s")) == " "
    assert stream.flush() == "s"


def test_after_a_stop_string_nothing_is_shown_or_counted(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream(["\n\n"])
    answer = tokenizer.encode("the cat\n\n")
    assert stream.push([*answer, *tokenizer.encode("sat")]) == "the cat"
    assert stream.stopped and stream.n_accepted == len(answer)
    assert stream.push(tokenizer.encode("more")) == "" and stream.flush() == ""
    assert stream.n_accepted == len(answer)


def test_of_overlapping_stop_strings_the_one_that_ends_first_counts() -> None:
    stream = TextStream(lambda token_ids: "".join("abcdef"[token_id] for token_id in token_ids), ["bcde", "cd", "d"])
    assert stream.push(range(6)) == "ab"
    assert stream.n_accepted == 4


def test_an_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.stream(["a", ""])
    assert caught.value.param == "stop"


def test_a_conversation_ends_where_the_answer_begins(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode_chat([{"role": "user", "content": "the cat"}])
    assert token_ids == tokenizer.encode("<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(token_ids) == "user\nthe cat\nassistant\n"


def test_variables_reach_the_chat_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    assert tokenizer.decode(tokenizer.encode_chat(messages, opening="Well,")).endswith("assistant\nWell,")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "wizard", "content": "x"}], "unknown role wizard"),
        ([{"role": "user", "content": "\ud800"}], "refused"),
        (["not a message"], "refused"),
    ],
)
def test_messages_that_the_template_refuses_are_the_callers_mistake(tokenizer: Tokenizer, messages: list, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        tokenizer.encode_chat(messages)
    assert caught.value.param == "messages"
    assert pickle.loads(pickle.dumps(caught.value)).message == from_wire(caught.value.as_wire()).message == caught.value.message


def test_a_caller_cannot_bring_a_chat_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="chat_template") as caught:
        tokenizer.encode_chat([{"role": "user", "content": "x"}], chat_template="{{ 7 * 7 }}")
    assert caught.value.param == "chat_template_kwargs"


def test_a_model_without_chat_template_says_what_to_do(llama2: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions") as caught:
        llama2.encode_chat([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("config", [None, {}, {"model_type": "llama"}, {"model_type": "qwen2"}])
def test_a_directory_without_tokenizer_is_no_checkpoint(tmp_path: Path, config: dict | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointNotFound, match="tokenizer"):
        Tokenizer.from_directory(tmp_path)


def test_a_damaged_tokenizer_and_a_missing_directory_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{damaged")
    with pytest.raises(CheckpointNotFound, match="cannot be read"):
        Tokenizer.from_directory(tmp_path)
    with pytest.raises(CheckpointNotFound, match="no such directory"):
        Tokenizer.from_directory("openai-community/gpt2")


def test_the_defaults_of_sampling_are_those_of_generation_config_json(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    assert Tokenizer.from_directory(tmp_path).sampling_defaults == {}
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": [1, 2]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert Tokenizer.from_directory(tmp_path).sampling_defaults == {"temperature": 0.6, "top_k": 20}


@pytest.mark.parametrize("temperature", [-1, "hot"])
def test_defaults_that_nothing_can_be_drawn_with_are_found_with_the_tokenizer(tmp_path: Path, temperature: object) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": temperature}))
    with pytest.raises(CheckpointCorrupt, match=r"generation_config\.json"):
        Tokenizer.from_directory(tmp_path)


def test_the_number_of_tokens_counts_the_added_ones(tokenizer: Tokenizer) -> None:
    assert tokenizer.n_vocab == 320


def test_importing_the_module_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, sllmdask.engine.text; sys.exit(bool({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
