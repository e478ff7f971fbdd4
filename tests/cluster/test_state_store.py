"""What a scheduler keeps for the next one, also when it is killed while it writes."""

import asyncio
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from sllmdask.cluster.state_store import SCHEMA, StateStore, StoredDeployment, default_path
from sllmdask.errors import ConfigError, StateUnwritable

A = StoredDeployment("a", {"model": "a", "backend_config": {"lora_adapters": {"x": "/x"}}}, {"revision": 7, "nbytes": 10})
B = StoredDeployment("team/b", {"model": "team/b"}, {"revision": 8})


def reopened(path):
    """What another scheduler finds."""
    store = StateStore.open(path)
    asyncio.run(store.close())
    return store.found


def written(path, *changes):
    """Open, make the changes, close."""

    async def run():
        store = StateStore.open(path)
        try:
            for change in changes:
                await change(store)
        finally:
            await store.close()

    asyncio.run(run())


def test_deployments_pins_and_workers_return_and_what_was_deleted_does_not(tmp_path):
    path = tmp_path / "deep" / "state.sqlite"
    written(
        path,
        lambda store: store.put(B),
        lambda store: store.put(StoredDeployment("a", {"model": "a"}, {})),
        lambda store: store.put(A),
        lambda store: store.pin("a", {"0", "1"}),
        lambda store: store.pin("team/b", {"0"}),
        lambda store: store.pin("a", {"1"}),
        lambda store: store.worker_joined("0"),
        lambda store: store.worker_joined("1"),
        lambda store: store.worker_left("0"),
    )
    found = reopened(path)
    assert {each.model: each for each in found.deployments} == {"a": A, "team/b": B}
    assert (found.pins, found.workers) == ({"a": {"1"}, "team/b": {"0"}}, {"1"})
    written(path, lambda store: store.delete("team/b"))
    found = reopened(path)
    assert (found.deployments, found.pins) == ((A,), {"a": {"1"}})


def test_each_start_is_a_new_generation(tmp_path):
    path = tmp_path / "state.sqlite"
    assert [reopened(path).generation for _ in range(3)] == [1, 2, 3]


def test_a_second_scheduler_on_one_file_is_refused_until_the_first_has_ended(tmp_path):
    path = tmp_path / "state.sqlite"
    first = StateStore.open(path)
    with pytest.raises(ConfigError, match="in use by another scheduler"):
        StateStore.open(path, lock_s=0)
    asyncio.run(first.close())
    assert reopened(path).generation == 2


def damaged(path):
    written(path, lambda store: store.put(A))
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)


def text(path):
    path.write_text("deployments: all of them\n" * 100)


def newer(path):
    written(path, lambda store: store.put(A))
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    connection.close()


def foreign(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()


@pytest.mark.parametrize(
    ("make", "told"),
    [(damaged, "damaged"), (text, "no file of ours"), (newer, "newer sllmdask"), (foreign, "another program")],
    ids=["damaged", "text", "newer", "foreign"],
)
def test_a_file_that_cannot_be_used_is_named_and_left_as_it_is(tmp_path, make, told):
    path = tmp_path / "state.sqlite"
    make(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=told) as error:
        StateStore.open(path)
    assert str(path) in error.value.message
    assert path.read_bytes() == before


def test_a_place_where_no_file_can_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use"):
        StateStore.open(tmp_path / "file" / "state.sqlite")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot use"):
        StateStore.open(tmp_path / "folder")


def test_what_cannot_be_written_is_told_and_the_rest_stays(tmp_path):
    async def run():
        store = StateStore.open(tmp_path / "state.sqlite")
        await store.put(A)
        store._connection.execute("PRAGMA query_only = ON")
        with pytest.raises(StateUnwritable, match=r"state\.sqlite"):
            await store.put(B)
        store._connection.execute("PRAGMA query_only = OFF")
        await store.put(B)
        await store.close()

    asyncio.run(run())
    assert [each.model for each in reopened(tmp_path / "state.sqlite").deployments] == ["a", "team/b"]


def test_a_file_that_is_moved_or_deleted_while_it_is_in_use_is_written_again_where_it_was(tmp_path):
    path = tmp_path / "state" / "state.sqlite"

    async def run():
        store = StateStore.open(path)
        await store.put(A)
        path.parent.rename(tmp_path / "moved")
        await store.put(B)
        path.unlink()
        await store.pin("a", {"1"})
        shutil.rmtree(path.parent)
        await store.worker_joined("0")
        with pytest.raises(ConfigError, match="in use by another scheduler"):
            StateStore.open(path, lock_s=0)
        await store.close()

    asyncio.run(run())
    found = reopened(path)
    assert (found.generation, [each.model for each in found.deployments]) == (2, ["a", "team/b"])
    assert (found.pins, found.workers) == ({"a": {"1"}}, {"0"})
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_of_somebody_else_that_is_in_its_place_now_is_left_alone(tmp_path):
    path, aside = tmp_path / "state.sqlite", tmp_path / "aside.sqlite"

    async def run():
        store = StateStore.open(path)
        path.rename(aside)
        written(path, lambda other: other.put(B))
        with pytest.raises(StateUnwritable, match="another one is in its place"):
            await store.put(A)
        path.rename(tmp_path / "other.sqlite")
        await store.put(A)
        await store.close()

    def written(path, change):
        async def write():
            other = StateStore.open(path)
            await change(other)
            await other.close()

        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, write()).result()

    asyncio.run(run())
    assert [each.model for each in reopened(path).deployments] == ["a"]
    assert [each.model for each in reopened(tmp_path / "other.sqlite").deployments] == ["team/b"]


def test_a_directory_that_a_file_has_taken_the_place_of_is_told(tmp_path):
    path = tmp_path / "state" / "state.sqlite"

    async def run():
        store = StateStore.open(path)
        path.parent.rename(tmp_path / "moved")
        path.parent.write_text("")
        with pytest.raises(StateUnwritable, match=r"cannot write its state to .*state\.sqlite"):
            await store.put(A)
        path.parent.unlink()
        await store.put(A)
        await store.close()

    asyncio.run(run())
    assert [each.model for each in reopened(path).deployments] == ["a"]


WRITER = """
import asyncio, sys
from pathlib import Path
from sllmdask.cluster.state_store import StateStore, StoredDeployment

async def main():
    store = StateStore.open(Path(sys.argv[1]))
    for n in range(10_000):
        # Two statements of one transaction: whoever reads sees both, or none.
        await store.put(StoredDeployment("a", {"n": n, "filling": "x" * 20_000}, {"n": n}))
        await store.pin("a", {f"{n}-0", f"{n}-1"})
        print(n, flush=True)

asyncio.run(main())
"""


def test_a_scheduler_that_is_killed_while_it_writes_has_kept_all_that_it_answered_and_no_half(tmp_path):
    path = tmp_path / "state.sqlite"
    for n_answers in (3, 17, 40):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            for line in writer.stdout:
                answered = int(line)
                if answered == n_answers:
                    writer.send_signal(signal.SIGKILL)
                    break
            answered = max([answered, *(int(line) for line in writer.stdout.read().split())])
        found = reopened(path)
        (kept,) = found.deployments
        assert kept.given["n"] == kept.facts["n"] >= answered
        assert len(kept.given["filling"]) == 20_000
        first, second = sorted(found.pins["a"])
        assert (first.split("-")[1], second.split("-")[1]) == ("0", "1")
        assert first.split("-")[0] == second.split("-")[0]
        assert answered <= int(first.split("-")[0]) <= kept.given["n"]


def test_the_file_is_that_of_the_port_in_the_users_state_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_path(8786) == tmp_path / "sllmdask" / "scheduler-8786.sqlite"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path(1) == tmp_path / ".local" / "state" / "sllmdask" / "scheduler-1.sqlite"


def test_what_is_stored_is_plain_json(tmp_path):
    path = tmp_path / "state.sqlite"
    written(path, lambda store: store.put(A))
    connection = sqlite3.connect(path)
    ((given,),) = connection.execute("SELECT given FROM deployments")
    connection.close()
    assert json.loads(given) == A.given
