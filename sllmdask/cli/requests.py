"""Ask models: ``generate``, ``chat``, ``encode``."""

from __future__ import annotations

import json
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from sllmdask.cli.output import print_json, waiting_line
from sllmdask.cli.shell import UNREACHABLE, F, command, connect, exit_code, json_option, server_option
from sllmdask.errors import ConfigError, SllmError

if TYPE_CHECKING:
    from sllmdask.client import Client, GenerateFuture, Response

#: What the arguments say, and what the client says itself.
_OWN_FIELDS = {"model", "prompt", "messages", "chat", "stream", "stream_options", "max_in_flight", "on_progress"}


def _sampling_options(command: F) -> F:
    for option in (
        click.option("--max-tokens", type=int, help="Tokens of the answer at most.  [default: what the window holds]"),
        click.option("--temperature", type=float, help="0 takes the likeliest token.  [default: 1]"),
        click.option("--top-p", type=float, help="Only the likeliest tokens that have this probability together.  [default: 1]"),
        click.option("--seed", type=int, help="The same seed draws the same answer."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer before this text; up to four times."),
        click.option("--json-schema", metavar="FILE", help="The answer is JSON that fits the schema in FILE."),
        click.option(
            "-p", "--param", "others", multiple=True, metavar="NAME=VALUE", help="Any other field; VALUE is JSON or text."
        ),
        click.option("--timeout", type=float, help="Seconds that an answer may take, loading included."),
    ):
        command = option(command)
    return command


def _fields(others: Sequence[str], json_schema: str | None, **given: Any) -> dict[str, Any]:
    """The fields of the body that the options ask for."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value for name, value in given.items() if value not in (None, ())
    }
    if json_schema is not None:
        try:
            with open(json_schema, encoding="utf-8") as file:
                schema = json.load(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"Cannot read a JSON schema from {json_schema}: {error}") from None
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for other in others:
        name, found, text = other.partition("=")
        if not found or not name:
            raise click.UsageError(f"--param takes NAME=VALUE, not {other!r}.")
        if name in _OWN_FIELDS:
            raise click.UsageError(f"--param cannot set {name}.")
        try:
            fields[name] = json.loads(text)
        except ValueError:
            fields[name] = text
    return fields


def _facts(response: Response) -> dict[str, Any]:
    """What --json prints of an answer; log probabilities and further answers only where they were asked for."""
    facts = dict(vars(response))
    if response.logprobs is None:
        del facts["logprobs"]
    if len(response.choices) < 2:
        del facts["choices"]
    return facts


@command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--input", "input_file", metavar="FILE", help="Prompts: a line each, or JSON objects with 'prompt' or 'messages'.")
@click.option("--threads", default=8, show_default=True, type=click.IntRange(min=1), help="Prompts of --input asked at once.")
@click.option("--raw", is_flag=True, help="Go on with the prompt's text, instead of answering it as a chat.")
@click.option("-n", type=int, help="Answers to each prompt; --json has them all.  [default: 1]")
@click.option("--logprobs", type=int, help="With --json: log probabilities of each token and of so many of the likeliest.")
@_sampling_options
@server_option
@json_option
def generate(
    model: str,
    prompt: str | None,
    input_file: str | None,
    threads: int,
    raw: bool,
    n: int | None,
    logprobs: int | None,
    timeout: float | None,
    server: str | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Ask MODEL. Without a PROMPT and --input, the prompt is read from stdin."""
    if prompt is not None and input_file is not None:
        raise click.UsageError("Give a PROMPT or --input, not both.")
    params = _fields(n=n, logprobs=logprobs, **sampling)
    if input_file is not None:
        prompts = _read_prompts(input_file)
        with connect(server) as client:
            futures = client.map(model, prompts, max_in_flight=threads, chat=not raw, **params)
            sys.exit(_print_answers(futures, timeout, as_json))
    if prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("Give a PROMPT, or pipe one in.")
        prompt = sys.stdin.read()
    with connect(server) as client, waiting_line() as waiting:
        future = client.submit(model, prompt, chat=not raw, on_progress=waiting.say, **params)
        with _deadline(future, timeout):
            for piece in future:
                waiting.hide()
                if not as_json:
                    click.echo(piece, nl=False)
        response = future.response()
    if as_json:
        print_json(_facts(response))
    else:
        click.echo()


@contextmanager
def _deadline(future: GenerateFuture, timeout_s: float | None) -> Iterator[None]:
    """Cancel `future` when it takes too long, or when the block is left before its end."""
    import threading

    from sllmdask.errors import Cancelled

    late = threading.Event()

    def expire() -> None:
        late.set()
        future.cancel()

    timer = None if timeout_s is None else threading.Timer(timeout_s, expire)
    if timer is not None:
        timer.start()
    try:
        yield
    except Cancelled:
        if late.is_set():
            raise TimeoutError(f"The answer was not complete within {timeout_s:g} s.") from None
        raise
    finally:
        future.cancel()
        if timer is not None:
            timer.cancel()
            timer.join()


def _read_items(path: str) -> list[Any]:
    """What is in a JSON list, in lines of JSON, or lines of text; empty lines are none."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}") from None
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        if path.endswith(".json"):
            items = json.loads(text)
            items = items if isinstance(items, list) else [items]
        elif path.endswith(".jsonl"):
            items = [json.loads(line) for line in lines]
        else:
            items = lines
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    return items


def _read_prompts(path: str) -> list[Any]:
    """Texts and lists of messages, as :func:`_read_items` finds them."""
    items = _read_items(path)
    prompts = [item.get("messages", item.get("prompt")) if isinstance(item, dict) else item for item in items]
    for i, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt)):
            raise ConfigError(f"Item {i} of {path} is neither a text nor an object with 'prompt' or 'messages'.")
    return prompts


def _print_answers(futures: Sequence[GenerateFuture], timeout_s: float | None, as_json: bool) -> int:
    """Print answers in the order of their prompts, one line of JSON each or the text; a failure does not stop the others."""
    worst = 0
    with waiting_line() as waiting:
        for i, future in enumerate(futures):
            waiting.say(f"{i} of {len(futures)} answered")
            error: Exception | None = None
            try:
                future.result(timeout_s)
            except (SllmError, TimeoutError) as caught:
                future.cancel()
                error = caught
                worst = max(worst, exit_code(caught))
            waiting.hide()
            if as_json:
                answer = _facts(future.response()) if error is None else {}
                click.echo(json.dumps({"index": i, **answer, "error": str(error) if error else None}, ensure_ascii=False))
            elif error is None:
                click.echo(future.result())
            if error is not None:
                click.echo(f"Error: prompt {i + 1}: {str(error) or 'timed out'}", err=True)
    return worst


@command()
@click.argument("model")
@click.argument("text", required=False)
@click.option("--input", "input_file", metavar="FILE", help="Texts: a line each, or JSON texts or objects with 'input'.")
@click.option("--dimensions", type=click.IntRange(min=1), help="Numbers of a vector.  [default: all that the model makes]")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds without an answer, loading included.")
@server_option
@json_option
def encode(
    model: str,
    text: str | None,
    input_file: str | None,
    dimensions: int | None,
    timeout: float,
    server: str | None,
    as_json: bool,
) -> None:
    """Make a vector of each text with MODEL, an embedding model: a line of numbers each, or of JSON.

    Without a TEXT and --input, the text is read from stdin.
    """
    if text is not None and input_file is not None:
        raise click.UsageError("Give a TEXT or --input, not both.")
    if input_file is not None:
        texts = _read_texts(input_file)
    elif text is not None:
        texts = [text]
    elif sys.stdin.isatty():
        raise click.UsageError("Give a TEXT, or pipe one in.")
    else:
        texts = [sys.stdin.read().rstrip("\n")]
    with connect(server, timeout) as client, waiting_line() as waiting:
        waiting.say(f"waiting for {len(texts)} embeddings of {model}")
        vectors = client.embed(model, texts, dimensions=dimensions)
    for i, vector in enumerate(vectors):
        numbers = [float(f"{number:.9g}") for number in vector]
        click.echo(json.dumps({"index": i, "embedding": numbers}) if as_json else "\t".join(map(repr, numbers)))


def _read_texts(path: str) -> list[str]:
    """Texts: from JSON (texts, or objects with ``input``, as ServerlessLLM's clients have them), or from lines of text."""
    texts: list[Any] = []
    for item in _read_items(path):
        found = item.get("input") if isinstance(item, dict) else item
        texts += found if isinstance(found, list) else [found]
    for i, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text:
            raise ConfigError(f"Item {i} of {path} is neither a text nor an object with 'input'.")
    return texts


@command()
@click.argument("model")
@click.option("--system", help="What the model is told before the conversation.")
@_sampling_options
@server_option
def chat(
    model: str,
    system: str | None,
    timeout: float | None,
    server: str | None,
    **sampling: Any,
) -> None:
    """Talk with MODEL. /clear forgets the conversation, /bye or Ctrl-D ends it, Ctrl-C stops an answer."""
    params = _fields(**sampling)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with connect(server) as client:
        client.call("GET", f"/v1/models/{urllib.parse.quote(model)}")
        while (line := _read_line()) not in (None, "/bye", "/exit"):
            if line == "/clear":
                messages = list(opening)
            elif line and line.strip():
                messages.append({"role": "user", "content": line})
                try:
                    messages.append({"role": "assistant", "content": _answer(client, model, messages, params, timeout)})
                except (SllmError, TimeoutError) as error:
                    if exit_code(error) == UNREACHABLE:
                        raise
                    messages.pop()
                    click.echo(f"Error: {error}", err=True)


def _read_line() -> str | None:
    """The next line that the user typed; ``None`` at the end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() a history
    try:
        return input(">>> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None


def _answer(client: Client, model: str, messages: list[dict[str, str]], params: dict[str, Any], timeout_s: float | None) -> str:
    pieces = []
    with waiting_line() as waiting:
        future = client.submit(model, messages, on_progress=waiting.say, **params)
        try:
            with _deadline(future, timeout_s):
                for piece in future:
                    waiting.hide()
                    click.echo(piece, nl=False)
                    pieces.append(piece)
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False, err=True)
    click.echo()
    return "".join(pieces)
