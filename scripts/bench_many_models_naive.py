#!/usr/bin/env python
"""For ``bench_many_models.py``: the server that a team would write in an afternoon.

aiohttp, ``from_pretrained``, ``generate`` with a streamer; the models used last stay, as many as there is room for, and a model
that is busy is not thrown out. One request at a time for each model, loads one at a time.

    python scripts/bench_many_models_naive.py --port 8000 --room 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections import OrderedDict
from typing import Any

import torch
import transformers
from aiohttp import web


class Loaded:
    """A model that is in memory, and the turn of its requests."""

    def __init__(self, path: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.turn = asyncio.Lock()
        self.n_users = 0


class Models:
    """The models used last."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._changed = asyncio.Condition()

    async def take(self, path: str) -> Loaded:
        async with self._changed:
            while True:
                loaded = self._loaded.get(path)
                if loaded is not None:
                    break
                if len(self._loaded) >= self._room:
                    idle = next((name for name, one in self._loaded.items() if not one.n_users), None)
                    if idle is None:
                        await self._changed.wait()
                        continue
                    del self._loaded[idle]
                loaded = self._loaded[path] = await asyncio.to_thread(Loaded, path)
                break
            self._loaded.move_to_end(path)
            loaded.n_users += 1
            return loaded

    async def give_back(self, loaded: Loaded) -> None:
        async with self._changed:
            loaded.n_users -= 1
            self._changed.notify_all()


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    models: Models = request.app["models"]
    loaded = await models.take(body["model"])
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    try:
        async with loaded.turn:
            await response.prepare(request)
            loop = asyncio.get_running_loop()
            pieces: asyncio.Queue[str | None] = asyncio.Queue()
            threading.Thread(target=answer, args=(loaded, body, loop, pieces), daemon=True).start()
            while (piece := await pieces.get()) is not None:
                frame = {"choices": [{"index": 0, "delta": {"content": piece}}]}
                await response.write(f"data: {json.dumps(frame)}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
    finally:
        await models.give_back(loaded)
    return response


def answer(loaded: Loaded, body: dict[str, Any], loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[str | None]) -> None:
    def put(piece: str | None) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    class Streamer:
        """Every token at once, as text."""

        def __init__(self) -> None:
            self.prompt = True

        def put(self, ids: torch.Tensor) -> None:
            if not self.prompt:
                put(loaded.tokenizer.decode(ids.flatten().tolist()) or " ")
            self.prompt = False

        def end(self) -> None:
            pass

    try:
        text = loaded.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        inputs = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            loaded.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                streamer=Streamer(),
            )
    finally:
        put(None)


async def health(_request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--room", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    app = web.Application()

    async def open_models(app: web.Application) -> None:
        app["models"] = Models(args.room)

    app.on_startup.append(open_models)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/health", health)
    web.run_app(app, host="127.0.0.1", port=args.port, print=None)


if __name__ == "__main__":
    main()
