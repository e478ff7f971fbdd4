from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import uuid

import pytest

from sllmdask.loader import keeper
from sllmdask.loader.extents import GRANULE, Extents
from sllmdask.loader.keeper import address_of_pool
from sllmdask.loader.ledger import MAX_MESSAGE, STEP, Job, Ledger, Malformed, Member
from tests.loader.memfd import ended, holders

G = GRANULE


# --- which parts of the file are free --------------------------------------------------------------------------------


def granules(extents):
    return {start // G + i for start, nbytes in extents for i in range(nbytes // G)}


@pytest.mark.parametrize("seed", range(30))
def test_extents_hand_out_what_a_set_of_granules_says_is_free(seed):
    rng = random.Random(seed)
    n = rng.choice([4, 40, 400])
    extents, warm, cold = Extents(n * G), set(), set(range(n))
    held: list[list[tuple[int, int]]] = []
    for _ in range(200):
        free = len(warm) + len(cold)
        choice = rng.random()
        if choice < 0.45 and free:
            wanted = rng.randint(1, min(free, max(1, n // 4)))
            taken = extents.take(wanted * G)
            numbers = granules(taken)
            assert len(numbers) == wanted == sum(size for _, size in taken) // G
            assert numbers <= warm | cold
            # Pages are used again, all but a sixteenth that a place in one piece may cost.
            assert len(numbers & warm) >= min(wanted, len(warm)) - wanted // 16
            assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(taken)), "neighbours are one"
            warm, cold = warm - numbers, cold - numbers
            held.append(taken)
        elif choice < 0.85 and held:
            back = held.pop(rng.randrange(len(held)))
            is_warm = rng.random() < 0.7
            extents.give(back, warm=is_warm)
            (warm if is_warm else cold).update(granules(back))
        else:
            kind, take = (warm, extents.take_warm) if choice < 0.93 else (cold, extents.take_cold)
            piece = take(3 * G)
            assert (piece is None) == (not kind)
            if piece is not None:
                assert piece[1] <= 3 * G and granules([piece]) <= kind
                kind -= granules([piece])
                held.append([piece])
        assert (extents.warm, extents.free) == (len(warm) * G, (len(warm) + len(cold)) * G)


def test_a_place_in_one_piece_is_preferred_and_the_tightest_of_several():
    extents = Extents(100 * G)
    walls = [extents.take(n * G)[0] for n in (10, 1, 4, 1, 5, 1)]
    extents.give([walls[0], walls[2], walls[4]])
    assert extents.take(5 * G) == [walls[4]]
    assert extents.take(4 * G) == [walls[2]]


def test_free_memory_with_pages_is_put_together_from_pieces_rather_than_made_anew():
    extents = Extents(100 * G)
    walls = [extents.take(n * G)[0] for n in (3, 1, 3, 1)]
    extents.give([walls[0], walls[2]])
    assert extents.take(6 * G) == [walls[0], walls[2]]
    assert extents.warm == 0


def test_memory_with_pages_grows_in_place_where_more_is_wanted():
    extents = Extents(100 * G)
    piece = extents.take(8 * G)
    extents.give(piece)
    assert extents.take(12 * G) == [(0, 12 * G)]


# --- who uses what ---------------------------------------------------------------------------------------------------


class Book:
    """A pool without a process: what is said to each member is read from its outbox."""

    def __init__(self, limit: int = 1000 * G) -> None:
        self.pool = Ledger(2 * limit + STEP, limit, clock=lambda: 123.0)
        self.now = 0.0
        self.ids = 0

    def member(self, capacity: int = 10 * G, grace_s: float = 60.0, trim_s: float = 0.0) -> Member:
        member = Member()
        self.say(member, op="hello", capacity=capacity, grace_s=grace_s, trim_s=trim_s)
        return member

    def say(self, member: Member, **message: object) -> None:
        self.pool.handle(member, json.loads(json.dumps(message)), self.now)

    def heard(self, member: Member) -> list[dict]:
        messages = [json.loads(data) for data in member.outbox]
        member.outbox.clear()
        return messages

    def acquire(self, member: Member, key: str, nbytes: int = G, **meta: object) -> dict | None:
        self.ids += 1
        self.say(member, op="acquire", id=self.ids, key=key, nbytes=nbytes, meta=meta)
        answers = self.heard(member)
        return answers[0] if answers else None

    def fill(self, member: Member, key: str, nbytes: int = G, **meta: object) -> dict:
        grant = self.acquire(member, key, nbytes, **meta)
        assert grant["op"] == "granted" and grant["resident"] < nbytes, grant
        self.say(member, op="publish", lease=grant["lease"], meta=meta)
        return grant

    def put(self, member: Member, key: str, nbytes: int = G, **meta: object) -> None:
        self.say(member, op="end", lease=self.fill(member, key, nbytes, **meta)["lease"])

    def work(self) -> list[Job]:
        """Do all jobs that are due."""
        done = []
        while (job := self.pool.next_job(self.now)) is not None:
            done.append(job)
            self.pool.finished(job, done=True, now=self.now)
        return done

    def left(self, key: str) -> int:
        info = self.pool.resident(key)
        return info["resident"] if info else 0


@pytest.fixture
def book():
    return Book()


def test_the_capacity_is_what_the_members_contribute_and_those_who_left_for_a_while(book):
    first, second = book.member(10 * G, grace_s=5.0), book.member(7 * G + 1, grace_s=5.0)
    assert book.pool.capacity == 17 * G
    book.pool.leave(first, 100.0)
    assert (book.pool.capacity, book.pool.present) == (17 * G, 1)
    assert book.pool.wake_at(100.0) == 105.0
    book.pool.wake_at(105.0)
    assert book.pool.capacity == 7 * G
    book.say(second, op="leave")
    assert book.pool.present == 0


def test_a_successor_takes_the_place_of_who_left_and_not_one_beside_it(book):
    book.pool.leave(book.member(10 * G), 0.0)
    book.member(10 * G)
    assert book.pool.capacity == 10 * G


@pytest.mark.parametrize(
    ("shares", "capacity"),
    [((4, 4), 8), ((6, 6), 9), ((6, 6, 6), 9), ((10, 1), 10), ((10, 10), 10), ((20,), 12), ((20, 20), 12)],
)
def test_members_together_take_three_quarters_of_the_memory_and_one_alone_what_it_was_given(shares, capacity):
    book = Book(limit=12 * G)
    for share in shares:
        book.member(share * G)
    assert book.pool.capacity == capacity * G


def test_who_needs_room_makes_the_cheapest_idle_copy_lose_its_end(book):
    member = book.member(10 * G)
    book.put(member, "cheap", 6 * G, reload_s=1.0)
    book.put(member, "dear", 4 * G, reload_s=100.0)
    grant = book.acquire(member, "new", 2 * G)
    assert (book.left("cheap"), book.left("dear")) == (4 * G, 4 * G)
    assert book.pool.used == 10 * G
    book.say(member, op="end", lease=grant["lease"])
    again = book.acquire(member, "cheap", 6 * G)
    assert again["resident"] == 4 * G
    assert sum(size for _, size in again["extents"]) == 6 * G
    assert book.pool.resident("cheap") is None, "it is being filled"


def test_a_refill_that_fails_leaves_what_was_there(book):
    first, second = book.member(10 * G), book.member(0)
    book.put(first, "m", 6 * G)
    book.say(first, op="end", lease=book.acquire(first, "other", 7 * G)["lease"])
    assert book.left("m") == 3 * G
    extents = book.acquire(second, "m", 6 * G)["extents"]
    book.pool.leave(second, 0.0)
    assert (book.left("m"), book.pool.used) == (3 * G, 3 * G)
    again = book.acquire(first, "m", 6 * G)
    assert again["resident"] == 3 * G
    assert granules(again["extents"][:1]) & granules(extents[:1])


def test_a_refused_member_hears_what_there_is(book):
    member = book.member(10 * G)
    pinned = book.fill(member, "pinned", 3 * G)
    book.put(member, "idle", 2 * G)
    refused = book.acquire(member, "large", 8 * G)
    assert (refused["op"], refused["needed"], refused["available"]) == ("refused", 8 * G, 7 * G)
    assert book.left("idle") == 2 * G, "nothing leaves for nothing"
    book.say(member, op="release", lease=pinned["lease"])
    assert book.acquire(member, "large", 8 * G)["op"] == "refused", "it is still looked at"
    book.say(member, op="end", lease=pinned["lease"])
    assert book.acquire(member, "large", 8 * G)["op"] == "granted"


def test_memory_that_is_looked_at_is_not_given_to_who_takes_over(book):
    first, second = book.member(), book.member()
    grant = book.acquire(first, "m", 2 * G)
    assert book.acquire(second, "m", 2 * G) is None
    book.say(first, op="discard", lease=grant["lease"])
    (taken,) = book.heard(second)
    assert not granules(taken["extents"]) & granules(grant["extents"])
    assert book.pool.used == 4 * G
    book.say(first, op="end", lease=grant["lease"])
    assert book.pool.used == 2 * G


def test_of_two_who_wait_one_takes_over_and_the_other_goes_on_waiting(book):
    filler, *waiting = (book.member() for _ in range(3))
    grant = book.acquire(filler, "m")
    assert [book.acquire(each, "m") for each in waiting] == [None, None]
    book.say(filler, op="end", lease=grant["lease"])
    (taken,) = book.heard(waiting[0])
    assert book.heard(waiting[1]) == []
    book.say(waiting[0], op="publish", lease=taken["lease"], meta={"by": "second"})
    (adopted,) = book.heard(waiting[1])
    assert (adopted["resident"], adopted["meta"], adopted["extents"]) == (G, {"by": "second"}, taken["extents"])


def test_a_copy_of_another_size_gives_way_to_the_new_one(book):
    member = book.member()
    old = book.fill(member, "m", G)
    new = book.acquire(member, "m", 2 * G)
    assert new["resident"] == 0
    assert not granules(old["extents"]) & granules(new["extents"])


def test_free_pages_are_kept_for_a_while_and_then_given_back(book):
    member = book.member(10 * G, trim_s=5.0)
    book.put(member, "m", 6 * G)
    book.say(member, op="evict", id=1, key="m")
    assert book.work() == []
    book.now = book.pool.wake_at(0.0)
    assert book.now == 5.0
    jobs = book.work()
    assert sum(job.nbytes for job in jobs) == 6 * G
    assert not any(job.fault for job in jobs)
    assert book.pool.extents.warm == 0


def test_pages_are_made_ahead_as_many_as_are_asked_for_and_there_is_room_for(book):
    member = book.member(30 * G)
    book.say(member, op="prefault", nbytes=20 * G - 1)
    jobs = book.work()
    assert sum(job.nbytes for job in jobs) == 20 * G and all(job.fault and job.nbytes <= STEP for job in jobs)
    grant = book.fill(member, "m", 15 * G)
    assert len(grant["extents"]) == 1
    book.work()
    assert book.pool.extents.warm == 15 * G
    book.say(member, op="prefault", nbytes=0)
    book.work()
    assert book.pool.extents.warm == 0


def test_where_the_machine_has_no_memory_pages_are_asked_for_later(book):
    member = book.member()
    book.say(member, op="prefault", nbytes=G)
    book.pool.finished(book.pool.next_job(0.0), done=False, now=0.0)
    assert book.pool.next_job(0.0) is None
    assert book.pool.next_job(book.pool.wake_at(0.0)) is not None


@pytest.mark.parametrize("seed", range(25))
def test_whatever_members_do_no_byte_is_used_twice_and_none_is_lost(seed):
    rng = random.Random(seed)
    book = Book(limit=60 * G)
    members: list[Member] = []
    #: What each member may look at: by member and lease, (key, granules, filling).
    views: dict[tuple[int, int], tuple[str, set[int], bool]] = {}
    waiting: dict[tuple[int, int], str] = {}

    def hear(member: Member) -> None:
        for message in book.heard(member):
            if message["op"] == "granted":
                key = waiting.pop((id(member), message["id"]))
                filling = message["resident"] < message["nbytes"]
                views[id(member), message["lease"]] = (key, granules(message["extents"]), filling)
            elif message["op"] == "refused":
                del waiting[id(member), message["id"]]

    def check() -> None:
        for member in members:
            hear(member)
        # Ready memory may have several readers of one key; a filler's memory is its own.
        for (one, a), (two, b) in ((x, y) for x in views.items() for y in views.items() if x[0] < y[0]):
            assert not a[1] & b[1] or (a[0] == b[0] and not a[2] and not b[2]), (one, two)
        assert book.pool.used >= G * len(set().union(*(numbers for _, numbers, _ in views.values())))
        transit = book.pool._transit.nbytes if book.pool._transit else 0
        assert book.pool.used + book.pool.extents.free + transit == 2 * 60 * G + STEP

    for step in range(300):
        book.now += rng.random()
        choice = rng.random()
        if not members or (choice < 0.04 and len(members) < 5):
            members.append(book.member(rng.randint(0, 30) * G, grace_s=3.0, trim_s=2.0))
        member = rng.choice(members)
        mine = [lease for owner, lease in views if owner == id(member)]
        if choice < 0.4:
            key = rng.choice("abcdefgh")
            waiting[id(member), step] = key
            nbytes = (ord(key) - ord("a") + 1) * 2 * G - rng.choice([0, 0, 0, 5])
            book.say(member, op="acquire", id=step, key=key, nbytes=nbytes, meta={"reload_s": rng.random()})
        elif choice < 0.75 and mine:
            lease = rng.choice(mine)
            key, numbers, _ = views[id(member), lease]
            op = rng.choice(["publish", "end", "release", "discard", "progress"])
            extra = {"publish": {"meta": {}}, "progress": {"done": 1}}.get(op, {})
            if op == "end":
                del views[id(member), lease]
            elif op == "publish":
                views[id(member), lease] = (key, numbers, False)
            book.say(member, op=op, lease=lease, **extra)
        elif choice < 0.8:
            book.say(member, op="evict", id=0, key=rng.choice("abcdefgh"))
        elif choice < 0.85:
            book.say(member, op="prefault", nbytes=rng.randint(0, 40) * G)
        elif choice < 0.9 and any(owner == id(member) for owner, _ in waiting):
            number = rng.choice([number for owner, number in waiting if owner == id(member)])
            hear(member)
            if waiting.pop((id(member), number), None):
                book.say(member, op="cancel", id=number)
        elif choice < 0.93 and len(members) > 1:
            hear(member)
            book.pool.leave(member, book.now)
            members.remove(member)
            views = {at: view for at, view in views.items() if at[0] != id(member)}
            waiting = {at: key for at, key in waiting.items() if at[0] != id(member)}
        else:
            job = book.pool.next_job(book.now)
            if job is not None:
                check()
                book.pool.finished(job, done=rng.random() < 0.9, now=book.now)
        check()
        while (message := book.pool.merged(member)) is not None:
            assert len(message) <= MAX_MESSAGE

    for member in members:
        book.pool.leave(member, book.now)
    survivors = [key for key in "abcdefgh" if book.left(key)]
    last = book.member(60 * G)
    for key in survivors:
        book.say(last, op="evict", id=0, key=key)
    assert book.pool.used == 0


NONSENSE = [
    {},
    {"op": 7},
    {"op": "hello"},
    {"op": "sing"},
    {"op": "acquire", "id": 1, "key": "k", "nbytes": 0, "meta": {}},
    {"op": "acquire", "id": 1, "key": "k", "nbytes": 2**60, "meta": {}},
    {"op": "acquire", "id": 1, "key": "k", "nbytes": True, "meta": {}},
    {"op": "acquire", "id": 1, "key": "", "nbytes": 1, "meta": {}},
    {"op": "acquire", "id": 1, "key": "k" * 2000, "nbytes": 1, "meta": {}},
    {"op": "acquire", "id": 1, "key": "k", "nbytes": 1, "meta": []},
    {"op": "acquire", "id": 1, "key": "k", "nbytes": 1, "meta": {"long": "x" * 20_000}},
    {"op": "acquire", "id": "1", "key": "k", "nbytes": 1, "meta": {}},
    {"op": "publish", "lease": 1},
    {"op": "publish", "lease": -1, "meta": {}},
    {"op": "progress", "lease": 1, "done": 0.5},
    {"op": "prefault", "nbytes": None},
]


@pytest.mark.parametrize("message", NONSENSE, ids=lambda message: json.dumps(message)[:60])
def test_nonsense_is_refused_and_changes_nothing(book, message):
    member = book.member()
    book.fill(member, "m")
    before = (book.pool.used, book.pool.capacity, book.pool.resident("m"))
    with pytest.raises(Malformed):
        book.say(member, **message)
    assert (book.pool.used, book.pool.capacity, book.pool.resident("m")) == before


def test_another_members_lease_cannot_be_ended(book):
    first, second = book.member(), book.member()
    grant = book.fill(first, "m")
    book.say(second, op="end", lease=grant["lease"])
    assert book.pool.resident("m")["leases"] == 1


def test_strange_costs_of_reading_are_not_believed(book):
    member = book.member(4 * G)
    for key, cost in (("nan", float("nan")), ("text", "9"), ("negative", -1.0)):
        book.put(member, key, G, reload_s=cost)
    assert book.acquire(member, "new", 4 * G)["op"] == "granted"


@pytest.mark.parametrize("advise", [False, True], ids=["plain", "where huge pages are given for the asking"])
def test_pages_are_taken_and_given_back(monkeypatch, advise):
    monkeypatch.setattr(keeper, "_wants_advice", lambda: advise)
    memory = os.memfd_create("test")
    os.ftruncate(memory, 100 * G)
    pager = keeper._Pager(memory)
    assert pager._do(Job(True, 4 * G, 8 * G))
    assert os.fstat(memory).st_blocks * 512 == 8 * G
    assert pager._do(Job(False, 4 * G, 6 * G))
    assert os.fstat(memory).st_blocks * 512 == 2 * G
    monkeypatch.setattr(keeper, "_available_memory", lambda: 0)
    assert not pager._do(Job(True, 4 * G, 8 * G)), "the machine needs its memory for other things"
    os.close(pager.fd)
    os.close(memory)


# --- the process -----------------------------------------------------------------------------------------------------


class Raw:
    """A member that speaks packet by packet, and may say what no member says."""

    def __init__(self, name: str, *, hello: bool = True, grace_s: float = 0.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(20)
        self.memory = -1
        try:
            self.socket.connect(address_of_pool(name, os.getuid()))
        except OSError:
            self.socket.close()
            raise
        if hello:
            self.say(op="hello", capacity=64 * G, grace_s=grace_s, trim_s=0)
            data, fds, _, _ = socket.recv_fds(self.socket, MAX_MESSAGE, 1)
            assert json.loads(data)["op"] == "welcome"
            (self.memory,) = fds

    def say(self, **message: object) -> None:
        self.socket.send(json.dumps(message).encode())

    def hear(self, *ops: str) -> dict:
        """The next message of one of these kinds."""
        while True:
            data = self.socket.recv(MAX_MESSAGE)
            assert data, "hung up"
            message = json.loads(data)
            if message["op"] in ops:
                return message

    def until(self, condition) -> dict:
        while True:
            message = self.hear("resident")
            if condition(message):
                return message

    @property
    def allocated(self) -> int:
        """Bytes of memory behind the pool's file."""
        return os.fstat(self.memory).st_blocks * 512

    def close(self) -> None:
        self.socket.close()
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1


def start(name: str, *options: str) -> None:
    subprocess.run([sys.executable, "-m", "sllmdask.loader.keeper", name, *options], check=True, timeout=30)


@pytest.fixture
def running():
    """``(name, pidfd)`` of a keeper."""
    name = f"test-{uuid.uuid4()}"
    start(name)
    fd = os.pidfd_open(_listening_pid(name))
    yield name, fd
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    os.close(fd)


def _listening_pid(name: str) -> int:
    member = Raw(name, hello=False)
    member.say(op="hello", capacity=0, grace_s=30, trim_s=0)
    pid = member.hear("welcome")["pid"]
    member.close()
    return pid


@pytest.mark.cluster
def test_the_keeper_loads_neither_numpy_nor_torch_nor_asyncio_and_stays_small(running):
    code = "import sys, sllmdask.loader.keeper; print([n for n in ('numpy', 'torch', 'dask', 'asyncio') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    pid = _listening_pid(running[0])
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        rss = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    assert rss < 32 * 1024, f"{rss} KiB"


@pytest.mark.cluster
def test_the_keeper_has_left_its_starters_session_and_directory(running):
    pid = _listening_pid(running[0])
    assert os.getsid(pid) not in (os.getsid(0), 0)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    os.kill(pid, signal.SIGINT)
    Raw(running[0]).close()


@pytest.mark.cluster
def test_a_second_keeper_of_the_name_gives_way(running):
    start(running[0])
    assert not ended(running[1], 0)


@pytest.mark.cluster
def test_the_keeper_ends_when_its_last_member_has_gone_and_the_memory_with_it(running):
    name, pidfd = running
    first, second = Raw(name), Raw(name)
    inode = os.fstat(first.memory).st_ino
    first.close()
    second.say(op="prefault", nbytes=8 * G)
    second.until(lambda message: message["warm"] == 8 * G)
    assert second.allocated == 8 * G
    assert not ended(pidfd, 0)
    second.close()
    assert ended(pidfd)
    with pytest.raises(ConnectionRefusedError):
        Raw(name)
    assert not holders(inode)


@pytest.mark.cluster
def test_evicted_memory_goes_back_to_the_system(running):
    member = Raw(running[0])
    member.say(op="acquire", id=1, key="m", nbytes=40 * G, meta={})
    grant = member.hear("granted")
    for offset, nbytes in grant["extents"]:
        os.posix_fallocate(member.memory, offset, nbytes)
    assert member.allocated == 40 * G
    member.say(op="publish", lease=grant["lease"], meta={})
    member.say(op="end", lease=grant["lease"])
    member.say(op="evict", id=2, key="m")
    member.until(lambda message: message["used"] == 0 and message["warm"] == 0)
    assert member.allocated == 0
    member.close()


@pytest.mark.cluster
@pytest.mark.parametrize(
    "packet",
    [
        b"\xff\xfe",
        b"[]",
        b"[" * 60_000,
        b"9" * 60_000,
        b" " * (MAX_MESSAGE + 1),
        b'{"op":"acquire","id":NaN}',
        b'{"op":"end","lease":99999999999999999999}',
    ],
    ids=range(7),
)
def test_a_member_that_talks_nonsense_is_told_so_and_loses_no_memory_before_it_hangs_up(running, packet):
    name, pidfd = running
    good, bad = Raw(name), Raw(name)
    bad.say(op="acquire", id=1, key="m", nbytes=G, meta={})
    grant = bad.hear("granted")
    bad.say(op="publish", lease=grant["lease"], meta={})
    good.until(lambda message: message["keys"].get("m"))
    bad.socket.send(packet)
    assert bad.hear("malformed")["reason"]
    good.say(op="evict", id=1, key="m")
    assert not good.hear("evicted")["done"], "its process may still look at it"
    bad.close()
    good.until(lambda message: message["keys"].get("m") and not message["keys"]["m"]["leases"])
    good.say(op="evict", id=2, key="m")
    assert good.hear("evicted")["done"]
    assert not ended(pidfd, 0)
    good.close()


@pytest.mark.cluster
def test_a_member_that_does_not_read_holds_nobody_up_and_what_it_missed_is_merged(running):
    name, pidfd = running
    deaf, good = Raw(name), Raw(name)
    deaf.socket.setblocking(False)
    pid = _listening_pid(name)

    def rss() -> int:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    before, n_sent = rss(), 0
    try:
        while n_sent < 50_000:
            deaf.say(op="evict", id=n_sent, key="x" * 1000)
            n_sent += 1
    except BlockingIOError:
        pass
    assert n_sent < 50_000, "it is not read from any more"
    for number in range(300):
        good.say(op="acquire", id=number, key="m", nbytes=G, meta={"round": number})
        grant = good.hear("granted")
        good.say(op="publish", lease=grant["lease"], meta={"round": number})
        good.say(op="end", lease=grant["lease"])
        good.say(op="evict", id=number, key="m")
        assert good.hear("evicted")["done"]
    assert rss() - before < 16 * 1024**2
    deaf.socket.settimeout(20)
    answered = [deaf.hear("evicted")["id"] for _ in range(n_sent)]
    assert answered == list(range(n_sent))
    assert not ended(pidfd, 0)
    deaf.close()
    good.close()


@pytest.mark.cluster
def test_a_connection_that_only_closed_its_sending_side_still_looks_at_its_memory(running):
    half, good = Raw(running[0]), Raw(running[0])
    half.say(op="acquire", id=1, key="m", nbytes=G, meta={})
    half.say(op="publish", lease=half.hear("granted")["lease"], meta={})
    good.until(lambda message: message["keys"].get("m"))
    half.socket.shutdown(socket.SHUT_WR)
    good.say(op="evict", id=1, key="m")
    assert not good.hear("evicted")["done"]
    half.close()
    good.until(lambda message: message["keys"].get("m") and not message["keys"]["m"]["leases"])
    good.close()


@pytest.mark.cluster
def test_what_a_member_said_before_it_was_killed_is_heard(running):
    name, _ = running
    good = Raw(name)
    code = f"""
import os, signal, sys
from tests.loader.test_keeper import Raw
member = Raw({name!r})
member.say(op="acquire", id=1, key="m", nbytes=1, meta={{}})
lease = member.hear("granted")["lease"]
for number in range(50):
    member.say(op="evict", id=number, key="nothing")
member.say(op="publish", lease=lease, meta={{"last": "word"}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -signal.SIGKILL
    message = good.until(lambda message: message["keys"].get("m") and not message["keys"]["m"]["leases"])
    assert message["keys"]["m"]["meta"] == {"last": "word"}
    good.close()


@pytest.mark.cluster
def test_a_log_is_written_only_where_one_is_asked_for(tmp_path):
    name = f"test-{uuid.uuid4()}"
    start(name, "--log", str(tmp_path / "keeper.log"))
    fd = os.pidfd_open(_listening_pid(name))
    member = Raw(name)
    member.socket.send(b"nonsense")
    member.hear("malformed")
    member.close()
    assert ended(fd)
    os.close(fd)
    assert "malformed" in (tmp_path / "keeper.log").read_text()


def test_a_keeper_that_cannot_listen_says_why(capsys):
    assert keeper.main(["x" * 200]) == 1
    assert "too long" in capsys.readouterr().err
