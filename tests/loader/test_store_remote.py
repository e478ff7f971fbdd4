"""Checkpoints that come from elsewhere: a directory behind HTTP, the hub, the other workers. Servers and sockets are real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from sllmdask.config import WorkerSettings
from sllmdask.errors import CheckpointCorrupt, CheckpointNotFound, DiskFull, LoadFailed, SourceUnreachable
from sllmdask.loader import libc
from sllmdask.loader.convert import convert
from sllmdask.loader.format import read_index
from sllmdask.loader.private_pool import PrivatePool
from sllmdask.loader.sockets import Limits
from sllmdask.loader.store import CheckpointStore
from tests.loader.serving import Gate as Held
from tests.loader.serving import Site, gone_offline
from tests.loader.stores import CHUNK, N, entry, eventually, reached, state, until, used

TOKEN = "a token that nobody guesses"
#: Bytes: memory for any test.
ROOM = 256 * 1024**2


@pytest.fixture
def site(tmp_path, models, monkeypatch):
    """An HTTP server of the three models, ``site.url + "/a"`` and so on; who asks in vain asks again at once."""
    for module in ("http_origin", "hub"):
        monkeypatch.setattr(f"sllmdask.loader.{module}.Limits", partial(Limits, backoff_s=0.001))
    with Site(tmp_path) as site:
        yield site


@pytest.fixture
def downloads(tmp_path):
    """Names of what is in the disk tier."""
    return lambda: sorted(path.name for path in (tmp_path / "store").iterdir())


def weights(directory):
    return Path(directory, "model.safetensors").read_bytes()


def damage(path):
    """One byte of a checkpoint of our own format is another one; its data file."""
    (data,) = path.glob("*.bin")
    with data.open("r+b") as file:
        file.seek(CHUNK)
        file.write(b"\xff")
    return data


def open_files():
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def dies_after(served, n):
    """`served` gives away n pieces from memory, and from then on nobody anything."""
    send_memory, n_sent = served._send_memory, []

    def send(*args):
        n_sent.append(args)
        if len(n_sent) > n:
            raise ConnectionResetError("it died")
        send_memory(*args)

    served._send_memory = send


async def complete(store, key):
    """Until the disk copy of `key` is complete."""
    await until(store, lambda: store._loads.records[key].path)


# --- from HTTP and from the hub --------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_hub_model_is_fetched_once_for_all_and_then_read_from_disk(new_store, hub, models, tmp_path, cold):
    shutil.copytree(models["b"], tmp_path / "hub" / "org" / "b")
    store, held = await new_store(ROOM), Held()
    hub.on_data = held
    loads = [asyncio.create_task(store.load(key, "org/b")) for key in ("x", "y")]
    inspecting = asyncio.create_task(store.inspect("x", "org/b"))
    await reached(held.reached)
    assert {found["state"] for found in store.snapshot()["keys"].values()} == {"fetching"}
    held.open()
    leases = await asyncio.gather(*loads)
    assert all(lease.tensors["w"].eq(1).all() for lease in leases)
    assert sorted(lease.tier_from for lease in leases) == ["host", "remote"]
    assert (await inspecting).path.removesuffix(".partial") == str(tmp_path / "store" / "org--b")
    await until(store, lambda: {lease.path for lease in leases} == {str(tmp_path / "store" / "org--b")})
    assert hub.n_data == (models["b"] / "model.safetensors").stat().st_size, "no byte twice"
    assert set(store.snapshot()["bandwidth"]) == {"remote"}
    for lease in leases:
        lease.release()
    for key in ("x", "y"):
        await store.evict(key)
    n_asked = len(hub.data)
    cold(tmp_path / "store" / "org--b")
    assert (await store.load("x", "org/b")).tier_from == "disk"
    assert len(hub.data) == n_asked


@pytest.mark.asyncio
async def test_bytes_of_which_the_hash_turns_out_wrong_are_used_no_more_and_who_uses_them_hears_of_it(
    new_store, hub, models, tmp_path, downloads
):
    shutil.copytree(models["b"], tmp_path / "hub" / "org" / "b")
    hub.lies["model.safetensors"] = "0" * 64
    store = await new_store(ROOM)
    lease, heard = await store.load("x", "org/b"), asyncio.get_running_loop().create_future()
    lease.on_damage(heard.set_result)
    error = await asyncio.wait_for(heard, 30)
    assert isinstance(error, CheckpointCorrupt) and error.file == "model.safetensors" and "SHA-256" in error.message
    lease.release()
    await until(store, lambda: not used(store))
    assert downloads() == []
    hub.lies.clear()
    assert (await store.load("x", "org/b")).tier_from == "remote"
    await complete(store, "x")


@pytest.mark.asyncio
async def test_a_quota_that_is_too_small_for_a_copy_is_no_reason_not_to_load(new_store, site, downloads):
    store = await new_store(ROOM, disk_quota=N)
    lease = await store.load("a", f"{site.url}/a")
    assert lease.tensors["w"].eq(0).all() and "config.json" in os.listdir(lease.path)
    assert not await store.on_disk(f"{site.url}/a")
    with pytest.raises(DiskFull):
        await store.pull("a", f"{site.url}/a")


@pytest.mark.asyncio
async def test_a_store_directory_that_cannot_be_made_is_named_with_its_setting(new_store, site, tmp_path):
    (tmp_path / "file").touch()
    store = await new_store(ROOM, store_dir=str(tmp_path / "file" / "store"))
    for refused in (store.load("a", f"{site.url}/a"), store.pull("a", f"{site.url}/a")):
        with pytest.raises(LoadFailed, match=r"worker.store_dir is '.*/file/store'"):
            await refused


@pytest.mark.asyncio
async def test_to_inspect_what_is_elsewhere_fetches_no_data_and_has_memory_made_ready(new_store, site, tmp_path):
    store = await new_store(ROOM)
    asked = []
    store._pool.prefault = asked.append
    info = await store.inspect("m", f"{site.url}/a")
    assert (info.nbytes, info.config) == (4 * N, {"model_type": "test"})
    assert (Path(info.path) / "config.json").is_file()
    assert site.data == []
    assert len(asked) == 1 and asked[0] >= 4 * N
    assert not await store.on_disk(f"{site.url}/a")
    assert store.snapshot()["keys"] == {}


@pytest.mark.asyncio
async def test_an_interrupted_fetch_is_never_taken_for_a_checkpoint_and_goes_on_where_it_ended(new_store, site, downloads):
    store = await new_store(ROOM)
    source = f"{site.url}/b"
    half = threading.Event()

    def cut(_name: str, start: int, _stop: int) -> None:
        if start > 2 * N:
            half.set()
            raise ConnectionAbortedError("the line went dead")

    site.on_data = cut
    with pytest.raises(SourceUnreachable):
        await store.load("m", source)
    assert half.is_set()
    assert state(store, "m") == "failed"
    (name,) = downloads()
    assert name.endswith(".partial")
    assert not await store.on_disk(source)
    assert store._sharing.lookup("m") is None, "what is not complete is not given away"
    site.on_data = lambda *_: None
    before = site.n_data
    lease = await store.load("m", source)
    assert lease.tier_from == "remote" and lease.tensors["w"].eq(1).all()
    assert site.n_data - before < 4 * N * 3 / 4, "a part was there"
    assert "remote" not in store.snapshot()["bandwidth"], "what was there tells nothing of the source"
    await complete(store, "m")
    assert downloads() == [name.removesuffix(".partial")]


@pytest.mark.asyncio
async def test_a_fetch_that_nobody_waits_for_any_more_stops_and_promises_nothing(new_store, site, downloads):
    store, held = await new_store(ROOM), Held()
    site.on_data = held
    load = asyncio.create_task(store.load("m", f"{site.url}/a"))
    await reached(held.reached)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert state(store, "m") == "absent"
    assert store._sharing.lookup("m") is None
    held.open()
    lease = await store.load("m", f"{site.url}/a")
    assert lease.tensors["w"].eq(0).all()
    await complete(store, "m")
    assert all(not name.endswith(".partial") for name in downloads())


@pytest.mark.asyncio
async def test_a_load_that_is_called_off_at_once_fetches_no_data(new_store, site):
    store = await new_store(ROOM)
    load = asyncio.create_task(store.load("m", f"{site.url}/a"))
    await asyncio.sleep(0)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    await store.close()
    assert site.data == []
    assert state(store, "m") == "absent"


@pytest.mark.asyncio
async def test_tensors_come_before_the_bytes_from_elsewhere_too(new_store, site, downloads):
    store, held = await new_store(ROOM), Held()
    site.on_data = held
    lease = await store.load("m", f"{site.url}/c", whole=False)
    await reached(held.reached)
    assert state(store, "m") == "fetching", "its files are not complete: nobody may count on them"
    assert (Path(lease.path) / "config.json").is_file()
    held.open()
    await lease.complete()
    assert lease.tensors["w"].eq(2).all()
    await complete(store, "m")
    assert [lease.path] == [str(store._disk.root / name) for name in downloads()]


@pytest.mark.asyncio
async def test_more_may_wait_for_one_fetch_than_the_event_loop_has_threads(new_store, site):
    store, held = await new_store(ROOM), Held()
    site.on_data = held
    source = f"{site.url}/a"
    load = asyncio.create_task(store.load("m", source))
    await reached(held.reached)
    waiting = [asyncio.create_task(store.inspect("m", source)) for _ in range(50)]
    waiting += [asyncio.create_task(store.load(f"m{i}", source)) for i in range(10)]
    # The others are in their threads now: one more thing that needs a thread is not held up by them.
    await store.inspect("b", str(site.root / "b"))
    held.open()
    await load
    async with asyncio.timeout(30):
        await asyncio.gather(*waiting)


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["inspect", "pull"])
async def test_who_is_cancelled_while_it_fetches_holds_up_nobody(new_store, site, what, n_fds):
    store, held = await new_store(ROOM), Held()
    source = f"{site.url}/a"
    n_small = threading.Event()
    if what == "pull":
        site.on_data = held
    else:
        # In the middle of the small files.
        handler = site._server.RequestHandlerClass
        plain = handler._file

        def slow(self, path):
            if path.name == "config.json" and not n_small.is_set():
                held()
            plain(self, path)

        handler._file = slow
    asking = asyncio.create_task(getattr(store, what)("m", source))
    await reached(held.reached)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    held.open()
    n_small.set()
    async with asyncio.timeout(30):
        lease = await store.load("m", source)
    assert lease.tensors["w"].eq(0).all()


@pytest.mark.asyncio
async def test_a_pull_brings_files_and_no_memory_and_tells_how_far_it_is(new_store, site, models):
    store = await new_store(ROOM)
    heard, here = [], threading.get_ident()
    path = await store.pull("m", f"{site.url}/a", lambda *progress: heard.append((*progress, threading.get_ident() == here)))
    assert (Path(path) / "model.safetensors").read_bytes() == (models["a"] / "model.safetensors").read_bytes()
    assert used(store) == 0
    assert heard == sorted(heard) and heard[-1] == (4 * N, 4 * N, True)
    n_asked = len(site.data)
    assert await store.pull("m", f"{site.url}/a") == path
    assert len(site.data) == n_asked
    assert store.snapshot()["tiers"]["disk"]["used"] >= 4 * N
    assert (await store.load("m", f"{site.url}/a")).tier_from == "disk"


@pytest.mark.asyncio
async def test_a_full_disk_ends_the_disk_copy_and_neither_the_load_nor_what_is_built_over_it(
    new_store, site, monkeypatch, downloads
):
    store, pwrite, n = await new_store(ROOM), libc.pwrite, []

    def failing(fd, address, nbytes, offset):
        n.append(offset)
        if len(n) > 5:
            raise OSError(28, os.strerror(28))
        pwrite(fd, address, nbytes, offset)

    with monkeypatch.context() as patched:
        patched.setattr(libc, "pwrite", failing)
        lease = await store.load("m", f"{site.url}/a")
        assert lease.tensors["w"].eq(0).all()
        while store._background.tasks:
            await asyncio.wait(store._background.tasks)
    assert (Path(lease.path) / "config.json").is_file(), "a model that is built now needs it"
    assert store._sharing.lookup("other") is None
    assert not await store.on_disk(f"{site.url}/a")
    lease.release()
    await store.evict("m")
    await until(store, lambda: used(store) == 0)
    assert state(store, "m") == "absent", "it is on no disk"
    again = await store.load("m", f"{site.url}/a")
    assert again.tensors["w"].eq(0).all() and again.tier_from == "remote"
    await complete(store, "m")
    assert len(downloads()) == 1


@pytest.mark.asyncio
async def test_a_damaged_copy_is_put_aside_and_fetched_again_in_the_same_load(new_store, tmp_path, models, downloads):
    convert(models["b"], tmp_path / "fast")
    with Site(tmp_path / "fast") as site:
        store = await new_store(ROOM)
        path = Path(await store.pull("m", site.url))
        damage(path)
        lease = await store.load("m", site.url)
        assert lease.tier_from == "remote" and lease.tensors["w"].eq(1).all()
        await complete(store, "m")
        assert [name for name in downloads() if not name.endswith(".damaged")] == [path.name]
        assert len(downloads()) == 2
        lease.release()


@pytest.mark.asyncio
async def test_a_damaged_copy_that_somebody_builds_upon_fails_and_the_next_load_fetches_it_again(
    new_store, tmp_path, models, downloads
):
    convert(models["b"], tmp_path / "fast")
    with Site(tmp_path / "fast") as site:
        store = await new_store(ROOM)
        path = Path(await store.pull("m", site.url))
        data = damage(path)
        lease = await store.load("m", site.url, whole=False)
        with pytest.raises(CheckpointCorrupt) as caught:
            await lease.complete()
        assert (caught.value.file, caught.value.tensor) == (str(data), "w")
        lease.release()
        assert path.name not in downloads()
        assert state(store, "m") == "failed" and not await store.on_disk(site.url)
        assert (await store.load("m", site.url)).tensors["w"].eq(1).all()


@pytest.mark.asyncio
async def test_a_quota_keeps_what_was_used_last_and_what_is_in_use(new_store, site, downloads):
    nbytes = (site.root / "a" / "model.safetensors").stat().st_size
    store = await new_store(ROOM, disk_quota=int(2.5 * nbytes))
    sources = {key: f"{site.url}/{key}" for key in "abc"}
    lease = await store.load("a", sources["a"])
    await complete(store, "a")
    await store.pull("b", sources["b"])
    await store.pull("c", sources["c"])
    assert await store.on_disk(sources["a"]) and not await store.on_disk(sources["b"])
    assert store.snapshot()["tiers"]["disk"]["capacity"] == int(2.5 * nbytes)
    small = await new_store(ROOM, disk_quota=nbytes // 2)
    with pytest.raises(DiskFull) as caught:
        await small.pull("b", sources["b"])
    assert (caught.value.needed, caught.value.free) == (4 * N, 0)
    lease.release()
    await store.evict("a")
    os.utime(await store.pull("a", sources["a"]), (0, 0))
    await store.pull("b", sources["b"])
    assert not await store.on_disk(sources["a"])
    assert state(store, "a") in ("absent", "host")
    assert len(downloads()) == 2


@pytest.mark.asyncio
async def test_another_workers_quota_does_not_remove_what_is_in_use_here(new_store, site, tmp_path):
    nbytes = (site.root / "a" / "model.safetensors").stat().st_size
    here, there = [await new_store(ROOM, disk_quota=int(1.5 * nbytes)) for _ in range(2)]
    lease = await here.load("a", f"{site.url}/a")
    await complete(here, "a")
    with pytest.raises(DiskFull):
        await there.pull("b", f"{site.url}/b")
    assert (Path(lease.path) / "config.json").is_file()
    lease.release()
    await there.pull("b", f"{site.url}/b")
    assert not await here.on_disk(f"{site.url}/a")


@pytest.mark.asyncio
async def test_a_host_that_may_not_be_asked_is_not(new_store):
    store = await new_store(ROOM)
    with pytest.raises(Exception, match="remote_hosts"):
        await store.load("m", "http://8.8.8.8/model")
    assert state(store, "m") == "failed"


# --- from the other workers ------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def new_node(tmp_path):
    """``await new_node()``: the store of another node, with a disk tier and memory of its own, that gives away what it has."""
    stores = []

    async def new(**settings: object) -> CheckpointStore:
        directory = str(tmp_path / f"node-{len(stores)}")
        settings = {"chunk_size": CHUNK, "n_readers": 2, "store_dir": directory, **settings}
        store = CheckpointStore(WorkerSettings.model_validate(settings), PrivatePool(ROOM))
        stores.append(store)
        await store.start()
        await store.serve("127.0.0.1", TOKEN)
        return store

    yield new
    for store in stores:
        await store.close()


@pytest.mark.asyncio
async def test_a_worker_gets_what_another_one_has_in_use_from_its_memory(new_node, models, preads):
    giver, taker = await new_node(), await new_node()
    lease = await giver.load("m", str(models["b"]))
    n_reads = len(preads)
    source = "/elsewhere/b"
    taken = await taker.load("m", source, peers=[giver.data_address])
    assert taken.tier_from == "peer" and taken.tensors["w"].eq(1).all()
    assert len(preads) == n_reads, "it came from memory"
    assert taker.snapshot()["bandwidth"]["peer"]["n_loads"] == 1
    await complete(taker, "m")
    assert (Path(taken.path) / "config.json").read_text() == '{"model_type": "test"}'
    assert read_index(taken.path).fingerprint == read_index(lease.path).fingerprint
    taken.release()
    await taker.evict("m")
    assert (await taker.load("m", source)).tier_from == "disk"


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["loaded", "inspected", "pulled"])
async def test_a_worker_gets_what_another_one_has_on_disk(new_node, models, site, how):
    giver, taker = await new_node(), await new_node()
    source = f"{site.url}/b"
    if how == "loaded":
        (await giver.load("m", source)).release()
        await complete(giver, "m")
        await giver.evict("m")
    elif how == "pulled":
        await giver.pull("m", source)
    else:
        shutil.copytree(models["b"], giver._disk.final(source))
        await giver.inspect("m", source)
    with gone_offline(site):
        before = len(site.data)
        taken = await taker.load("m", source, peers=[giver.data_address])
        assert taken.tier_from == "peer" and taken.tensors["w"].eq(1).all()
        assert len(site.data) == before


@pytest.mark.asyncio
async def test_a_worker_gets_what_is_still_arriving_at_another_one(new_node, models, gate):
    giver, taker = await new_node(), await new_node()
    lease = await giver.load("m", str(models["c"]), whole=False)
    await reached(gate.reached)
    taken = await taker.load("m", "/elsewhere/c", whole=False, peers=[giver.data_address])
    assert not taken.arrivals.has("w") and taken.tier_from == "peer"
    gate.open()
    await asyncio.gather(lease.complete(), taken.complete())
    assert taken.tensors["w"].eq(2).all()


@pytest.mark.asyncio
async def test_a_worker_pulls_the_files_of_another_one(new_node, models):
    giver, taker = await new_node(), await new_node()
    await giver.load("m", str(models["a"]))
    path = await taker.pull("m", "/elsewhere/a", peers=[giver.data_address])
    assert (Path(path) / "model.safetensors").read_bytes() == (models["a"] / "model.safetensors").read_bytes()
    assert (await taker.inspect("m", "/elsewhere/a", peers=[giver.data_address])).path == path


@pytest.mark.asyncio
@pytest.mark.parametrize("compress", ["no", "yes"])
async def test_a_checkpoint_of_our_own_format_comes_from_a_worker_that_has_it_in_use(new_node, tmp_path, write_single, compress):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{i}.w": torch.randn(300, 333, generator=generator).bfloat16() for i in range(12)}
    convert(write_single(tmp_path / "source", tensors), tmp_path / "fast", compress)
    giver, taker = await new_node(), await new_node()
    await giver.load("m", str(tmp_path / "fast"))
    taken = await taker.load("m", "/elsewhere/fast", peers=[giver.data_address])
    assert taken.tier_from == "peer"
    assert all(torch.equal(taken.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.asyncio
async def test_receivers_at_once_form_a_chain_and_the_first_gives_its_bytes_once(new_node, models):
    giver, *takers = [await new_node() for _ in range(4)]
    lease = await giver.load("m", str(models["b"]))
    source = "/elsewhere/b"
    sent = dict.fromkeys((store.data_address for store in (giver, *takers)), 0)
    held = Held()
    for store in (giver, *takers):
        plain = store._sharing.lookup

        def counting(key, store=store, plain=plain):
            served = plain(key)
            if served is not None and not hasattr(served, "counted"):
                served.counted = True
                send_memory = served._send_memory

                def send(wire, file, offset, nbytes, position):
                    held()
                    sent[store.data_address] += nbytes
                    send_memory(wire, file, offset, nbytes, position)

                served._send_memory = send
            return served

        store._sharing._server.lookup = counting
    loads = []
    for number, taker in enumerate(takers, 1):
        loads.append(asyncio.create_task(taker.load("m", source, peers=[giver.data_address])))
        await asyncio.to_thread(eventually, lambda number=number: len(giver._sharing._server.receivers("m")) == number)
    held.open()
    leases = await asyncio.gather(*loads)
    assert all(taken.tier_from == "peer" and taken.tensors["w"].eq(1).all() for taken in leases)
    nbytes = (models["b"] / "model.safetensors").stat().st_size
    assert sent[giver.data_address] <= nbytes, "its link carries the checkpoint once"
    assert all(4 * N <= sent[taker.data_address] <= nbytes for taker in takers[:2])
    assert sent[takers[2].data_address] == 0
    lease.release()


@pytest.mark.asyncio
@pytest.mark.parametrize("whole", [True, False])
async def test_where_the_worker_dies_in_the_middle_the_source_itself_goes_on(new_node, site, whole):
    giver, taker = await new_node(), await new_node()
    source = f"{site.url}/b"
    await giver.load("m", source)
    await complete(giver, "m")
    die = asyncio.Event()
    loop, served = asyncio.get_running_loop(), giver._sharing.lookup("m")
    send_memory, held, n_sent = served._send_memory, Held(), []

    def send(*args):
        n_sent.append(args)
        if len(n_sent) > 10:
            loop.call_soon_threadsafe(die.set)
            held()
        send_memory(*args)

    served._send_memory = send
    before = site.n_data
    loading = asyncio.create_task(taker.load("m", source, whole=whole, peers=[giver.data_address]))
    await die.wait()
    server = giver._sharing._server
    closing = asyncio.create_task(asyncio.to_thread(server.close))
    # Everybody is cut off before anything more is sent.
    await asyncio.to_thread(eventually, lambda: server._listener.fileno() < 0)
    held.open()
    lease = await loading
    await lease.complete()
    await closing
    assert lease.tensors["w"].eq(1).all()
    assert 0 < site.n_data - before < 4 * N, "only what was missing came from there"
    await complete(taker, "m")
    assert weights(lease.path) == weights(site.root / "b")


@pytest.mark.asyncio
async def test_bytes_of_two_versions_are_never_mixed(new_node, site, write_single):
    giver, taker = await new_node(), await new_node()
    source = f"{site.url}/b"
    await giver.load("m", source)
    await complete(giver, "m")
    write_single(site.root / "b", {"w": torch.full((N,), 9.0)})
    os.utime(site.root / "b" / "model.safetensors", (1, 1))
    served = giver._sharing.lookup("m")
    dies_after(served, 10)
    with pytest.raises(SourceUnreachable, match="another version"):
        await taker.load("m", source, peers=[giver.data_address])
    # Without the worker the new one is loaded, all of it.
    assert (await taker.load("m", source)).tensors["w"].eq(9).all()


@pytest.mark.asyncio
async def test_where_there_is_no_source_the_death_of_the_only_worker_is_named(new_node, models):
    giver, taker = await new_node(), await new_node()
    await giver.load("m", str(models["b"]))
    served = giver._sharing.lookup("m")
    dies_after(served, 10)
    address = giver.data_address
    with pytest.raises(SourceUnreachable) as caught:
        await taker.load("m", "/elsewhere/b", peers=[address])
    assert address in caught.value.message
    await until(taker, lambda: used(taker) == 0)
    with pytest.raises((SourceUnreachable, CheckpointNotFound)):
        await taker.load("unknown", "/elsewhere/unknown", peers=[address])
    await giver.close()
    with pytest.raises(SourceUnreachable, match=address):
        await taker.load("m", "/elsewhere/b", peers=[address])


@pytest.mark.asyncio
async def test_who_does_not_know_the_token_gets_nothing(new_node, models):
    giver, taker = await new_node(), await new_node()
    await giver.load("m", str(models["a"]))
    old = giver.data_address
    await giver.serve("127.0.0.1", "another token entirely")
    assert giver.data_address != old
    for address in (old, giver.data_address):
        with pytest.raises(SourceUnreachable):
            await taker.load("m", "/elsewhere/a", peers=[address])
    await taker.serve("127.0.0.1", "another token entirely")
    assert (await taker.load("m", "/elsewhere/a", peers=[giver.data_address])).tensors["w"].eq(0).all()


@pytest.mark.asyncio
async def test_what_has_changed_on_disk_is_given_away_as_it_is_now(new_node, models, write_single):
    giver, *takers = [await new_node() for _ in range(3)]
    await giver.inspect("m", str(models["a"]))
    taken = await takers[0].load("m", "/elsewhere/a", peers=[giver.data_address])
    assert taken.tensors["w"].eq(0).all()
    # Another file in its place: open files would tell of the old one.
    write_single(models["a"].with_name("new"), {"w": torch.full((N,), 5.0)})
    (models["a"].with_name("new") / "model.safetensors").rename(models["a"] / "model.safetensors")
    taken = await takers[1].load("m", "/elsewhere/a", peers=[giver.data_address])
    assert taken.tensors["w"].eq(5).all()


@pytest.mark.asyncio
async def test_a_copy_that_left_the_disk_is_not_given_away_and_its_files_are_not_held_open(new_node, site, n_fds):
    nbytes = (site.root / "a" / "model.safetensors").stat().st_size
    giver, taker = await new_node(disk_quota=int(1.5 * nbytes)), await new_node()
    await giver.pull("a", f"{site.url}/a")
    await taker.inspect("a", f"{site.url}/a", peers=[giver.data_address])
    served = giver._sharing.lookup("a")
    assert len(served._fds) > 1
    assert [path for path in open_files() if str(giver._disk.final(f"{site.url}/a")) in path]
    await giver.pull("b", f"{site.url}/b")
    assert giver._sharing.lookup("a") is None
    assert not [path for path in open_files() if str(giver._disk.root) in path and "deleted" in path]


@pytest.mark.asyncio
async def test_nothing_is_left_open_when_stores_that_give_away_are_closed(new_node, models, n_fds):
    warm = await new_node()
    await warm.load("w", str(models["c"]))
    before = n_fds()
    giver, taker = await new_node(), await new_node()
    lease = await giver.load("m", str(models["a"]))
    await giver.inspect("b", str(models["b"]))
    (await taker.load("m", "/elsewhere/a", peers=[giver.data_address])).release()
    (await taker.load("b", "/elsewhere/b", peers=[giver.data_address])).release()
    await giver.close()
    await taker.close()
    assert lease.tensors["w"].eq(0).all()
    lease.release()
    assert n_fds() <= before
    # One store still lives.
    ours = ("peer-", "read-", "tee-", "cancel-watch")
    eventually(lambda: sum(thread.name.startswith(ours) for thread in threading.enumerate()) == 1)


@pytest.mark.asyncio
async def test_loads_failures_and_closings_at_random_end_and_mix_nothing_up(new_node, site):
    rng = random.Random(0)
    giver, taker = await new_node(), await new_node()
    for i, key in enumerate("abc"):
        if i < 2:
            await giver.pull(key, f"{site.url}/{key}")

    def shaky(*_: object) -> None:
        if rng.random() < 0.02:
            raise ConnectionAbortedError("the line went dead")

    site.on_data = shaky

    async def use(key: str, whole: bool) -> None:
        try:
            peers = [giver.data_address] if rng.random() < 0.7 else []
            with await taker.load(key, f"{site.url}/{key}", whole=whole, peers=peers) as lease:
                if rng.random() < 0.8:
                    await lease.complete()
                    assert lease.tensors["w"].eq("abc".index(key)).all()
        except (LoadFailed, SourceUnreachable):
            pass

    tasks = []
    for _ in range(40):
        match rng.choice(["load", "load", "cancel", "evict", "remove", "pass"]):
            case "load":
                tasks.append(asyncio.create_task(use(rng.choice("abc"), rng.random() < 0.5)))
            case "cancel" if tasks:
                rng.choice(tasks).cancel()
            case "evict":
                await taker.evict(rng.choice("abc"))
            case "remove":
                for path in await asyncio.to_thread(taker._disk.copies):
                    await asyncio.to_thread(taker._disk.quarantine, path.path, "for the test")
            case _:
                await asyncio.sleep(rng.random() / 200)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    unforeseen = [outcome for outcome in outcomes if outcome is not None and not isinstance(outcome, asyncio.CancelledError)]
    assert unforeseen == []
    assert all(entry(taker, key)["leases"] == 0 for key in "abc")
