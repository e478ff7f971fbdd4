"""Whoever dies, stands still or is cut off at whatever stage of a move: a client gets its answer, each token once.

Before each fault, six requests move from one worker to another, and each is held at a stage of its own. Then the fault happens,
once, and all go on. What became of each is a row of the table in ``docs/faults.md``; with ``SLLMDASK_WRITE_FAULTS`` in the
environment it is written there.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
import sys
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sllmdask.cli import main
from tests.checkpoints import make_checkpoint
from tests.cluster.asking import register
from tests.cluster.harness import BIN, Processes, Stream, free_port, get, post, until, workers
from tests.cluster.holding import STAGES, UNDONE

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- written by tests/cluster/test_faults.py -->\n", "<!-- end -->"
WRITE = "SLLMDASK_WRITE_FAULTS" in os.environ
SCHEDULER, DOOR = "the scheduler", "the front door"
SOURCE, DESTINATION = "the source", "the destination"
#: Long enough for two blocks of KV, so that there is something to append.
PROMPT = "the quick brown fox jumps over the lazy dog, hello world, once upon a time " * 3
N = 240
#: What others wait for whoever says nothing; the defaults are for networks and machines that are busy.
LIMITS = {
    "DASK_SLLMDASK__SERVER__WORKER_SILENCE": "2",
    "DASK_SLLMDASK__SERVER__MOVE_PATIENCE": "1",
    "DASK_SLLMDASK__WORKER__MIGRATION_ANSWER": "1.5",
    "DASK_SLLMDASK__WORKER__MIGRATION_RESERVATION": "6",
}


def body(stage: str) -> dict[str, Any]:
    """A request that waits at `stage` if it moves. Drawn, so that a token that is lost or doubled changes all that follow."""
    drawn = {"temperature": 1.0, "seed": 1 + STAGES.index(stage), "frequency_penalty": 0.3, "ignore_eos": True}
    return {"model": "b" if stage == "load" else "a", "prompt": PROMPT, "max_tokens": N, **drawn}


class Asked:
    """One request: its client, which reads in a thread, and what it was given."""

    def __init__(self, url: str, stage: str, name: str, directory: Path) -> None:
        self.stage, self.name = stage, name
        self._tokens = directory / f"tokens.{name}"
        self.text, self.reason, self.error = "", None, None
        self.begun, self._thread = threading.Event(), threading.Thread(target=self._read, args=(url,), daemon=True)
        self._thread.start()

    def _read(self, url: str) -> None:
        try:
            for chunk in Stream(url, body(self.stage), {"x-request-id": self.name}).chunks():
                self.begun.set()
                if "error" in chunk:
                    self.error = chunk["error"]["message"]
                    return
                for choice in chunk["choices"]:
                    self.text += choice["text"]
                    self.reason = choice["finish_reason"] or self.reason
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.error = repr(error)
        finally:
            self.begun.set()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    @property
    def tokens(self) -> list[int]:
        """Token ids that went to the client, checked to be one after the other."""
        ids: list[int] = []
        for line in self._tokens.read_text().splitlines():
            index, fresh = json.loads(line)
            assert index == len(ids), f"{self.name}: token {index} after {len(ids)}"
            ids += fresh
        return ids


@dataclass
class Cluster:
    """Three workers, so that one may start anew while two others are needed; a front door that dies, and one that does not."""

    processes: Processes
    watch: str = ""
    door: str = ""
    door_port: int = 0
    undisturbed: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def holding(self) -> Path:
        return self.processes.directory / "holding"

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**LIMITS, "SLLMDASK_HOLDING": str(self.holding), "PYTHONPATH": path}

    # --- processes ---

    def start(self) -> None:
        self.holding.mkdir()
        self.start_scheduler()
        for name in ("0", "1", "2"):
            self.processes.start_worker(
                name, "--preload", "tests.cluster.holding", "--kv-memory", "64MiB", slots=4, **self.environment
            )
        self.start_door()
        self.watch = self.processes.start_door("watch")
        until("all workers joined", lambda: len(workers(self.watch)) == 3, 60)
        self.register()
        all_asked = [Asked(self.door, stage, f"undisturbed-{number}", self.holding) for number, stage in enumerate(STAGES)]
        until("answers that nobody disturbs", lambda: all(asked.ended for asked in all_asked), 60)
        for asked in all_asked:
            assert asked.error is None and len(asked.tokens) == N, asked.error
            self.undisturbed[asked.stage] = asked.text, asked.tokens

    def start_scheduler(self) -> None:
        self.processes.start_scheduler("--preload", "tests.cluster.holding", **self.environment)

    def start_door(self) -> None:
        self.door_port = free_port()
        at = ["--scheduler", self.processes.scheduler, "--port", str(self.door_port)]
        python = Path(sys.executable).relative_to(BIN)
        self.processes.start("door", str(python), "-m", "tests.cluster.holding", "serve", *at, **self.environment)
        self.door = f"http://127.0.0.1:{self.door_port}"
        until("the front door answers", lambda: self.processes.answers("door", self.door))

    def register(self) -> None:
        scaling = {"max_instances": 6, "target": 100, "keep_alive": 600}
        for model in ("a", "b"):
            source = self.processes.directory / model
            if not source.exists():
                make_checkpoint(source, "llama", seed=ord(model))
            register(self.watch, model, source, auto_scaling_config=scaling)

    def pid(self, victim: str) -> int:
        if victim in self.processes.running:
            return self.processes.running[victim].pid
        return next(worker["pid"] for worker in workers(self.watch) if worker["name"] == victim)

    def order(self, name: str, what: str) -> Any:
        """Have a process do something that the test cannot, and its answer."""
        number = next(self._numbers)
        (self.holding / "order.tmp").write_text(f"{what} {number}")
        (self.holding / "order.tmp").rename(self.holding / f"order.{name}")
        said = self.holding / f"said.{number}"
        until(f"{name} does {what}", said.exists, 60)
        return json.loads(said.read_text())

    # --- one fault ---

    def place(self, source: str) -> None:
        """Both models on the source, and nowhere else."""
        for model in ("a", "b"):
            there = {each["node"] for each in self.instances(model)}
            for node in there - {source}:
                self.admin("/admin/unload", {"model": model, "node": node})
            if source not in there:
                self.admin("/admin/load", {"model": model, "node": source})

    def instances(self, model: str) -> list[dict[str, Any]]:
        return [
            {**instance, "node": worker["name"]}
            for worker in workers(self.watch)
            for instance in worker["instances"]
            if instance["model"] == model
        ]

    def admin(self, path: str, what: dict[str, Any], url: str | None = None) -> dict[str, Any]:
        said = post(url or self.watch, path, what)
        assert "error" not in said, said
        return said

    def reached(self, row: str, stage: str) -> None:
        reached = self.holding / f"{row}.{stage}.reached"
        until(f"{row}: a request is at {stage}", reached.exists, 60)

    def go(self, row: str, *stages: str) -> None:
        for stage in stages:
            (self.holding / f"{row}.{stage}.go").touch()

    def hold(self, row: str, source: str, destination: str) -> list[Asked]:
        """Six requests on their way from `source` to `destination`, each at its stage."""
        self.place(source)
        told = self.holding / "row.tmp"
        told.write_text(json.dumps({"name": row, "destination": destination}))
        told.rename(self.holding / "row")
        asked = [Asked(self.door, stage, f"{row}-{STAGES.index(stage)}", self.holding) for stage in STAGES]
        for each in asked:
            assert each.begun.wait(60) and each.error is None, each.error
        self.admin("/admin/load", {"model": "a", "node": destination})
        for each in asked:
            self.admin("/admin/migrate", {"request": each.name, "to": destination, "kind": "kv", "wait": False}, self.door)
        for stage in (*STAGES, UNDONE):
            self.reached(row, stage)
        return asked

    def release(self, row: str, *, done: bool = True, loaded: bool = True, moves: bool = False) -> None:
        """All go on; `done`: a commit that is on its way is done before its sender looks for the answer.

        Not `loaded`: what is being loaded stays so. `moves`: who waits for that does not end before it has moved.
        """
        self.go(row, UNDONE)
        if done:
            self.reached(row, "done")
        self.go(row, *(stage for stage in STAGES if loaded or stage != "load"))
        if moves:
            self.reached(row, "loaded")
        (self.holding / f"{row}.fast").touch()

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in get(self.door, "/admin/requests")["requests"]}

    def at_rest(self) -> bool:
        """Whether no worker has anything of any request."""
        for worker in workers(self.watch):
            state = self.order(worker["name"], "state")
            known = {instance["instance"] for instance in worker["instances"]}
            if any(state["used"].values()) or state["n_moves"] or known != state["used"].keys():
                return False
        return True

    def noted(self, file: str) -> Iterator[list[Any]]:
        for line in (self.holding / file).read_text().splitlines():
            yield json.loads(line)

    def computed(self, row: str) -> dict[str, list[int]]:
        """Indexes of all tokens that engines have computed, by the stage of the request."""
        stages = {request: stage for request, of, stage in self.noted("submitted") if of == row}
        indexes: dict[str, list[int]] = {stage: [] for stage in STAGES}
        for request, index in itertools.chain.from_iterable(self.noted("computed")):
            if request in stages:
                indexes[stages[request]].append(index)
        return indexes


pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(Processes(tmp_path_factory.mktemp("faults")))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.processes.close()


def outcome(row: dict[str, Any]) -> str:
    """How the request came to its end, by what its front door noted."""
    n_moved = sum(move["outcome"] == "moved" for move in row["moves"])
    if len(row["path"]) - 1 > n_moved:
        return "resumed"
    return "moves" if n_moved else "stays"


def test_without_a_fault_every_request_moves_and_is_shown_while_it_does(cluster: Cluster):
    asked = cluster.hold("none", "0", "1")
    (there,) = (worker for worker in workers(cluster.watch) if worker["name"] == "0")
    here = {instance["model"]: instance["instance"] for instance in there["instances"]}
    status = CliRunner().invoke(main, ["status", "--json", "--server", cluster.watch])
    for moves in (json.loads(status.stdout)["moves"], get(cluster.door, "/admin/cluster")["moves"]):
        assert sorted(move["request"] for move in moves) == [each.name for each in asked]
        for each, move in zip(asked, sorted(moves, key=lambda move: move["request"]), strict=True):
            model = body(each.stage)["model"]
            facts = [move[key] for key in ("model", "instance", "source", "destination", "cause")]
            assert facts == [model, here[model], "0", "1", "an operator asked"] and move["seconds"] > 0
    cluster.release("none", moves=True)
    until("all have ended", lambda: all(each.ended for each in asked), 60)
    for each in asked:
        assert each.error is None, (each.stage, each.error)
        assert (each.text, each.tokens) == cluster.undisturbed[each.stage], each.stage
    assert {outcome(row) for name, row in cluster.rows().items() if name.startswith("none-")} == {"moves"}
    until("all is free again", cluster.at_rest)
    assert get(cluster.watch, "/admin/cluster")["moves"] == []


# --- faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What happens to whom, and between which workers requests move meanwhile."""

    victim: str
    kind: str
    source: str
    destination: str

    @property
    def name(self) -> str:
        return f"{self.victim.removeprefix('the ')}-{self.kind}".replace(" ", "-")

    def rank(self) -> tuple[int, int]:
        """Its place in the table."""
        return (SOURCE, DESTINATION, DOOR, SCHEDULER).index(self.victim), (KILLED, STOPPED, CUT).index(self.kind)

    @property
    def process(self) -> str:
        return {SOURCE: self.source, DESTINATION: self.destination, DOOR: "door", SCHEDULER: "scheduler"}[self.victim]

    def happen(self, cluster: Cluster) -> None:
        if self.kind == CUT:
            # Those who are cut off have noticed it before anything goes on.
            for name in (self.source, self.destination) if self.victim == DOOR else ():
                cluster.order(name, "look_at_doors")
            assert cluster.order(self.process, "cut")
            for name in (self.source, self.destination) if self.victim == DOOR else ():
                cluster.order(name, "wait_for_doors")
            if self.victim == SCHEDULER:
                until("the source heard of it", lambda: cluster.order(self.source, "state")["n_warned"])
        else:
            os.kill(cluster.pid(self.process), {KILLED: signal.SIGKILL, STOPPED: signal.SIGSTOP}[self.kind])

    def end(self, cluster: Cluster) -> None:
        """What stood still goes on, and what is dead is started anew: workers are by their nannies."""
        if self.kind == STOPPED:
            os.kill(cluster.pid(self.process), signal.SIGCONT)
        if self.kind == KILLED and self.victim in (DOOR, SCHEDULER):
            cluster.processes.stop(self.process, signal.SIGKILL)
            (cluster.start_door if self.victim == DOOR else cluster.start_scheduler)()
        if self.victim == SCHEDULER and self.kind != STOPPED:
            until("the workers joined again", lambda: ready(cluster.watch) and len(workers(cluster.watch)) == 3, 60)
            cluster.register()


KILLED, STOPPED, CUT = "killed", "stopped", "cut off"
#: In an order in which nobody waits for long for a worker that starts anew.
FAULTS = [
    Fault(SOURCE, STOPPED, "0", "1"),
    Fault(DESTINATION, STOPPED, "1", "0"),
    Fault(SOURCE, CUT, "0", "1"),
    Fault(DESTINATION, CUT, "1", "0"),
    Fault(SOURCE, KILLED, "0", "1"),
    Fault(DESTINATION, KILLED, "1", "2"),
    Fault(DOOR, STOPPED, "2", "0"),
    Fault(DOOR, CUT, "0", "2"),
    Fault(DOOR, KILLED, "2", "0"),
    Fault(SCHEDULER, STOPPED, "0", "1"),
    Fault(SCHEDULER, CUT, "1", "2"),
    Fault(SCHEDULER, KILLED, "2", "0"),
]


def ready(url: str) -> bool:
    with suppress(urllib.error.HTTPError):
        return bool(get(url, "/ready"))
    return False


def written(fault: Fault) -> list[str]:
    """The row of a fault in the table, cell by cell."""
    begin = f"| {fault.victim} | {fault.kind} |"
    [line] = [line for line in TABLE.read_text().splitlines() if line.startswith(begin)]
    return [cell.strip() for cell in line.removeprefix(begin).strip(" |").split("|")]


def write(fault: Fault, cells: list[str]) -> None:
    """Put a row where it belongs; the table is made if it is not there."""
    before, _, rest = TABLE.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    lines = {tuple(line.split("|")[1:3]): line for line in old.splitlines()[2:]}
    lines[f" {fault.victim} ", f" {fault.kind} "] = f"| {fault.victim} | {fault.kind} | {' | '.join(cells)} |"
    order = [(f" {each.victim} ", f" {each.kind} ") for each in sorted(FAULTS, key=Fault.rank)]
    head = [f"| who | how | {' | '.join(STAGES)} |", "|---" * (2 + len(STAGES)) + "|"]
    table = "\n".join([*head, *(lines[key] for key in order if key in lines)])
    TABLE.write_text(f"{before}{BEGIN}{table}\n{END}{after}")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_at_any_stage_of_a_move_costs_no_token_and_doubles_none(cluster: Cluster, fault: Fault):
    both = {fault.source, fault.destination}
    until("both workers are there", lambda: both <= {worker["name"] for worker in workers(cluster.watch)}, 60)
    try:
        asked = cluster.hold(fault.name, fault.source, fault.destination)
        fault.happen(cluster)
        done = fault.victim != DESTINATION or fault.kind == CUT
        # A scheduler that has its workers again would have the load done anew, and then the move: whether in time is chance.
        moves = (fault.victim, fault.kind) in ((DESTINATION, CUT), (DOOR, STOPPED))
        cluster.release(fault.name, done=done, loaded=fault.victim != SCHEDULER, moves=moves)
        if (fault.victim, fault.kind) == (DOOR, STOPPED):
            until("the engines have done all they had to", cluster.at_rest, 60)
        else:
            until("every client has heard the end", lambda: all(each.ended for each in asked), 60)
    finally:
        cluster.release(fault.name, done=False)
        fault.end(cluster)
    until("every client has heard the end", lambda: all(each.ended for each in asked), 60)
    if (fault.victim, fault.kind) == (DOOR, KILLED):
        assert all(each.error is not None or each.reason is None for each in asked)
        outcomes = dict.fromkeys(STAGES, "ends")
    else:
        for each in asked:
            assert each.error is None, (each.stage, each.error)
            assert (each.text, each.tokens, each.reason) == (*cluster.undisturbed[each.stage], "length"), each.stage
        rows = cluster.rows()
        outcomes = {each.stage: outcome(rows[each.name]) for each in asked}
    until("all is free again", cluster.at_rest, 60)
    for stage, indexes in cluster.computed(fault.name).items():
        # Only what its front door has begun again may have been computed twice.
        assert outcomes[stage] in ("resumed", "ends") or sorted(indexes) == list(range(N)), stage
    answer = post(cluster.watch, "/v1/completions", {**body("reserve"), "max_tokens": 3})
    assert answer["usage"]["completion_tokens"] == 3
    if WRITE:
        write(fault, [*outcomes.values()])
    for stage, cell in zip(STAGES, written(fault), strict=True):
        assert outcomes[stage] == cell, (stage, cluster.rows().get(f"{fault.name}-{STAGES.index(stage)}"))


def test_every_cell_of_the_table_is_filled():
    victims, kinds = (SOURCE, DESTINATION, DOOR, SCHEDULER), (KILLED, STOPPED, CUT)
    assert {(fault.victim, fault.kind) for fault in FAULTS} == set(itertools.product(victims, kinds))
    cells = [each for fault in FAULTS for cell in written(fault) for each in cell.split(" or ")]
    assert set(cells) <= {"stays", "moves", "resumed", "ends"}
