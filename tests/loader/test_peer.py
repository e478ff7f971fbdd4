from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sllmdask.errors import Cancelled, CheckpointCorrupt, CheckpointNotFound, SourceUnreachable
from sllmdask.loader import peer_origin, peer_server, peer_wire
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.buffers import BufferPool, address_of
from sllmdask.loader.convert import convert
from sllmdask.loader.fetch import Fetch
from sllmdask.loader.format import read_index
from sllmdask.loader.peer_origin import PeerOrigin
from sllmdask.loader.peer_server import DataServer, Served
from sllmdask.loader.plan import plan_reads
from sllmdask.loader.reader import read_chunks
from sllmdask.loader.sockets import Limits, Sockets
from sllmdask.loader.tiers import tensor_views
from tests.loader.stores import eventually
from tests.loader.tensors import files_of

CHUNK = 32 * 1024
TOKEN = "a token that nobody guesses"
QUICK = Limits(connect_s=5, idle_s=10, attempts=3, backoff_s=0.001)


class Holder:
    """A checkpoint in this process's memory, whole or on its way there, and the server that gives it away."""

    def __init__(self, index, key="m", *, chain=True, **options):
        self.index = index
        self.plan = plan_reads(index, CHUNK)
        self.buffer = BufferPool(2**30).lease(self.plan.nbytes)
        self.arrivals = Arrivals(self.plan)
        self.known = {key: Served(index, plan=self.plan, buffer=self.buffer, arrivals=self.arrivals, on_disk=False)}
        self.server = DataServer("127.0.0.1", 0, TOKEN, self.known.get, chain=chain, **options)

    def fill(self, source=None, **options):
        """Read everything, from disk or from `source`; returns the tensors."""
        read_chunks(self.plan, address_of(self.buffer), source=source, arrivals=self.arrivals, **options)
        return tensor_views(self.index, self.plan, self.buffer)

    def close(self):
        for served in self.known.values():
            served.close()
        self.server.close()


@pytest.fixture
def hold():
    with contextlib.ExitStack() as stack:

        def start(index, **options):
            holder = Holder(index, **options)
            stack.callback(holder.close)
            return holder

        yield start


@pytest.fixture
def origin(hold, checkpoint):
    holder = hold(read_index(checkpoint))
    holder.fill()
    return holder


@pytest.fixture
def receive(tmp_path, hold):
    """``receive(addresses)``: a fetch of "m", and the memory, with a server of its own, that it is for."""
    with contextlib.ExitStack() as stack:
        numbers = iter(range(1000))

        def start(*addresses, token=TOKEN, limits=QUICK, key="m", cancel=None, tls=None, chained=True):
            final = tmp_path / f"store-{next(numbers)}" / "m"
            origin = PeerOrigin(addresses, token, key, limits=limits, tls=tls)
            fetch = stack.enter_context(Fetch.open(origin, final, cancel=cancel))
            holder = hold(fetch.index, key=key)
            origin._server = holder.server if chained else None
            return fetch, holder

        yield start


def address(holder):
    return holder.server.address


def source_of(fetch, cancel=None):
    """The source itself, without what takes up an earlier fetch."""
    return fetch._origin.chunks(fetch.index, fetch._partial, fetch._numbers, cancel or threading.Event())


# --- one to one ------------------------------------------------------------------------------------------------------


def test_the_configurations_in_folders_of_an_embedding_model_come_with_it(hold, checkpoint, receive):
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    holder = hold(read_index(checkpoint))
    holder.fill()
    fetch, _ = receive(address(holder))
    assert (fetch.directory / "1_Pooling" / "config.json").read_text() == '{"pooling_mode_cls_token": true}'


def test_a_checkpoint_in_another_workers_memory_comes_here(origin, receive, tensors, assert_equal, n_fds):
    before = n_fds()
    fetch, mine = receive(address(origin))
    assert_equal(mine.fill(fetch.chunks()), tensors)
    assert (fetch.index.fingerprint, fetch.index.tensors) == (origin.index.fingerprint, origin.index.tensors)
    assert (fetch.directory / "tokenizer.json").read_text() == '{"a": 1}'
    mine.close()
    fetch.close()
    assert n_fds() <= before + 8, "the origin's connections may still be ending"


def test_it_also_goes_to_disk_where_that_is_wanted(origin, receive, checkpoint, tensors, assert_equal):
    fetch, mine = receive(address(origin))
    with fetch.tee(mine.plan, mine.buffer) as tee:
        assert_equal(mine.fill(fetch.chunks(), tee=tee), tensors)
        path = tee.finish()
    expected = files_of(checkpoint)
    del expected["README.md"]
    assert files_of(path) == expected
    assert read_index(path).fingerprint == origin.index.fingerprint


def test_a_checkpoint_on_another_workers_disk_comes_here(checkpoint, receive, tensors, assert_equal):
    with DataServer("127.0.0.1", 0, TOKEN, {"m": Served(read_index(checkpoint))}.get) as server:
        fetch, mine = receive(server.address)
        assert_equal(mine.fill(fetch.chunks()), tensors)


@pytest.mark.parametrize("compress", [False, True])
def test_our_own_format_comes_from_disk_and_from_memory(checkpoint, tmp_path, hold, receive, tensors, assert_equal, compress):
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    (tmp_path / "halves").mkdir()
    safetensors.torch.save_file(halves, tmp_path / "halves" / "model.safetensors")
    (tmp_path / "halves" / "config.json").write_text("{}")
    convert(tmp_path / "halves", tmp_path / "fast", compress="yes" if compress else "no")
    index = read_index(tmp_path / "fast")
    assert index.format == "fast"
    assert any(chunk.codec == "split16" for file in index.files for chunk in file.chunks) == compress
    with DataServer("127.0.0.1", 0, TOKEN, {"m": Served(index)}.get) as server:
        fetch, mine = receive(server.address)
        assert_equal(mine.fill(fetch.chunks()), halves)
        assert fetch.pull(CHUNK) == fetch.directory
        assert read_index(fetch.directory).fingerprint == index.fingerprint
    resident = hold(index)
    resident.fill()
    fetch, mine = receive(address(resident))
    if not compress:
        assert_equal(mine.fill(fetch.chunks()), halves)
        return
    with pytest.raises(SourceUnreachable, match="its compressed bytes are not on this host's disk"):
        mine.fill(fetch.chunks())


def test_files_that_were_removed_are_still_given_away(checkpoint, receive, tensors, assert_equal):
    with DataServer("127.0.0.1", 0, TOKEN, {"m": Served(read_index(checkpoint))}.get) as server:
        for path in checkpoint.iterdir():
            path.unlink()
        fetch, mine = receive(server.address)
        assert_equal(mine.fill(fetch.chunks()), tensors)


def test_a_range_that_is_still_on_its_way_is_waited_for(hold, checkpoint, receive, tensors, assert_equal, monkeypatch):
    monkeypatch.setattr(peer_server, "_WAIT_S", 0.01)
    origin = hold(read_index(checkpoint))
    fetch, mine = receive(address(origin))
    done = []
    thread = threading.Thread(target=lambda: done.append(mine.fill(fetch.chunks())))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    origin.fill()
    thread.join(30)
    assert_equal(done[0], tensors)


def test_what_does_not_come_to_the_other_side_is_told(hold, checkpoint, receive):
    origin = hold(read_index(checkpoint))
    fetch, mine = receive(address(origin))
    origin.arrivals.fail(CheckpointCorrupt("f", "t", "a bit flipped"))
    with pytest.raises(SourceUnreachable, match="a bit flipped"):
        mine.fill(fetch.chunks())


def test_a_cancelled_load_does_not_wait_for_what_does_not_come(hold, checkpoint, receive):
    origin = hold(read_index(checkpoint))
    fetch, mine = receive(address(origin))
    cancel = threading.Event()
    threading.Timer(0.1, cancel.set).start()
    with pytest.raises(Cancelled):
        mine.fill(fetch.chunks(cancel), cancel=cancel)


def test_memory_is_not_given_up_while_it_is_being_sent(hold, checkpoint, receive):
    origin = hold(read_index(checkpoint))
    fetch, mine = receive(address(origin))
    outcome = []

    def fill():
        try:
            mine.fill(fetch.chunks())
        except SourceUnreachable as error:
            outcome.append(error.reason)

    thread = threading.Thread(target=fill)
    thread.start()
    while not origin.known["m"]._users:
        assert thread.is_alive()
    origin.known["m"].close()
    assert not origin.known["m"]._users
    assert origin.known["m"]._buffer is None
    thread.join(30)
    assert outcome


# --- refusals --------------------------------------------------------------------------------------------------------


def test_who_does_not_know_the_token_gets_nothing(origin, receive):
    with pytest.raises(SourceUnreachable, match="does not accept our token"):
        receive(address(origin), token="a token that somebody guessed")


def test_a_server_that_does_not_know_the_token_is_not_believed(receive):
    """It accepts whatever it is told, as an impostor would."""
    listener = socket.create_server(("127.0.0.1", 0))

    def impostor():
        for _ in range(2):
            sock, _ = listener.accept()
            with sock:
                sock.sendall(peer_wire.GREETING.pack(peer_wire.MAGIC, peer_wire.OK, bytes(32)))
                sock.recv(64)
                sock.sendall(bytes(33))

    thread = threading.Thread(target=impostor, daemon=True)
    thread.start()
    with listener, pytest.raises(SourceUnreachable, match="does not know it"):
        receive(f"127.0.0.1:{listener.getsockname()[1]}")


def test_a_short_token_is_refused():
    with pytest.raises(ValueError, match="guessed"):
        DataServer("127.0.0.1", 0, "short", {}.get)


def test_what_is_not_there_is_not_found(origin, receive):
    with pytest.raises(CheckpointNotFound, match="'other' is not here"):
        receive(address(origin), key="other")


def test_nobody_at_the_address_is_told(receive):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(SourceUnreachable, match="ConnectionRefusedError"):
        receive(f"127.0.0.1:{port}")


def test_a_server_with_too_many_connections_says_so(hold, checkpoint, receive):
    origin = hold(read_index(checkpoint), max_connections=1)
    with socket.create_connection(("127.0.0.1", origin.server.port)), pytest.raises(SourceUnreachable, match="it is busy"):
        receive(address(origin))


def test_another_version_of_the_checkpoint_is_not_mixed_in(origin, receive):
    fetch, mine = receive(address(origin))
    fetch._origin._fingerprint = "another"
    with pytest.raises(SourceUnreachable, match="another version"):
        mine.fill(fetch.chunks())


@pytest.mark.parametrize(
    "request_",
    [
        peer_wire.REQUEST.pack(99, 0, 0, 0),
        peer_wire.REQUEST.pack(peer_wire.RANGE, 0, 0, 10),
        peer_wire.REQUEST.pack(peer_wire.CALL, 0, 0, 2**60),
        peer_wire.REQUEST.pack(peer_wire.CALL, 0, 0, 4) + b"nope",
        peer_wire.REQUEST.pack(peer_wire.CALL, 0, 0, 2) + b"[]",
        peer_wire.REQUEST.pack(peer_wire.CALL, 0, 0, 30) + json.dumps({"op": "open", "key": ["m"]}).encode().ljust(30),
        peer_wire.REQUEST.pack(peer_wire.CALL, 0, 0, 30) + json.dumps({"op": "shut", "key": "m"}).encode().ljust(30),
        peer_wire.REQUEST.pack(peer_wire.CALL, 0, 0, 30) + json.dumps({"op": "join", "key": "m"}).encode().ljust(30),
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    ],
)
def test_a_request_that_makes_no_sense_is_refused_and_harms_nobody(origin, receive, tensors, assert_equal, request_):
    line = caller().connect(address(origin), sockets := Sockets(None))
    line._wire.send(request_)
    status, nbytes, _ = peer_wire.REPLY.unpack(line._wire.receive(peer_wire.REPLY.size))
    assert status in (peer_wire.BAD, peer_wire.UNKNOWN)
    assert 0 < nbytes <= 1000
    sockets.__exit__(None, None, None)
    fetch, mine = receive(address(origin))
    assert_equal(mine.fill(fetch.chunks()), tensors)


def caller(key="m"):
    return peer_origin._Caller(TOKEN.encode(), key, None, QUICK)


@pytest.mark.parametrize(("file", "offset", "nbytes"), [(99, 0, 1), (0, 2**62, 10), (0, 0, 2**63), (0, 0, 0), (2**32 - 1, 0, 1)])
def test_a_range_outside_the_files_is_refused(origin, file, offset, nbytes):
    with Sockets(None) as sockets:
        line = caller().connect(address(origin), sockets)
        line.call("use")
        line._wire.send(peer_wire.REQUEST.pack(peer_wire.RANGE, file, offset, nbytes))
        status, _, _ = peer_wire.REPLY.unpack(line._wire.receive(peer_wire.REPLY.size))
        assert status == peer_wire.BAD


def test_the_token_is_never_sent(origin, receive, monkeypatch):
    sent = []
    send = peer_wire.Wire.send

    def noting(self, *parts):
        sent.extend(bytes(part) for part in parts)
        send(self, *parts)

    monkeypatch.setattr(peer_wire.Wire, "send", noting)
    fetch, mine = receive(address(origin))
    mine.fill(fetch.chunks())
    assert sent and not any(TOKEN.encode() in part for part in sent)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damage(monkeypatch):
    """``damage(n)``: the next n frames of a receiver arrive with a flipped bit."""
    left, receive_into = [0], peer_wire.Wire.receive_into

    def damaging(self, view):
        receive_into(self, view)
        if view.nbytes > 10_000 and left[0] > 0:
            left[0] -= 1
            view[5000] ^= 4

    monkeypatch.setattr(peer_wire.Wire, "receive_into", damaging)
    return lambda n: left.__setitem__(0, n)


def test_a_frame_that_arrives_damaged_is_asked_for_again(origin, receive, tensors, assert_equal, damage):
    fetch, mine = receive(address(origin))
    damage(1)
    source = source_of(fetch)
    assert_equal(mine.fill(source), tensors)
    assert (source.n_damaged, source.n_rerouted) == (1, 0)


def test_one_that_is_damaged_twice_ends_the_load(origin, receive, damage):
    fetch, mine = receive(address(origin))
    damage(1000)
    with pytest.raises(CheckpointCorrupt, match="its bytes arrive damaged, twice"):
        mine.fill(fetch.chunks())


def test_memory_that_went_bad_after_its_checksum_was_taken_is_noticed(origin, receive, tensors, assert_equal):
    fetch, mine = receive(address(origin))
    assert_equal(mine.fill(fetch.chunks()), tensors)
    origin.buffer[100_000] ^= 1
    fetch, mine = receive(address(origin))
    with pytest.raises(CheckpointCorrupt, match="arrive damaged"):
        mine.fill(fetch.chunks())


# --- chains ----------------------------------------------------------------------------------------------------------


def start_all(receivers):
    """Fill all of them at once; their sources, threads and what came of each."""
    sources, outcomes, threads = [], {}, []
    for i, (fetch, mine) in enumerate(receivers):
        source = source_of(fetch)
        sources.append(source)
        joined = threading.Event()
        enter = source.__class__.__enter__

        def fill(i=i, mine=mine, source=source, joined=joined, enter=enter):
            class Noting:
                def __enter__(self):
                    enter(source)
                    joined.set()
                    return source

                def __exit__(self, *args):
                    source.__exit__(*args)

            try:
                outcomes[i] = mine.fill(Noting())
            except SourceUnreachable as error:
                outcomes[i] = error
                joined.set()

        thread = threading.Thread(target=fill)
        thread.start()
        assert joined.wait(30)
        threads.append(thread)
    return sources, threads, outcomes


def test_receivers_of_one_server_form_a_chain(hold, checkpoint, receive, tensors, assert_equal):
    origin = hold(read_index(checkpoint), idle_s=0.4)
    receivers = [receive(address(origin)) for _ in range(3)]
    sources, threads, outcomes = start_all(receivers)
    threads[0].join(0.6)
    servers = [address(mine) for _, mine in receivers]
    assert [source.upstream for source in sources] == [address(origin), servers[0], servers[1]]
    assert origin.server.receivers("m") == servers, "silent for longer than others may be"
    origin.fill()
    for thread in threads:
        thread.join(30)
    for i in range(3):
        assert_equal(outcomes[i], tensors)
    assert [source.n_rerouted for source in sources] == [0, 0, 0]
    eventually(lambda: origin.server.receivers("m") == [])


def test_without_chaining_all_are_fed_by_the_first(hold, checkpoint, receive, tensors, assert_equal):
    origin = hold(read_index(checkpoint), chain=False)
    sources, threads, outcomes = start_all([receive(address(origin)) for _ in range(3)])
    assert {source.upstream for source in sources} == {address(origin)}
    origin.fill()
    for thread in threads:
        thread.join(30)
    assert all(torch.equal(outcomes[i]["model.layers.3.weight"], tensors["model.layers.3.weight"]) for i in range(3))


def test_who_comes_when_the_others_are_done_is_fed_by_the_first(origin, receive, tensors, assert_equal):
    for _ in range(2):
        fetch, mine = receive(address(origin))
        source = source_of(fetch)
        assert_equal(mine.fill(source), tensors)
        assert source.upstream == address(origin)
        eventually(lambda: origin.server.receivers("m") == [])


def test_who_loses_what_is_before_it_goes_back_to_the_first_server(hold, checkpoint, receive, tensors, assert_equal):
    origin = hold(read_index(checkpoint))
    receivers = [receive(address(origin)) for _ in range(3)]
    sources, threads, outcomes = start_all(receivers)
    receivers[1][1].close()
    eventually(lambda: sources[2].upstream == address(origin))
    assert address(receivers[1][1]) not in origin.server.receivers("m")
    origin.fill()
    for thread in threads:
        thread.join(30)
    for i in (0, 1, 2):
        assert_equal(outcomes[i], tensors)


def test_the_next_address_takes_over_where_the_first_one_ends(hold, checkpoint, receive, tensors, assert_equal):
    first, second = hold(read_index(checkpoint)), hold(read_index(checkpoint))
    second.fill()
    fetch, mine = receive(address(first), address(second))
    sources, threads, outcomes = start_all([(fetch, mine)])
    assert sources[0].upstream == address(first)
    first.close()
    threads[0].join(30)
    assert_equal(outcomes[0], tensors)
    assert sources[0].upstream == address(second)


def _receiver(connection, origin, final, slow):
    """A process that receives "m"; it tells what its server's address is, then each chunk, then a digest of what it got."""
    fetch_origin = PeerOrigin([origin], TOKEN, "m", limits=QUICK)
    fetch = Fetch.open(fetch_origin, Path(final))
    holder = Holder(fetch.index)
    fetch_origin._server = holder.server
    source = source_of(fetch)
    connection.send(holder.server.address)

    def progress(done):
        connection.send((done, source.upstream))
        if slow and done:
            connection.recv()

    tensors = holder.fill(source, n_threads=2, on_progress=progress)
    connection.send({name: tensor.sum().item() for name, tensor in tensors.items()})
    connection.recv()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_in_the_chain_costs_the_others_nothing_but_time(hold, checkpoint, tensors, tmp_path, killed):
    origin = hold(read_index(checkpoint))
    origin.fill()
    # One process imports torch, for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pipes, processes, addresses = [], [], []
    for i in range(3):
        mine, theirs = context.Pipe()
        # Those that are to be killed are held up after their first chunks.
        args = (theirs, address(origin), str(tmp_path / f"r{i}" / "m"), i <= killed)
        process = context.Process(target=_receiver, args=args, daemon=True)
        process.start()
        pipes.append(mine)
        processes.append(process)
        addresses.append(mine.recv())
        mine.recv()
        assert mine.recv()[1] == ([address(origin), *addresses])[i]
    assert origin.server.receivers("m") == addresses
    os.kill(processes[killed].pid, signal.SIGKILL)
    processes[killed].join()
    for i in range(killed):
        pipes[i].send("go on")
    expected = {name: tensor.sum().item() for name, tensor in tensors.items()}
    for i in {0, 1, 2} - {killed}:
        seen = 0
        while not isinstance(message := pipes[i].recv(), dict):
            assert message[0] > seen, "no chunk is counted twice"
            seen = message[0]
            if i < killed:
                pipes[i].send("go on")
        assert message == expected
        assert i < killed or seen == origin.index.nbytes
    for i in {0, 1, 2} - {killed}:
        pipes[i].send("the end")
        processes[i].join()
    eventually(lambda: origin.server.receivers("m") == [])


# --- TLS -------------------------------------------------------------------------------------------------------------


def test_with_tls_nothing_is_readable_and_all_is_the_same(checkpoint, tmp_path, receive, tensors, assert_equal):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    subprocess.run([*command, *subject, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(certificate))
    theirs.load_cert_chain(certificate, key)
    with DataServer("127.0.0.1", 0, TOKEN, {"m": Served(read_index(checkpoint))}.get, tls=theirs) as server:
        fetch, mine = receive(server.address, tls=ours, chained=False)
        assert_equal(mine.fill(fetch.chunks()), tensors)
        with pytest.raises(SourceUnreachable, match="nothing came"):
            receive(server.address, limits=Limits(idle_s=0.2, attempts=1))
        with pytest.raises(SourceUnreachable, match="certificate"):
            receive(server.address, tls=ssl.create_default_context())
