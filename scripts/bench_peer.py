"""How fast does a checkpoint get from one worker's memory to another's? Against a plain socket; one receiver, three; chain, star.

    scripts/bench_peer.py [--gib 1] [--repeats 10] [--link MBPS] [--json FILE]

The sender and each receiver are processes. *plain* sends the same bytes over one or four TCP connections to memory that is
faulted in, in pieces of 2 MiB, without checks; *ours* is a DataServer and the reader with four threads, each frame's XXH64
checked. Contenders alternate in a shuffled order. The time of a run is from the word go to the last byte at the last receiver.

`--link`: every process has a network namespace of its own, with a link of so many megabytes per second in each direction (needs
root); without it all share the loopback, where what limits is the processor's copying, and a chain cannot be better than a star.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from sllmdask.loader import libc
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.buffers import BufferPool, address_of, lease_nbytes
from sllmdask.loader.fetch import Fetch
from sllmdask.loader.format import read_index
from sllmdask.loader.kernels import warm_up
from sllmdask.loader.peer_origin import PeerOrigin
from sllmdask.loader.peer_server import DataServer, Served
from sllmdask.loader.plan import ReadPlan, plan_reads
from sllmdask.loader.reader import read_chunks

CHUNK = 2 * 1024**2
TOKEN = "the bench's own token"
N_RECEIVERS = 3
#: What is compared: receivers, kind, connections or chaining.
RUNS = ["1 plain x1", "1 plain x4", "1 ours", "3 plain x1", "3 ours star", "3 ours chain"]


def make_checkpoint(directory: Path, nbytes: int) -> None:
    """One safetensors file of `nbytes` bytes of tensors, sparse: its bytes are never read from disk."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    (directory / "config.json").write_text("{}")


def lease(plan: ReadPlan) -> np.ndarray:
    buffer = BufferPool(lease_nbytes(plan.nbytes)).lease(plan.nbytes)
    libc.populate(address_of(buffer), buffer.nbytes)
    return buffer


def send_plain(listener: socket.socket, address: int, nbytes: int) -> None:
    """To each connection its share of the bytes: it asks with its number and how many there are."""

    def serve(sock: socket.socket) -> None:
        with sock:
            number, n = sock.recv(2)
            for start in range(number * CHUNK, nbytes, n * CHUNK):
                sock.sendall(libc.memory_view(address + start, min(CHUNK, nbytes - start)))

    while True:
        sock, _ = listener.accept()
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


def receive_plain(host: str, port: int, address: int, nbytes: int, n: int) -> None:
    def receive(number: int) -> None:
        with socket.create_connection((host, port)) as sock:
            sock.settimeout(None)
            sock.send(bytes([number, n]))
            for start in range(number * CHUNK, nbytes, n * CHUNK):
                view = libc.memory_view(address + start, min(CHUNK, nbytes - start))
                while view:
                    view = view[sock.recv_into(view, 0, socket.MSG_WAITALL) :]

    threads = [threading.Thread(target=receive, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def sender(pipe: Connection, host: str, directory: str) -> None:
    index = read_index(directory)
    plan = plan_reads(index, CHUNK)
    buffer = lease(plan)
    buffer[:] = np.random.default_rng(0).integers(0, 256, buffer.nbytes, dtype=np.uint8)
    warm_up()
    served = Served(index, plan=plan, buffer=buffer, on_disk=False)
    servers = [DataServer(host, 0, TOKEN, {"m": served}.get, chain=chain) for chain in (False, True)]
    listener = socket.create_server((host, 0))
    threading.Thread(target=send_plain, args=(listener, address_of(buffer), buffer.nbytes), daemon=True).start()
    pipe.send((listener.getsockname()[1], *(server.address for server in servers), int(buffer.sum(dtype=np.uint64))))
    while pipe.recv() is not None:
        pipe.send((os.times().user, os.times().system))


def receiver(pipe: Connection, host: str, far: str, port: int, star: str, chain: str, total: int) -> None:
    known: dict[str, Served] = {}
    server = DataServer(host, 0, TOKEN, known.get)
    warm_up()
    with tempfile.TemporaryDirectory() as scratch:
        origins = {"star": PeerOrigin([star], TOKEN, "m"), "chain": PeerOrigin([chain], TOKEN, "m", server=server)}
        fetches = {kind: Fetch.open(origin, Path(scratch, kind)) for kind, origin in origins.items()}
        fetch = fetches["chain"]
        assert fetch is not None
        plan = plan_reads(fetch.index, CHUNK)
        buffer = lease(plan)
        pipe.send("ready")
        while (run := pipe.recv()) is not None:
            kind, start = run
            buffer[::4096] = 0
            arrivals = Arrivals(plan)
            if kind == "chain":
                known["m"] = Served(fetch.index, plan=plan, buffer=buffer, arrivals=arrivals, on_disk=False)
            pipe.send("set")
            while time.monotonic() < start:
                time.sleep(0.0005)
            if kind in fetches:
                source = fetches[kind]
                assert source is not None
                read_chunks(plan, address_of(buffer), source=source.chunks(), arrivals=arrivals)
            else:
                receive_plain(far, port, address_of(buffer), buffer.nbytes, int(kind))
            pipe.send((time.monotonic(), os.times().user, os.times().system))
            # Not before all are done: others may still be fed from here.
            pipe.recv()
            assert int(buffer.sum(dtype=np.uint64)) == total, "wrong bytes"
            if kind == "chain":
                known.pop("m").close()
            pipe.send("checked")


@contextlib.contextmanager
def namespaces(mb_per_s: float | None) -> Iterator[list[str]]:
    """The hosts' addresses: of the sender, and of each receiver."""
    if mb_per_s is None:
        yield ["127.0.0.1"] * (1 + N_RECEIVERS)
        return

    def run(command: str) -> None:
        subprocess.run(command.split(), check=True)

    names = [f"sllmbench{os.getpid()}-{i}" for i in range(1 + N_RECEIVERS)]
    bridge, rate = f"sb{os.getpid() % 100000}", f"rate {mb_per_s * 8:.0f}mbit burst 1mb latency 50ms"
    try:
        run(f"ip link add {bridge} type bridge")
        run(f"ip link set {bridge} up")
        for i, name in enumerate(names):
            run(f"ip netns add {name}")
            run(f"ip link add {bridge}v{i} type veth peer name eth0 netns {name}")
            run(f"ip link set {bridge}v{i} master {bridge} up")
            run(f"ip -n {name} addr add 10.213.0.{i + 1}/24 dev eth0")
            run(f"ip -n {name} link set eth0 up")
            run(f"ip -n {name} link set lo up")
            run(f"tc -n {name} qdisc add dev eth0 root tbf {rate}")
            run(f"tc qdisc add dev {bridge}v{i} root tbf {rate}")
        yield [f"10.213.0.{i + 1}" for i in range(1 + N_RECEIVERS)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], check=False, capture_output=True)


def enter(namespace: int | None, target: object, *args: object) -> None:
    """Call `target` in network namespace number `namespace` of the bench."""
    if namespace is not None:
        with open(f"/run/netns/sllmbench{os.getppid()}-{namespace}") as file:
            _setns(file.fileno())
    assert callable(target)
    target(*args)


def _setns(fd: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(fd, 0):
        raise OSError(ctypes.get_errno(), "setns")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint (%(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="runs of each contender (%(default)s)")
    parser.add_argument("--link", type=float, help="megabytes per second of each process's link")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    nbytes = int(options.gib * 1024**3) // CHUNK * CHUNK
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {run: [] for run in RUNS}
    cpu: dict[str, list[float]] = {run: [] for run in RUNS}
    with namespaces(options.link) as hosts, tempfile.TemporaryDirectory() as scratch:
        make_checkpoint(Path(scratch), nbytes)
        apart = options.link is not None

        def start(number: int, target: object, *args: object) -> tuple[Connection, multiprocessing.process.BaseProcess]:
            mine, theirs = context.Pipe()
            where = number if apart else None
            process = context.Process(target=enter, args=(where, target, theirs, hosts[number], *args), daemon=True)
            process.start()
            return mine, process

        origin, process = start(0, sender, scratch)
        told = origin.recv()
        started = [start(1 + i, receiver, hosts[0], *told) for i in range(N_RECEIVERS)]
        receivers = [pipe for pipe, _ in started]
        for pipe in receivers:
            assert pipe.recv() == "ready"

        def cpu_of_sender() -> float:
            origin.send("times")
            return sum(origin.recv())

        rng, used = random.Random(options.seed), [0.0] * N_RECEIVERS
        for repeat in range(options.repeats + 1):
            for run in rng.sample(RUNS, len(RUNS)):
                n, *rest = run.split()
                kind = "star" if rest == ["ours"] else rest[-1].removeprefix("x")
                taking = receivers[: int(n)]
                before, begin = cpu_of_sender(), time.monotonic() + 0.3
                for pipe in taking:
                    pipe.send((kind, begin))
                for pipe in taking:
                    assert pipe.recv() == "set"
                ends = [pipe.recv() for pipe in taking]
                spent = cpu_of_sender() - before
                for i, (_, user, system) in enumerate(ends):
                    spent, used[i] = spent + user + system - used[i], user + system
                for pipe in taking:
                    pipe.send("check")
                for pipe in taking:
                    assert pipe.recv() == "checked"
                # The first round faults in what is left to fault in.
                if repeat:
                    seconds[run].append(max(end for end, *_ in ends) - begin)
                    cpu[run].append(spent)
                    print(f"{repeat:3} {run:14} {seconds[run][-1]:.3f} s", file=sys.stderr)

        for pipe, ended in [*started, (origin, process)]:
            pipe.send(None)
            ended.join()

    median = {run: statistics.median(values) for run, values in seconds.items()}
    plain = min(median["1 plain x1"], median["1 plain x4"])
    result = {
        "nbytes": nbytes,
        "repeats": options.repeats,
        "link_mb_per_s": options.link,
        "machine": {"cpus": os.cpu_count(), "cpu": _cpu(), "kernel": platform.release(), "python": platform.python_version()},
        "seconds": seconds,
        "median_s": median,
        "median_gb_per_s": {run: int(run[0]) * nbytes / value / 1e9 for run, value in median.items()},
        "median_cpu_s": {run: statistics.median(values) for run, values in cpu.items()},
        "ours_to_plain": plain / median["1 ours"],
        "three_to_one": {kind: median[f"3 ours {kind}"] / median["1 ours"] for kind in ("star", "chain")},
        "three_plain_to_one": median["3 plain x1"] / median["1 plain x1"],
    }
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "seconds"}, indent=1))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
