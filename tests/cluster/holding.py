"""Loaded into the processes of a cluster under test: requests that move wait at a stage until the test lets them go on.

So does a load that others wait for, and, after its first batch, what an engine embeds.

``dask worker --preload tests.cluster.holding`` and ``dask scheduler --preload tests.cluster.holding``; a front door is
``python -m tests.cluster.holding serve``. Nothing of the product is replaced: around some of its calls there is a wait. All talk
is by files in the directory ``SLLMDASK_HOLDING``.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

#: Where a request can be in its move. Its seed says where it waits: the number here, and 1.
STAGES = ("load", "reserve", "append", "last stage", "commit sent", "commit acked")
#: At that stage, the destination waits, too: before it does what it was told.
UNDONE = "commit, not done"
#: The front door has called back what is at "commit sent". Where its source is lost, the commit comes after that.
RECALLED, LOST = "recalled", ("source-killed", "source-cut-off")
#: Seconds that a step takes at least until all may go on: an answer must not end while it waits for the others.
SLOW_S = 0.03
LOOK_S = 0.005


class Holding:
    """This process's side of the files."""

    def __init__(self, name: str) -> None:
        self.name, self.directory = name, Path(os.environ["SLLMDASK_HOLDING"])

    def row(self) -> dict[str, str] | None:
        """Which fault is tried now, and between which workers, or which model waits where it is loaded; ``None``: none."""
        try:
            return json.loads((self.directory / "row").read_text())
        except (OSError, ValueError):
            return None

    def slow(self) -> bool:
        row = self.row()
        return row is not None and not (self.directory / f"{row['name']}.fast").exists()

    def reach(self, stage: str) -> Path | None:
        """Say that the stage is reached; the file to wait for."""
        row = self.row()
        if row is None:
            return None
        (self.directory / f"{row['name']}.{stage}.reached").touch()
        return self.directory / f"{row['name']}.{stage}.go"

    def wait(self, stage: str) -> None:
        go = self.reach(stage)
        while go is not None and not go.exists():
            time.sleep(LOOK_S)

    def wait_for_recall(self) -> None:
        """Where the source is lost by the fault."""
        row = self.row()
        if row is not None and row["name"] in LOST:
            while not (self.directory / f"{row['name']}.{RECALLED}.reached").exists():
                time.sleep(LOOK_S)

    async def wait_async(self, stage: str) -> None:
        go = self.reach(stage)
        while go is not None and not go.exists():  # noqa: ASYNC110 - it is a file
            await asyncio.sleep(LOOK_S)

    def note(self, file: str, *what: object) -> None:
        """Add a line to a file, which stays if this process is killed."""
        with (self.directory / file).open("a") as lines:
            lines.write(json.dumps(what) + "\n")

    def serve(self, **orders: Callable[[], Any]) -> None:
        """Do what the test asks this process for, in a thread."""
        threading.Thread(target=self._serve, args=(orders,), daemon=True).start()

    def _serve(self, orders: dict[str, Callable[[], Any]]) -> None:
        order = self.directory / f"order.{self.name}"
        done = order.read_text() if order.exists() else ""
        while True:
            time.sleep(2 * LOOK_S)
            asked = ""
            with suppress(OSError):
                asked = order.read_text()
            if asked not in ("", done):
                done = asked
                what, number = asked.split()
                said = self.directory / f"said.{number}"
                said.with_suffix(".tmp").write_text(json.dumps(orders[what]()))
                said.with_suffix(".tmp").rename(said)


def stage_of(seed: Any) -> str:
    return STAGES[seed - 1] if isinstance(seed, int) and 0 < seed <= len(STAGES) else ""


def shut(sock: socket.socket) -> None:
    """Nothing goes through it any more, either way; whoever uses it finds that out."""
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def cut_all(keep: int) -> int:
    """Shut every TCP connection of this process but those to its port `keep`; returns how many there were."""
    n = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError, ValueError):
            sock = socket.socket(fileno=os.dup(int(name)))
            with sock:
                if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getsockname()[1] != keep:
                    sock.getpeername()  # raises for one that listens
                    shut(sock)
                    n += 1
    return n


def hold_moves(holding: Holding) -> None:
    """Let moves wait at their stages."""
    from sllmdask.actors import leaving, move_wire
    from sllmdask.actors.arriving import Arriving
    from sllmdask.actors.instances import Instance, InstanceRegistry
    from sllmdask.actors.leaving import Leaving
    from sllmdask.batching.handover import Heard
    from sllmdask.engine.embedding import EmbeddingEngine
    from sllmdask.engine.engine import LLMEngine

    stages: dict[str, str] = {}
    #: Requests here whose commit was held.
    sent: set[str] = set()
    #: Rows of whose embeddings a batch was made here.
    embedding: set[str] = set()
    ask, answer, load, step, submit = Leaving._ask, Arriving.answer, Instance._load, LLMEngine.step, Instance.submit
    recall, embed = InstanceRegistry._recall, EmbeddingEngine.step

    def held_ask(self: Any, op: str, payload: bytes = b"", **fields: Any) -> Any:
        request = self.order.request
        if op == "reserve":
            sequence = self._engine.call(lambda engine: engine.find(request)).result()
            stages[request] = "" if sequence is None else stage_of(sequence.params.seed)
        stage = stages.get(request, "")
        if op == "commit" and stage == "last stage":
            holding.wait(stage)
        heard = ask(self, op, payload, **fields)
        if (op, stage) == ("reserve", "load"):
            holding.reach("loaded")
        if (op, stage) in (("reserve", "reserve"), ("append", "append")) and heard is Heard.RESERVED:
            holding.wait(stage)
        if op == "commit" and stage == "commit acked" and heard is Heard.COMMITTED:
            holding.wait(stage)
        return heard

    def held_send(wire: Any, message: Any, payload: bytes = b"") -> None:
        move_wire.send(wire, message, payload)
        if message["op"] == "commit" and stage_of(message["state"]["params"]["seed"]) == "commit sent":
            holding.wait("commit sent")

    def held_answer(self: Any, message: Any, payload: bytes) -> Any:
        waits = message.get("op") == "commit" and stage_of(message["state"]["params"]["seed"]) == "commit sent"
        if waits:
            sent.add(message["request"])
            holding.wait(UNDONE)
            holding.wait_for_recall()
        said = answer(self, message, payload)
        if waits:
            holding.reach("done")
        return said

    async def noted_recall(self: Any, door: str, request: str, epoch: int) -> None:
        await recall(self, door, request, epoch)
        if request in sent:
            holding.reach(RECALLED)

    async def held_load(self: Any, peers: Any) -> Any:
        row = holding.row()
        if row is not None and (row.get("loads") == self.model or (self.model == "b" and row.get("destination") == holding.name)):
            await holding.wait_async("load")
        return await load(self, peers)

    def held_embed(self: Any) -> Any:
        row = holding.row()
        if row is not None and row["name"] in embedding:
            holding.wait("embed")
        elif row is not None:
            embedding.add(row["name"])
        outputs = embed(self)
        holding.note("embedded", holding.name, [output.request_id for output in outputs])
        return outputs

    def held_step(self: Any) -> Any:
        outputs = step(self)
        holding.note("computed", *((output.request_id, output.index) for output in outputs if output.token_id is not None))
        if holding.slow():
            time.sleep(SLOW_S)
        return outputs

    def noted_submit(self: Any, door: str, request: str, epoch: int, prompt: Any, output: Any, params: Any, *rest: Any) -> None:
        row = holding.row()
        holding.note("submitted", request, "" if row is None else row["name"], stage_of(params.get("seed")))
        submit(self, door, request, epoch, prompt, output, params, *rest)

    for owner, name, held in (
        (Leaving, "_ask", held_ask),
        (Arriving, "answer", held_answer),
        (InstanceRegistry, "_recall", noted_recall),
        (Instance, "_load", held_load),
        (Instance, "submit", noted_submit),
        (LLMEngine, "step", held_step),
        (EmbeddingEngine, "step", held_embed),
    ):
        setattr(owner, name, held)
    leaving.move_wire = SimpleNamespace(send=held_send, receive=move_wire.receive)  # type: ignore[assignment]


def dask_setup(server: Any) -> None:
    """Called by Dask in a scheduler, and in a worker before it joins."""
    from distributed import Scheduler

    if isinstance(server, Scheduler):
        Holding("scheduler").serve(cut=lambda: cut_all(keep=-1))
        return
    from sllmdask.actors.model_actor import EXTENSION

    holding = Holding(str(server.name))
    hold_moves(holding)

    doors: dict[str, Any] = {}

    def look_at_doors() -> None:
        doors.clear()
        doors.update(server.extensions[EXTENSION]._outboxes)

    def wait_for_doors() -> None:
        """Until one of those that were there has left, even if it has come again."""
        now = server.extensions[EXTENSION]._outboxes
        while all(now.get(door) is outbox for door, outbox in doors.items()):
            time.sleep(LOOK_S)

    def cut() -> int:
        """The connections of moves, and those of front doors."""
        registry = server.extensions[EXTENSION]
        look_at_doors()
        wires = [leaving._wire for leaving in registry.moves._leaving if leaving._wire is not None]
        sockets = [wire.sock for wire in wires] + list(registry.moves._server._sockets.values())
        sockets += [outbox._comm.stream.socket for outbox in registry._outboxes.values()]
        for sock in sockets:
            shut(sock)
        noticed = threading.Event()

        def notice() -> None:
            if all(registry._outboxes.get(door) is outbox for door, outbox in doors.items()):
                server.loop.add_callback(notice)
                return
            noticed.set()
            row = holding.row()
            if row is not None and row.get("destination") == holding.name:
                # Nobody connects again before the commit that waits here was done.
                patience = time.monotonic() + 2
                while not (holding.directory / f"{row['name']}.done.reached").exists() and time.monotonic() < patience:
                    time.sleep(LOOK_S)

        server.loop.add_callback(notice)
        noticed.wait(10)
        return len(sockets)

    def state() -> dict[str, Any]:
        """What is here, by the engines' own account."""
        registry = server.extensions[EXTENSION]
        used: dict[str, int] = {}
        for instance in list(registry._instances.values()):
            engine = instance._engine
            if engine is not None:
                stats = engine.call(lambda target: target.stats()).result(10)
                used[instance.id] = stats.blocks_used + stats.blocks_reserved + stats.n_held + len(instance.request_ids)
        leaving = list(registry.moves._leaving)
        return {
            "used": used,
            "n_moves": len(leaving) + registry.moves._arriving.n_reserved,
            "n_warned": sum(each._gone.is_set() for each in leaving),
        }

    holding.serve(cut=cut, state=state, look_at_doors=look_at_doors, wait_for_doors=wait_for_doors)


def main() -> None:
    """``sllmdask``, with a record of the tokens that go to clients."""
    from sllmdask.cli import main as sllmdask
    from sllmdask.cluster.gateway import Gateway
    from sllmdask.cluster.journal import Delta

    holding = Holding("door")
    generate = Gateway.generate

    async def noted(self: Any, request: Any) -> Any:
        n = 0
        with (holding.directory / f"tokens.{request.id}").open("a") as file:
            async for event in generate(self, request):
                if isinstance(event, Delta):
                    file.write(json.dumps([n, list(event.token_ids)]) + "\n")
                    n += len(event.token_ids)
                yield event

    Gateway.generate = noted  # type: ignore[method-assign]
    port = int(sys.argv[sys.argv.index("--port") + 1])
    holding.serve(cut=lambda: cut_all(keep=port))
    sllmdask()


if __name__ == "__main__":
    main()
