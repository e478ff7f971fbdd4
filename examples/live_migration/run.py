#!/usr/bin/env python
"""Two models, two workers of one slot each, with and without live migration: who is served when, where, and with what answer.

The long model is on both nodes, the short one on node 0 only. A long answer is under way on node 0 when the short model is asked.
Without migration that request waits for the end of the long answer. With it, the long answer goes on on node 1.

    python examples/live_migration/run.py
    python examples/live_migration/run.py --long Qwen/Qwen2.5-3B-Instruct --short Qwen/Qwen2.5-1.5B-Instruct

Without options nothing is downloaded: the long model is made here, with random weights, and the short one comes with sllmdask.
The exit code is 0 if the migration brought the short answer forward, and both answers are those of the run without it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before Dask is imported: this is a demonstration, not a place for its log.
os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
os.environ.setdefault("DASK_LOGGING__SLLMDASK", "warning")

from sllmdask import Client, serve
from sllmdask.errors import SllmError
from sllmdask.units import format_bytes, format_seconds

HERE = Path(__file__).resolve().parent
#: The files of ServerlessLLM's documentation: the long model is on both nodes, the short one on node 0.
LONG_FILE, SHORT_FILE = HERE / "config-qwen-3b.json", HERE / "config-qwen-1.5b.json"
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
LONG_QUESTION = "Could you share a story of the history of Computer Science?"
SHORT_QUESTION = "What is your name?"
#: Seconds for one answer, the loading of its model included.
LIMIT_S = 1800.0


@dataclass(frozen=True)
class Answer:
    """What came of one request, and `ended_s`, seconds after the first request of its run."""

    model: str
    text: str
    tokens: tuple[str, ...]
    finish_reason: str | None
    usage: Mapping[str, int]
    #: Nodes that it ran on, in order.
    path: tuple[str, ...]
    moves: Sequence[Mapping[str, Any]]
    ended_s: float

    def equals(self, other: Answer) -> bool:
        """Token by token, with finish reason and usage."""
        mine = self.text, self.tokens, self.finish_reason, dict(self.usage)
        return mine == (other.text, other.tokens, other.finish_reason, dict(other.usage))


def make_long_model(path: Path) -> Path:
    """A Qwen2 checkpoint with random weights, large enough to take some milliseconds for a token; the tokenizer is a real one."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    import sllmdask

    logging.disable_progress_bar()
    torch.manual_seed(0)
    demo = Path(sllmdask.__file__).parent / "demo" / "demo-qwen"
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=True,
        eos_token_id=json.loads((demo / "config.json").read_text())["eos_token_id"],
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / file, path)
    return path


def deployment(file: Path, source: str) -> dict[str, Any]:
    """A deployment file of the documentation, with the model's files from elsewhere."""
    found: dict[str, Any] = json.loads(file.read_text())
    found["backend_config"]["pretrained_model_name_or_path"] = source
    return found


def play(url: str, long: str, short: str, *, n_long: int, n_short: int = 64, ignore_eos: bool = True) -> tuple[Answer, Answer]:
    """Ask the `long` model, which is loaded on node 0, and when its answer has begun the `short` one; both answers."""
    with Client(url) as client, ThreadPoolExecutor(2) as pool:
        client.load(long, node="0")
        began = time.perf_counter()

        def begin(model: str, question: str, n_tokens: int, ignore: bool) -> Any:
            messages = [SYSTEM, {"role": "user", "content": question}]
            wanted: dict[str, Any] = {"max_tokens": n_tokens, "seed": 1, "logprobs": 1}
            return client.submit(model, messages, **wanted, **({"ignore_eos": True} if ignore else {}))

        def finish(future: Any) -> tuple[Any, float]:
            return future.response(timeout=LIMIT_S), time.perf_counter() - began

        first = begin(long, LONG_QUESTION, n_long, ignore_eos)
        next(iter(first), None)
        ends = [pool.submit(finish, each) for each in (first, begin(short, SHORT_QUESTION, n_short, False))]
        (long_response, long_s), (short_response, short_s) = (end.result() for end in ends)
        rows = {row["id"]: row for row in client.requests()}

    def answer(response: Any, ended_s: float) -> Answer:
        row = rows[response.id]
        tokens = tuple(each["token"] for each in response.logprobs["content"])
        reason, path, moves = response.finish_reason, tuple(row["path"]), row["moves"]
        return Answer(response.model, response.text, tokens, reason, response.usage, path, moves, ended_s)

    return answer(long_response, long_s), answer(short_response, short_s)


def report(runs: Mapping[str, tuple[Answer, Answer]]) -> bool:
    """Print who ended when and where; whether all is as it should be."""
    rows = [("", "MODEL", "NODE", "TOKENS", "ENDED AFTER", "MOVED")]
    for name, answers in runs.items():
        shown = name
        for each in sorted(answers, key=lambda each: each.ended_s):
            n_tokens = str(each.usage["completion_tokens"])
            moves = "; ".join(map(_move, each.moves)) or "-"
            rows.append((shown, each.model, " -> ".join(each.path), n_tokens, f"{each.ended_s:.2f} s", moves))
            shown = ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    (long_without, short_without), (long_with, short_with) = runs["without migration"], runs["with migration"]
    checks = {
        "without migration the short answer came after the long one": short_without.ended_s > long_without.ended_s,
        "with migration the short answer came before the long one": short_with.ended_s < long_with.ended_s,
        "the long answer went on on node 1, the short one ran on node 0": (long_with.path[-1], *short_with.path) == ("1", "0"),
        "the long answer is the same, token for token": long_with.equals(long_without),
        "the short answer is the same, token for token": short_with.equals(short_without),
    }
    print()
    for check, good in checks.items():
        print(f"{'yes' if good else 'NO '}  {check}")
    sooner = format_seconds(short_without.ended_s - short_with.ended_s)
    print(f"\nWith migration the short answer came {sooner} sooner: {short_with.text.strip()!r}")
    return all(checks.values())


def _move(move: Mapping[str, Any]) -> str:
    if move["outcome"] != "moved":
        return f"{move['outcome']}: {move['reason']}"
    what = f"{format_bytes(move['nbytes'])} of KV" if move["kind"] == "kv" else f"{move['n_tokens']} tokens"
    pause = "" if move["pause_ms"] is None else f", the client waited {move['pause_ms']:.0f} ms for the next token"
    return f"{what} in {format_seconds(move['seconds'])}{pause}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", metavar="MODEL", help="directory or hub id of the long model (default: one that is made here)")
    parser.add_argument("--short", metavar="MODEL", default="demo:demo-qwen", help="of the short one (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="of the long answer at most (default: 1024, of the model made here 400)")
    options = parser.parse_args()
    if options.tokens is not None and options.tokens < 1:
        parser.error("--tokens must be 1 or more")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    made = tempfile.TemporaryDirectory(prefix="sllmdask-")
    try:
        with made as directory:
            long = options.long or str(make_long_model(Path(directory) / "long"))
            files = [deployment(LONG_FILE, long), deployment(SHORT_FILE, options.short)]
            n_tokens = options.tokens or (1024 if options.long else 400)
            runs = {}
            for name, migrate in (("without migration", False), ("with migration", True)):
                print(f"{name}: two workers, one slot each ...", flush=True)
                scheduler = {"migrate": migrate}
                with serve(n_workers=2, server={"port": 0}, worker={"slots": 1}, scheduler=scheduler) as service:
                    with Client(service.url) as client:
                        for each in files:
                            client.register(each)
                    names = (files[0]["model"], files[1]["model"])
                    runs[name] = play(service.url, *names, n_long=n_tokens, ignore_eos=options.long is None)
        print()
        return 0 if report(runs) else 1
    except KeyboardInterrupt:
        print("stopped")
        return 130
    except (SllmError, TimeoutError) as error:
        print(f"error: {error or 'no answer in time'}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
