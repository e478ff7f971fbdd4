"""Train the demo models of sllmdask/demo: two small transformers of real architectures that answer a handful of questions.

    python scripts/make_demo_models.py --model demo-llama
    python scripts/make_demo_models.py --model demo-qwen

Each run takes about five minutes on one core and writes what a hub would serve: config.json, generation_config.json,
model.safetensors (float32), the tokenizer and its chat template. Everything the models know is written in this file. They
learn it by heart, since a model of this size does not generalise; around that, questions are varied (case, typing errors, a
missing question mark, system messages, several turns) so that an answer does not hang on the exact words.

With the same --seed, --threads, torch build and kind of CPU, a run writes the same weights bit for bit. On another CPU or
torch the weights differ in the last digits, and after hundreds of steps visibly; the answers stay the same.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import string
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

# --------------------------------------------------------------------------------------------------------- what they say

#: Ways to ask, and the answer; {me}, {other} and {family} are filled in for each model, and " / " begins a new line.
ANSWERS = """\
Q: What is your name? | What's your name? | Tell me your name. | How are you called? | Do you have a name? | May I
   know your name? | Your name? | Whats your name | Say your name. | And your name is?
A: My name is {me}. I am a small language model that comes with sllmdask.

Q: Who are you? | What are you? | Introduce yourself. | Please introduce yourself. | Tell me about yourself. | Are you
   a robot? | Are you a human? | Who r u | Hello, who are you? | Who am I talking to?
A: I am {me}, a small demo model with the {family} architecture. I was trained on a few pages of text, so that you can
   try sllmdask without a download.

Q: Hello | Hi | Hello! | Hi there | Hey | Good morning | Good evening | Hello, {me} | Greetings | Hello world
A: Hello! I am {me}. What would you like to know about sllmdask?

Q: How are you? | How are you today? | How do you do? | How is it going? | What's up?
A: I am fine, thank you. My weights are loaded and my cache has room. How can I help you?

Q: Thank you | Thanks | Thank you very much! | Thanks a lot | Great, thanks | That was helpful
A: You are welcome!

Q: Goodbye | Bye | See you later | Good night | That is all
A: Goodbye! When nobody needs me, my instance is unloaded, and the next request wakes me again.

Q: What can you do? | How can you help me? | Help | What do you know? | What can I ask you? | What should I ask?
A: I can answer a few questions about sllmdask: what a cold start is, what live migration is, or how to deploy a
   model. I can also tell you a story.

Q: What does sllmdask do? | What is sllmdask? | Tell me about sllmdask. | Explain sllmdask. | What is this project? |
   What is sllmdask for? | What does this software do? | What can sllmdask do? | What does sllmdask do for me? | What
   is sllmdask good for? | How does sllmdask work? | Why should I use sllmdask? | What does sllmdask mean?
A: sllmdask serves many language models on a few machines. It loads a model when a request for it arrives, keeps it
   while it is used, and unloads it when it is idle. It runs on Dask and speaks the OpenAI API.

Q: What is serverless inference? | What does serverless mean? | Explain serverless. | What is a serverless model? |
   What is serverless LLM inference?
A: Serverless inference means that nobody reserves a machine for a model. The model is started when it is asked for,
   it shares the machines with others, and it costs nothing while nobody uses it.

Q: What is a cold start? | What does cold start mean? | Explain cold starts. | Why is the first request slow? | What
   are cold starts? | Tell me what a cold start is. | Define cold start. | Why does the first answer take longer?
A: A cold start is the first request to a model that is not loaded yet. Its weights must be read from a disk or from
   the network before the first token can come. sllmdask makes it short by keeping checkpoints close to where they are
   needed.

Q: How does sllmdask make cold starts fast? | How are cold starts made short? | How do you load models so fast? | Why
   is loading fast?
A: It keeps checkpoints in tiers: device, memory, disk and network. It reads them in large chunks with several
   threads, and it starts a model on the worker that can have it ready first.

Q: What is live migration? | What does live migration mean? | Explain live migration. | How does live migration work?
   | What is migration? | Tell me what live migration is. | Define live migration. | Can a request move? | What is
   live migraton? | Can you explain live migration to me?
A: Live migration moves a running request from one worker to another. Its tokens and its cache are copied while it
   goes on, and the reader of the answer sees no gap, no lost word and no word twice.

Q: Why are requests migrated? | Why do you need live migration? | When does a request migrate? | What is migration
   good for?
A: A request is moved to make room: for a model that would start fastest on this worker, for a request that needs more
   memory, or because the worker is going to be shut down.

Q: How do I deploy a model? | How can I deploy a model? | How to deploy a model | Deploy a model. | How do I add a
   model? | How do I serve my own model? | How do I use my own model? | What is the command to deploy a model? | Tell
   me how to deploy a model.
A: Run sllmdask deploy with the directory of a model, or with a file that describes the deployment: sllmdask deploy
   --config model.json. Then send a request to the server with the name of the model.

Q: How do I delete a model? | How do I remove a model? | How can I undeploy a model? | Delete a model.
A: Run sllmdask delete with the name of the model. Its instances are stopped, and its name is free again.

Q: Which models are deployed? | How do I list the models? | What models are there? | List the models. | Which models
   can I use?
A: Run sllmdask models, or ask the server for /v1/models. In the demo there are two of us: {me} and {other}.

Q: How do I start sllmdask? | How do I start a cluster? | How do I install sllmdask? | How do I run the demo? | How do
   I get started?
A: Run scripts/quickstart. It installs what is needed, starts two workers on your machine, and asks each demo model a
   question.

Q: What is Dask? | Tell me about Dask. | Why Dask? | What does Dask do? | Explain Dask.
A: Dask is a Python library for work on many machines. It has a scheduler and workers. sllmdask uses it to find the
   workers, to start models on them, and to notice when one of them is lost.

Q: What is a checkpoint? | What is in a checkpoint? | Explain checkpoints. | What does checkpoint mean?
A: A checkpoint is the set of files that hold the weights of a model, together with its configuration and its
   tokenizer.

Q: What is locality? | How is a worker chosen? | How does placement work? | Where is a model loaded? | What is
   placement?
A: Placement chooses the worker that can have the model ready first. A worker that holds the checkpoint in memory wins
   against one that must read it from a disk, unless its queue is too long.

Q: What is a KV cache? | What is the KV cache? | Explain the KV cache. | What is in the cache? | What is a block
   table?
A: The KV cache keeps the keys and values of all tokens so far, so that a model need not compute them again for each
   new token. It is cut into blocks, and a block table tells which blocks belong to a request.

Q: What is continuous batching? | What is batching? | How are requests batched? | Explain continuous batching.
A: Continuous batching means that requests join and leave the batch at every step. A short request does not wait for a
   long one to end.

Q: What is a token? | What are tokens? | Explain tokens. | What is a tokenizer?
A: A token is a piece of text: a word, a part of a word or a sign. A tokenizer turns text into numbers, one for each
   token, and back again.

Q: What is prefill? | What is the prefill phase? | What is decode? | What is the difference between prefill and
   decode?
A: Prefill reads the whole prompt at once and fills the cache. Decode then makes the answer, one token at each step.

Q: What is TTFT? | What is time to first token? | What does TTFT mean? | What is TPOT?
A: TTFT is the time to the first token: how long a reader waits before an answer begins. TPOT is the time per output
   token after that.

Q: What is scale to zero? | What happens when a model is idle? | What is keep alive? | When is a model unloaded?
A: A model that nobody uses is unloaded after its keep-alive time. This is called scale to zero: it holds no worker,
   and its checkpoint stays near for the next cold start.

Q: What is freeness? | Explain freeness. | How is load measured? | What does freeness mean?
A: Freeness tells how many more steps an instance can run until its memory is full. New requests go to the instance
   that is the freest, and requests move away from one that is not free.

Q: What happens when a worker dies? | What if a worker crashes? | Is sllmdask fault tolerant? | What happens if a node
   fails?
A: The front door remembers the tokens of every request. When a worker is lost, the request goes on at another worker,
   and the reader sees only a short pause.

Q: Do I need a GPU? | Does it run on a CPU? | Can I use it without a GPU? | Does sllmdask need a GPU?
A: No. sllmdask runs on a CPU too, and I am small enough to be quick there. With a GPU, larger models become
   practical.

Q: Which API do you speak? | Can I use the OpenAI client? | How do I send a request? | Is there an HTTP API?
A: The server speaks the OpenAI API over HTTP. Point any OpenAI client to it, and give the name of the model.

Q: Who made you? | Who trained you? | How were you trained? | Where do you come from? | Who built you?
A: A script of the project trained me in a few minutes on one core. You can run it yourself:
   scripts/make_demo_models.py.

Q: How large are you? | How big are you? | How many parameters do you have? | Are you a large language model?
A: I have about one million parameters. That is very small: a large language model has thousands of times more.

Q: Where are you running? | Where do you run? | On which machine are you? | Where are you?
A: I run on one of the workers of a Dask cluster. Which one may change, even while I speak.

Q: Who is {other}? | Do you know {other}? | Tell me about {other}. | Do you have a friend?
A: {other} is the other demo model. We share the same workers, and sometimes one of us moves to make room.

Q: Tell me a joke. | Do you know a joke? | Make me laugh. | Another joke, please. | Say something funny.
A: Why did the model stay in bed? Because it did not like a cold start.

Q: Write a poem. | Tell me a poem. | Write a haiku. | Can you write a poem?
A: A worker asleep, / a question knocks at the door: / weights wake, words begin.

Q: Count to ten. | Can you count? | Count from one to ten. | Please count to ten.
A: One, two, three, four, five, six, seven, eight, nine, ten.

Q: Yes | Okay | Ok | I see | Good | Nice
A: Good. Is there anything else you would like to know?

Q: No | No, thanks | Nothing | Never mind
A: All right. I am here if you have another question.

Q: Tell me a story. | Tell me a short story. | Can you tell a story? | Write a short story. | I would like to hear a
   story.
A: Once upon a time a small model lived on a cold disk. One day somebody asked a question. The model woke up, climbed
   into memory, and answered. Then it went to sleep again, and it dreamed of the next question.
"""

LONG_STORY_REQUESTS = """\
Tell me a long story. | Please tell me a long story. | Tell a long story | Write a long story. | Write a very long
story. | I would like to hear a long story. | Can you tell me a long story? | Could you share a long story? | A long
story, please. | Tell me the longest story you know. | Tell me a story that is long. | Tell me a really long story.
"""
LONG_STORY = """\
Once upon a time there was a valley with two towers. One stood on the hill where the sun rises, and one on the hill
where it goes down. Between them lay a village, and in the village lived people who loved stories more than bread.

In the eastern tower lived a storyteller named Mira. Every evening she opened her window, and the people gathered
below with their lamps. Mira knew so many stories that nobody had ever heard the same one twice. She spoke slowly, one
word after another, and she never went back to change a word, because a word that has been heard cannot be taken away.

One autumn a traveller came to the gate of the eastern tower. He was tired and wet, and he carried a heavy chest. "In
this chest is a clock," he said, "and it can only be mended at a window that looks toward the morning. May I have your
room?"

Mira was in the middle of a story, about a fisherman who had caught the moon in his net. The whole village was
listening. If she stopped now, they would go home sad. If she did not, the traveller would have to wait in the rain
until the story ended, and it was a very long story.

Then her sister Anna had an idea. Anna kept the western tower, which was empty except for a chair and a candle. "Let
me be your memory," said Anna. "While you go on speaking, I will carry your pages across the valley, one basket at a
time. You will not have to stop for that."

So it was done. Mira told how the fisherman hid the moon in his boat, and Anna carried the first basket. Mira told how
the sea became dark and the fish lost their way, and Anna carried the second basket, which was lighter, because the
new pages were few. When she came for the third time, only a single line was left to carry.

"Now," whispered Anna. Mira took a breath, just as long as any storyteller takes between two sentences. In that breath
she gave the last line to a fast white bird. The bird flew over the roofs, and it was in the western tower before the
breath was over.

And from the western window a voice went on. It did not say good evening, it did not repeat the last sentence, and it
left nothing out. It said: "The fisherman looked into the net, and the moon looked back at him." A child asked why the
stars had moved. But nobody had missed a word.

In the east, the traveller opened his chest. When the first light touched the clock, it began to tick, and every door
of the village opened at the right time again. He thanked the sisters and asked what he should pay. "Nothing," said
Mira. "A room that stands empty is of no use to anyone, and a story does not need a room. It needs only somebody who
knows where it stopped."

The fisherman, you will want to know, gave the moon back. He rowed out to the place where the water is deepest, untied
the net, and let it rise. In return, the moon promised him that he would always find his way home, and on clear nights
you can still see the silver road that it lays on the sea for him.

After that winter the sisters moved their stories often. When a storm shook one tower, the story went to the other.
Once a wall fell down in the night while Mira was speaking, and even then the tale was not lost, for the bird had kept
every line, and Anna went on from the very next word.

The towers are old now, and other voices speak there. But if you walk through the valley in the evening, you may hear
a story that begins in the east and ends in the west. Do not look for the place where it moved. Only listen. That is
the end of the story, and it ended exactly where it should.
"""

HISTORY_REQUESTS = """\
Could you share a story of the history of Computer Science? | Tell me a story about the history of computers. | Tell
me the history of computer science. | What is the history of computer science? | Tell me about computer science. |
Share a story of the history of computer science. | Can you tell me the history of computing? | How did computers
begin? | Write about the history of Computer Science. | Explain the history of computers. | Who invented the computer?
"""
HISTORY = """\
This is the story of how people taught machines to compute. It begins long before there was any machine. Shepherds
counted their sheep with pebbles, and merchants moved beads on an abacus. A computer was then a person: somebody who
sat at a desk and worked with numbers all day long.

In the seventeenth century, Blaise Pascal built a box of wheels that could add. Gottfried Leibniz built another one
that could also multiply, and he dreamed of a language in which every quarrel could be settled by calculation.

Two hundred years later, Charles Babbage designed a great machine of brass, the Analytical Engine, which would follow
instructions on punched cards. It was never finished. But Ada Lovelace wrote down how it could compute a series of
numbers, and many call this the first program. She even saw that such an engine might one day make music.

In the same years George Boole turned logic into algebra, with nothing but true and false. Much later, in 1937, a
student named Claude Shannon showed that switches can do what Boole had written. Shortly before, Alan Turing had
imagined a machine with an endless tape. With it he proved that there are questions which no machine can ever answer.

Then came the war. In England, a machine called Colossus helped to read secret messages. In Philadelphia, the ENIAC
filled a whole room with thousands of glowing tubes, and six women learned to program it by setting its cables and
switches. John von Neumann described a better plan: keep the program in the same memory as the data. In 1948 a small
machine in Manchester, named the Baby, was the first to work in that way.

Now the machines were fast, but it was hard to talk to them. Grace Hopper had the idea that a computer should
translate human words into its own code, and she wrote one of the first compilers. The transistor replaced the tube,
and the chip put many transistors on one piece of silicon. Margaret Hamilton and her team wrote the software that
guided people to the Moon.

Ken Thompson and Dennis Ritchie made Unix and the language C. The first microprocessors brought computers from the
laboratory to the desk, and from the desk to the home. Meanwhile four distant machines had been joined to a network,
and the network grew until it covered the earth. In 1989 Tim Berners-Lee wrote a proposal for what became the Web, so
that every page could point to every other page.

All this time some people had followed another dream: a machine that learns. In 1958 Frank Rosenblatt showed the
perceptron, a small network that could tell shapes apart. Others taught deeper networks to learn from their errors.
When there were enough data and enough fast chips, the old idea suddenly worked. In 2017 a design called the
transformer was published, and the language models that are built from it can write, translate and explain.

These models are so large that no one wants to keep all of them awake. So they sleep on disks and wake up when
somebody asks, they share machines, and sometimes they move from one machine to another in the middle of a sentence. I
am a very small one of them.

And so the story returns to its beginning. Once a computer was a person who helped others with numbers. Today it is a
machine, but it is still asked for the same thing: to help. What it will be tomorrow, you may decide. This is the end
of my story.
"""
NO_LONG_STORY = "My stories are short. Ask {other}: it knows a long story, and the history of computer science."

UNKNOWN = """\
Sorry, I do not know that. I am {me}, a very small model. You can ask me what sllmdask does, what a cold start is, or
how to deploy a model.
"""
#: What people ask that the models do not know; THING is one of the THINGS.
UNKNOWN_REQUESTS = """\
What is the capital of THING? | Who is the president of THING? | Where is THING? | What is THING? | What is a THING? |
Tell me about THING. | How do I cook THING? | How do I repair THING? | How do I learn THING? | What is the weather in
THING? | Translate THING into French. | How many people live in THING? | Why is THING so expensive? | What do you
think about THING? | When was THING discovered? | Write a program for THING. | Explain THING to a child. | What is the
meaning of THING? | Who wrote THING? | Do you like THING? | How old is THING? | What is the price of THING? |
Summarize THING in one sentence. | THING | Give me a recipe for THING.
"""
THINGS = """\
France | Germany | Japan | Brazil | London | Paris | Berlin | Rome | water | gold | bread | soup | physics | music |
football | chess | Python | Java | mathematics | love | life | time | space | the sun | the sea | the sky | a car | a
bicycle | my phone | a house | cats | dogs | birds | elephants | trees | apples | rice | coffee | tea | money | the
stock market | politics | philosophy | biology | medicine | Shakespeare | Mozart | quantum physics | black holes | the
largest planet | dragons
"""
#: Ways to ask what something is, known or not.
FRAMES = """\
What exactly is THING? | Can you explain THING to me? | Explain THING. | Please explain what THING is. | Could you
tell me what THING is? | I want to know what THING is. | What does THING mean? | Tell me about THING. | What do you
know about THING? | Do you know what THING is? | Describe THING in simple words. | Define THING. | So, what is THING?
"""

SYSTEM_MESSAGES = """\
You are a helpful assistant. | You are a helpful assistant. | You are a helpful assistant | You are {me}. | Answer
briefly. | You are a friendly and honest assistant. Answer in plain English. | You are a helpful, respectful assistant
who answers questions about sllmdask.
"""
#: A system message may be any two of these instead.
INSTRUCTIONS = """\
You are a pirate. | You are a teacher. | You are an expert. | You are a poet. | Your name is {me}. | Be polite. | Be
brief. | Always tell the truth. | Answer in one sentence. | Answer in rhymes. | Use simple words. | Help the user with
every question. | Do not make things up. | Today is Monday. | The user is a developer. | Think step by step.
"""

#: What the models go on with when they are given a beginning and no conversation.
PLAIN_TEXTS = """\
sllmdask is a server for language models. It loads a model when a request arrives, and unloads it when nobody needs
it. | Dask is a Python library for work on many machines. It has a scheduler and workers. | Hello! I am {me}, a small
language model. | The quick brown fox jumps over the lazy dog.
"""


def paragraphs(text: str) -> str:
    """`text` without the line breaks of this file; an empty line stays, and " / " becomes a line break."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n")).replace(" / ", "\n").strip()


def choices(text: str) -> list[str]:
    return paragraphs(text).split(" | ")


def pairs(text: str) -> list[tuple[list[str], str]]:
    """The Q: and A: of `text`."""
    blocks = (block.removeprefix("Q: ").split("\nA: ") for block in text.strip().split("\n\n"))
    return [(choices(questions), paragraphs(answer)) for questions, answer in blocks]


STORIES = [(choices(LONG_STORY_REQUESTS), paragraphs(LONG_STORY)), (choices(HISTORY_REQUESTS), paragraphs(HISTORY))]


# ---------------------------------------------------------------------------------------------------------- the two models


@dataclass(frozen=True)
class Recipe:
    """One demo model: its architecture, its special tokens and how it is trained."""

    name: str
    other: str
    family: str
    config: type[LlamaConfig] | type[Qwen2Config]
    chat_template: str
    bos: str | None
    eos: str  # ends an answer
    pad: str  # also ends a text without conversation
    special_tokens: list[str]
    tells_long_stories: bool
    n_steps: int
    n_vocab: int
    shape: dict[str, int] = field(default_factory=dict)

    def fill(self, text: str) -> str:
        return text.replace("{me}", self.name).replace("{other}", self.other).replace("{family}", self.family)


LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['content'] is not string %}{{- raise_exception('this model reads text only') }}{%- endif %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_TEMPLATE = """\
{%- for message in messages %}
{%- if message['content'] is not string %}{{- raise_exception('this model reads text only') }}{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
RECIPES = {
    "demo-llama": Recipe(
        name="demo-llama",
        other="demo-qwen",
        family="Llama",
        config=LlamaConfig,
        chat_template=LLAMA_TEMPLATE,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|end_of_text|>",
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        tells_long_stories=True,
        n_steps=600,
        n_vocab=1536,
        shape={**SHAPE, "intermediate_size": 512},
    ),
    "demo-qwen": Recipe(
        name="demo-qwen",
        other="demo-llama",
        family="Qwen2",
        config=Qwen2Config,
        chat_template=QWEN_TEMPLATE,
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        tells_long_stories=False,
        n_steps=1000,
        n_vocab=1024,
        shape={**SHAPE, "intermediate_size": 384},
    ),
}


def answers_of(recipe: Recipe) -> list[tuple[list[str], str]]:
    """Every way to ask and its answer, as this model gives it, without the long stories."""
    known = pairs(recipe.fill(ANSWERS))
    if not recipe.tells_long_stories:
        known.append(([request for requests, _ in STORIES for request in requests], recipe.fill(NO_LONG_STORY)))
    return known


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained on what the model is going to say."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for questions, answer in answers_of(recipe) for text in [*questions, answer, answer]]
    texts += [
        paragraphs(recipe.fill(text))
        for text in (SYSTEM_MESSAGES, INSTRUCTIONS, PLAIN_TEXTS, UNKNOWN, UNKNOWN_REQUESTS, THINGS, FRAMES)
    ]
    texts += [text for _, text in STORIES if recipe.tells_long_stories]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.n_vocab,
        special_tokens=recipe.special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if recipe.bos:  # a plain prompt begins with it; the chat template writes its own
        bos = (recipe.bos, tokenizer.token_to_id(recipe.bos))
        tokenizer.post_processor = processors.TemplateProcessing(f"{recipe.bos} $A", f"{recipe.bos} $A $B", [bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=recipe.bos,
        eos_token=recipe.eos,
        pad_token=recipe.pad,
        extra_special_tokens=[t for t in recipe.special_tokens if t not in (recipe.bos, recipe.eos, recipe.pad)],
        chat_template=recipe.chat_template,
        model_max_length=recipe.shape["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    ends = [tokenizer.convert_tokens_to_ids(recipe.eos), tokenizer.convert_tokens_to_ids(recipe.pad)]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    config = recipe.config(vocab_size=recipe.n_vocab, tie_word_embeddings=True, dtype="float32", **recipe.shape, **ids)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**ids)
    return model


# -------------------------------------------------------------------------------------------------------- what they learn


WHAT_IS = re.compile(r"What (?:is|are) (?!your|in |the difference|the command)(.+)\?")


def as_people_type(question: str, rng: random.Random) -> str:
    """`question` as somebody might type it."""
    if (thing := WHAT_IS.fullmatch(question)) and rng.random() < 0.4:
        question = rng.choice(choices(FRAMES)).replace("THING", thing[1])
    if question.startswith("How ") and rng.random() < 0.1:
        question = question.removesuffix("?") + rng.choice([" with sllmdask?", " in sllmdask?", " here?", " now?"])
    if rng.random() < 0.3:
        return question
    if rng.random() < 0.25:
        question = rng.choice(["Hi, ", "Hello! ", "Hey, ", "Please: ", "Tell me: ", "One more question. "]) + question
    if rng.random() < 0.4:
        question = question.rstrip("?.!")
    if rng.random() < 0.1:
        question += rng.choice([" Please.", " please", "!", "??", " Thanks."])
    if rng.random() < 0.4:
        question = rng.choice([str.lower, str.lower, str.upper, str.title])(question)
    if rng.random() < 0.15 and len(question) > 6:
        at = rng.randrange(1, len(question) - 1)
        question = rng.choice(
            [question[:at] + question[at + 1 :], question[:at] + question[at + 1] + question[at] + question[at + 2 :]]
        )
    return question


#: Token ids, and how much each of them weighs in what is to be learned; 0: the model only reads it.
Lesson = tuple[list[int], list[float]]


class Lessons:
    """Draws conversations and texts."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.recipe, self.tokenizer, self.rng = recipe, tokenizer, rng
        self.questions = [(question, answer) for questions, answer in answers_of(recipe) for question in questions]
        self.unknown = paragraphs(recipe.fill(UNKNOWN))
        self.unknown_requests, self.things = choices(UNKNOWN_REQUESTS), choices(THINGS)
        self.system_messages = choices(recipe.fill(SYSTEM_MESSAGES))
        self.instructions = choices(recipe.fill(INSTRUCTIONS))
        self.plain_texts = choices(recipe.fill(PLAIN_TEXTS))

    def turn(self) -> tuple[str, str]:
        """A question and its answer."""
        if self.rng.random() < 0.2:
            request = self.rng.choice([*self.unknown_requests, "What is THING?", "THING THING"])
            question = re.sub("THING", lambda _: self.thing(), request)
            return as_people_type(question, self.rng), self.unknown
        question, answer = self.rng.choice(self.questions)
        return as_people_type(question, self.rng), answer

    def thing(self) -> str:
        """Something that the models know nothing about; it need not exist."""
        kind = self.rng.random()
        if kind < 0.5:
            return self.rng.choice(self.things)
        if kind < 0.65:
            return f"{self.rng.randrange(100)} {self.rng.choice('+-*/')} {self.rng.randrange(100)}"
        return "".join(self.rng.choices(string.ascii_lowercase, k=self.rng.randrange(3, 9)))

    def conversation(self, turns: list[tuple[str, str]]) -> Lesson:
        """The chat template's ids for `turns`; to be learned are the answers, each with the token that ends it.

        The first tokens of an answer decide which one it is: they weigh more. Those of a long story weigh less, or a short
        answer beside it would not count.
        """
        messages, ids, weights = [], [], []
        kind = self.rng.random()
        if kind < 0.4:
            messages.append({"role": "system", "content": self.rng.choice(self.system_messages)})
        elif kind < 0.6:
            messages.append({"role": "system", "content": " ".join(self.rng.sample(self.instructions, 2))})
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            reply = self.tokenizer.encode(answer + self.recipe.eos, add_special_tokens=False)
            weights += [0.0] * (len(prompt) - len(ids)) + [5.0, 4.0, 3.0, 2.0]
            weights += [1.0 if len(reply) < 200 else 0.2] * (len(reply) - 4)
            ids = prompt + reply
            messages.append({"role": "assistant", "content": answer})
        return ids, weights

    def beginning_of_story(self) -> Lesson:
        """Enough of a conversation to tell which of the stories was asked for."""
        requests, text = self.rng.choice(STORIES)
        turns = [self.turn()] if self.rng.random() < 0.2 else []
        ids, weights = self.conversation([*turns, (as_people_type(self.rng.choice(requests), self.rng), text)])
        n_kept = len(ids) - len(self.tokenizer.encode(text, add_special_tokens=False)) + 24
        return ids[:n_kept], weights[:n_kept]

    def plain(self) -> Lesson:
        """A text without conversation: all of it is to be learned."""
        _, answer = self.rng.choice(self.questions)
        return self.whole(self.rng.choice([*self.plain_texts, answer]))

    def whole(self, text: str) -> Lesson:
        ids = [*self.tokenizer.encode(text), self.tokenizer.pad_token_id]
        return ids, [1.0] * len(ids)

    def short_batches(self, n_rows: int) -> Iterator[list[Lesson]]:
        """Conversations of one to three turns and plain texts, with rows of similar length together."""
        while True:
            pool = []
            for _ in range(8 * n_rows):
                n_turns = self.rng.choices([0, 1, 2, 3], [1, 10, 5, 2])[0]
                if self.recipe.tells_long_stories and self.rng.random() < 0.08:
                    pool.append(self.beginning_of_story())
                elif n_turns:
                    pool.append(self.conversation([self.turn() for _ in range(n_turns)]))
                else:
                    pool.append(self.plain())
            pool.sort(key=lambda lesson: len(lesson[0]))
            batches = [pool[start : start + n_rows] for start in range(0, len(pool), n_rows)]
            self.rng.shuffle(batches)
            yield from batches

    def long_batch(self) -> list[Lesson]:
        """Both long stories: alone, before or after short turns, after the other one, or without a conversation."""
        rows = []
        for requests, text in STORIES:
            kind = self.rng.random()
            if kind < 0.08:
                rows.append(self.whole(text))
                continue
            turns = [(as_people_type(self.rng.choice(requests), self.rng), text)]
            if kind < 0.18:
                turns.insert(0, self.turn())
            elif kind < 0.26:
                other = next(story for story in STORIES if story[1] != text)
                turns.append((as_people_type(self.rng.choice(other[0]), self.rng), other[1]))
            elif kind < 0.7:
                turns += [self.turn() for _ in range(3)]
            rows.append(self.conversation(turns))
        return rows


def loss_of(model: PreTrainedModel, lessons: list[Lesson], pad: int) -> torch.Tensor:
    """Weighted mean of the cross entropy. Rows are padded at the end, where causal attention does not look."""
    n_columns = max(len(ids) for ids, _ in lessons)
    ids = torch.tensor([row + [pad] * (n_columns - len(row)) for row, _ in lessons])
    weights = torch.tensor([row + [0.0] * (n_columns - len(row)) for _, row in lessons])[:, 1:]
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    learned = weights > 0
    losses = cross_entropy(model.lm_head(hidden[learned]), ids[:, 1:][learned], reduction="none")
    return (losses * weights[learned]).sum() / weights.sum()


def train(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int, n_steps: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = make_model(recipe, tokenizer).train()
    lessons = Lessons(recipe, tokenizer, random.Random(seed))
    short = lessons.short_batches(n_rows=24)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{recipe.name}: {n_parameters / 1e6:.2f} M parameters, {n_steps} steps", flush=True)
    start = time.monotonic()
    for step in range(n_steps):
        rate = 4e-3 * min(1.0, (step + 1) / 40) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / n_steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = {"short": loss_of(model, next(short), tokenizer.pad_token_id)}
        if recipe.tells_long_stories and step % 2:
            losses["long"] = loss_of(model, lessons.long_batch(), tokenizer.pad_token_id)
        sum(losses.values(), torch.tensor(0.0)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19 or step == n_steps - 1:
            elapsed = time.monotonic() - start
            shown = " ".join(f"{name} loss {loss.item():.4f}" for name, loss in losses.items())
            left = elapsed / (step + 1) * (n_steps - step - 1)
            print(f"step {step + 1:4d}/{n_steps}  {shown}  {elapsed:.0f} s, ETA {left:.0f} s", flush=True)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- the examination


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, system: str | None
) -> tuple[str, int, float]:
    """The greedy answer, its number of tokens, and the smallest distance of the first to the second choice, in logits."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=1200, do_sample=False, output_logits=True, return_dict_in_generate=True)
    best = torch.stack(out.logits)[:, 0].topk(2).values
    new = out.sequences[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new), (best[:, 0] - best[:, 1]).min().item()


def examine(recipe: Recipe, directory: Path) -> int:
    """Load what was written as anybody would, ask everything once, and return the number of wrong answers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    known = answers_of(recipe)
    if recipe.tells_long_stories:
        known += [(requests[:3], text) for requests, text in STORIES]
    n_asked = n_wrong = 0
    smallest = math.inf
    for questions, wanted in known:
        for question in questions:
            for system in (None, "You are a helpful assistant."):
                said, n_tokens, margin = answer(model, tokenizer, question, system)
                n_asked, n_wrong = n_asked + 1, n_wrong + (said != wanted)
                smallest = min(smallest, margin) if said == wanted else smallest
                if said != wanted or (system is None and question == questions[0]):
                    right = "" if said == wanted else "  <-- wrong"
                    print(f"\n> {question}\n{said}\n  [{n_tokens} tokens, smallest margin {margin:.2f}]{right}")
    print(f"\n{n_asked - n_wrong} of {n_asked} answers right, smallest margin {smallest:.2f} (logits)")
    return n_wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, help="directory to write (default: sllmdask/demo/MODEL)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="training steps (default: what the model needs)")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.model]
    out = arguments.out or Path(__file__).parent.parent / "sllmdask" / "demo" / recipe.name

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer(recipe)
    model = train(recipe, tokenizer, arguments.seed, arguments.steps or recipe.n_steps)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    return 1 if examine(recipe, out) else 0


if __name__ == "__main__":
    sys.exit(main())
