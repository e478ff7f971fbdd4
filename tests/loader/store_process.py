"""A process with a store over shared memory that does what it is told: what a worker is to others."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sllmdask.config import WorkerSettings
from sllmdask.errors import SllmError
from sllmdask.loader import libc
from sllmdask.loader.records import HostLease
from sllmdask.loader.shared_pool import SharedPool
from sllmdask.loader.store import CheckpointStore
from tests.loader.stores import CHUNK, flights_ended


class StoreProcess:
    """Another worker of this node, from the outside. With `delay_s` every read of tensor data takes so much longer."""

    def __init__(self, pool: str, capacity: int, store_dir: Path, delay_s: float = 0.0) -> None:
        # Each is a fork of one process that has imported torch, and nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.wire, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, pool, capacity, str(store_dir), delay_s))
        self.process.start()
        theirs.close()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def tell(self, op: str, **fields: Any) -> None:
        """Have it begin something; :meth:`hear` gives the answers, in order of their ends."""
        self.wire.send({"op": op, **fields})

    def hear(self) -> dict[str, Any]:
        """Raises :class:`EOFError` when the process is gone."""
        assert self.wire.poll(30), "it says nothing"
        answer: dict[str, Any] = self.wire.recv()
        return answer

    def do(self, op: str, **fields: Any) -> dict[str, Any]:
        self.tell(op, **fields)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> int | None:
        """Have it leave; its exit code."""
        if self.process.is_alive():
            self.tell("end")
        self.process.join(30)
        return self.process.exitcode

    def __enter__(self) -> StoreProcess:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            assert self.end() is not None, "it does not end"
        finally:
            self.kill()
            self.wire.close()
            self.process.close()


def _run(wire: Connection, pool: str, capacity: int, store_dir: str, delay_s: float) -> None:
    asyncio.run(_main(wire, pool, capacity, store_dir, delay_s))


async def _main(wire: Connection, pool_name: str, capacity: int, store_dir: str, delay_s: float) -> None:
    n_reads, pread = [0, 0], libc.pread

    def counting(fd: int, address: int, nbytes: int, offset: int) -> int:
        if delay_s:
            time.sleep(delay_s)
        n_reads[0] += 1
        n_reads[1] += nbytes
        return pread(fd, address, nbytes, offset)

    libc.pread = counting
    pool = SharedPool(pool_name, capacity, grace_s=0.0, trim_s=0.0)
    store = CheckpointStore(WorkerSettings(chunk_size=CHUNK, n_readers=2, store_dir=store_dir), pool)
    await store.start()
    leases: dict[str, list[HostLease]] = {}
    loads: dict[str, asyncio.Task[HostLease]] = {}

    async def do(order: dict[str, Any]) -> dict[str, Any]:
        op, key = order["op"], order.get("key", "")
        if op == "load":
            load = loads[key] = asyncio.create_task(store.load(key, order["source"], whole=order.get("whole", True)))
            lease = await load
            leases.setdefault(key, []).append(lease)
            if not order.get("whole", True):
                say({"op": "placed", "key": key})
                await lease.complete()
            if not lease.tensors:
                return {"error": "released"}
            value = lease.tensors["w"]
            low, high = value.min().item(), value.max().item()
            del value
            return {"tier": str(lease.tier_from), "low": low, "high": high}
        if op == "release":
            for lease in leases.pop(key, []):
                lease.release()
        elif op == "cancel" and key in loads:
            loads[key].cancel()
        elif op == "evict":
            return {"evicted": await store.evict(key)}
        elif op == "reads":
            return {"n": n_reads[0], "nbytes": n_reads[1]}
        elif op == "snapshot":
            return {**store.snapshot(), "keeper": pool.keeper_pid}
        elif op == "leaks":
            await flights_ended(store)
            busy = [thread.name for thread in threading.enumerate() if thread.name.startswith("read-")]
            return {"maps": n_mappings(), "fds": len(os.listdir("/proc/self/fd")), "busy": busy, "leases": len(leases)}
        elif op == "pss":
            return {"pss": pss_of_shared(os.getpid())}
        return {}

    def say(answer: dict[str, Any]) -> None:
        wire.send(answer)

    async def obey(order: dict[str, Any]) -> None:
        try:
            answer = await do(order)
        except SllmError as error:
            answer = {"error": type(error).__name__, "message": error.message}
        except asyncio.CancelledError:
            answer = {"error": "CancelledError"}
        except Exception as error:
            answer = {"error": repr(error)}
            raise
        finally:
            say({"op": order["op"], "key": order.get("key"), **answer})

    say({"op": "ready"})
    obeying: set[asyncio.Task[None]] = set()
    while (order := await asyncio.to_thread(wire.recv))["op"] != "end":
        task = asyncio.create_task(obey(order))
        obeying.add(task)
        task.add_done_callback(obeying.discard)
    for held in leases.values():
        for lease in held:
            lease.release()
    await store.close()
    await asyncio.gather(*obeying)


def n_mappings() -> int:
    """Of pools' memory, in this process."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum("sllmdask-host-memory" in line for line in maps)


def pss_of_shared(pid: int) -> int:
    """Bytes of the pool that process `pid` has to account for: pages that n processes have mapped count 1/n each."""
    total, counting = 0, False
    with open(f"/proc/{pid}/smaps", encoding="ascii") as file:
        for line in file:
            if "-" in line.split(" ", 1)[0]:
                counting = "sllmdask-host-memory" in line
            elif counting and line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total
