"""The books of what instances hold, against a model of them; and how much memory there is, and what of it a KV cache takes."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sllmdask.batching.memory import Kind, MemoryLedger
from sllmdask.engine import sizing
from sllmdask.engine.sizing import activation_nbytes, available_memory, kv_blocks, worker_capacity
from sllmdask.errors import InsufficientMemory

MiB, GiB = 1024**2, 1024**3

# --- the books -------------------------------------------------------------------------------------------------------

_HOLDERS = ("a", "b", "c")
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["offer", "reserve", "take", "release", "move", "clear", "close"]),
        st.sampled_from(_HOLDERS),
        st.sampled_from(list(Kind)),
        st.sampled_from(list(Kind)),
        st.integers(0, 60),
    ),
    max_size=60,
)


@given(steps=_STEPS, capacity=st.integers(0, 150))
def test_whatever_is_asked_for_the_sum_of_the_parts_is_the_whole_and_fits(
    steps: list[tuple[str, str, Kind, Kind, int]], capacity: int
):
    ledger = MemoryLedger(capacity, 2)
    accounts = {holder: ledger.account(holder) for holder in _HOLDERS}
    truth: dict[str, dict[Kind, int]] = {holder: dict.fromkeys(Kind, 0) for holder in _HOLDERS}
    gone: set[str] = set()
    n_taken = 0
    for what, holder, kind, other, nbytes in steps:
        account, mine = accounts[holder], truth[holder]
        free = max(0, capacity - sum(sum(each.values()) for each in truth.values()))
        fits = nbytes <= free and holder not in gone
        match what:
            case "offer":
                assert account.offer(kind, nbytes) is fits
                mine[kind] += nbytes * fits
            case "reserve" if fits:
                account.reserve(kind, nbytes)
                mine[kind] += nbytes
            case "reserve":
                with pytest.raises(InsufficientMemory) as refused:
                    account.reserve(kind, nbytes)
                assert (refused.value.needed, refused.value.available) == (nbytes, free)
            case "take":
                account.take(kind, nbytes)
                mine[kind] += 0 if holder in gone else nbytes
                n_taken += nbytes
            case "release":
                account.release(kind, min(nbytes, mine[kind]))
                mine[kind] -= min(nbytes, mine[kind])
            case "move":
                moved = min(nbytes, mine[kind])
                account.move(kind, other, moved)
                mine[kind] -= moved
                mine[other] += moved
            case "clear":
                account.clear(kind)
                mine[kind] = 0
            case "close":
                account.close()
                gone.add(holder)
                truth[holder] = dict.fromkeys(Kind, 0)
        assert {holder: account.snapshot() for holder, account in accounts.items()} == {
            holder: {str(kind): n for kind, n in held.items() if n} for holder, held in truth.items()
        }
        total = sum(sum(held.values()) for held in truth.values())
        assert ledger.snapshot() == {"used": total, "capacity": capacity}
        assert total == sum(account.used for account in accounts.values()) <= capacity + n_taken
        assert ledger.free == max(0, capacity - total)
        assert accounts[holder].fair == max(0, min(capacity // 2 - accounts[holder].used, ledger.free))


def test_what_several_threads_take_at_once_never_exceeds_what_there_is():
    ledger = MemoryLedger(1000)
    begin = threading.Barrier(4)
    got: list[int] = []

    def take(holder: str) -> None:
        account = ledger.account(holder)
        begin.wait(10)
        got.append(sum(account.offer(Kind.PACKED, 3) for _ in range(200)))

    threads = [threading.Thread(target=take, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sum(got) == 1000 // 3
    assert ledger.used == 999


def test_a_holder_may_come_again_once_its_account_is_closed():
    ledger = MemoryLedger(10)
    first = ledger.account("a", "llama")
    first.reserve(Kind.KV, 10)
    first.close()
    second = ledger.account("a")
    second.reserve(Kind.KV, 10)
    first.close()
    first.release(Kind.KV, 5)
    assert ledger.used == 10


def test_a_refusal_names_the_model_and_both_numbers():
    ledger = MemoryLedger(3 * GiB)
    ledger.account("x").reserve(Kind.WEIGHTS, GiB)
    with pytest.raises(InsufficientMemory) as refused:
        ledger.account("llama/1", "llama").reserve(Kind.KV, 4 * GiB, "Buy some.")
    assert refused.value.message == "Model 'llama' needs 4.0 GiB of memory, but a worker has 2.0 GiB. Buy some."


# --- how large a cache is --------------------------------------------------------------------------------------------


@given(
    bytes_per_block=st.integers(1, 1000),
    block_size=st.integers(1, 32),
    max_model_len=st.integers(1, 500) | st.integers(8000, 20_000),
    max_running=st.integers(1, 8),
    fair=st.integers(-1000, 200_000),
    free=st.integers(0, 200_000),
)
def test_a_cache_holds_one_request_up_to_a_length_and_no_more_than_can_be_used_and_fits(
    bytes_per_block: int, block_size: int, max_model_len: int, max_running: int, fair: int, free: int
):
    n_blocks = kv_blocks(
        bytes_per_block=bytes_per_block,
        block_size=block_size,
        max_model_len=max_model_len,
        max_running=max_running,
        fair_nbytes=fair,
        free_nbytes=free,
    )

    def holds(n: int, length: int, nbytes: int) -> bool:
        return n * block_size >= length and (n + 1) * bytes_per_block <= nbytes

    sure = min(max_model_len, 8192)
    one, longest = -(-sure // block_size), -(-max_model_len // block_size)
    if n_blocks == 0:
        assert not holds(one, sure, free)
        return
    assert holds(n_blocks, sure, free)
    assert n_blocks <= max_running * longest
    # One more would be of no use, or not in its share, or not in what there is.
    more = (n_blocks + 2) * bytes_per_block
    assert n_blocks == max_running * longest or more > fair or more > free
    assert n_blocks == one or (n_blocks + 1) * bytes_per_block <= fair


def test_what_a_step_makes_grows_with_its_tokens_and_the_widest_layer():
    narrow, wide = (
        torch.nn.Linear(8, 16),
        torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 8), torch.nn.LayerNorm(8)),
    )
    sizes = [
        activation_nbytes(layers, n_tokens=n, n_logits=0, vocab_size=0, itemsize=4)
        for layers in ([narrow], [narrow, wide], [wide, narrow])
        for n in (10, 100)
    ]
    assert sizes == [2 * 16 * 10 * 4, 2 * 16 * 100 * 4, *([2 * 64 * 10 * 4, 2 * 64 * 100 * 4] * 2)]
    assert activation_nbytes([narrow], n_tokens=1, n_logits=4, vocab_size=1000, itemsize=2) == 2 * 16 * 2 + 4000 * 14 + 1000 * 6


# --- what there is ---------------------------------------------------------------------------------------------------


def a_cgroup(root: Path, path: str, limit: str, used: int, reclaimable: int, version: int = 2) -> None:
    directory = root / "sys/fs/cgroup" / ("" if version == 2 else "memory") / path
    directory.mkdir(parents=True, exist_ok=True)
    limit_name, used_name, stat_name = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    (directory / limit_name).write_text(f"{limit}\n")
    (directory / used_name).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{stat_name} {reclaimable}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_its_cgroups_leave_page_cache_included(tmp_path: Path, version: int):
    line = "0::/pod/mine\n" if version == 2 else "3:cpu:/x\n9:memory,pids:/pod/mine\n"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line)
    assert list(sizing._cgroup_available(tmp_path)) == []
    a_cgroup(tmp_path, "pod", "1000", 900, 50, version)
    a_cgroup(tmp_path, "pod/mine", "max" if version == 2 else str(2**63 - 4096), 700, 50, version)
    assert min(sizing._cgroup_available(tmp_path)) == 150
    a_cgroup(tmp_path, "pod/mine", "800", 700, 0, version)
    assert min(sizing._cgroup_available(tmp_path)) == 100


def test_a_limit_of_the_process_counts(monkeypatch: pytest.MonkeyPatch):
    assert 0 < available_memory() < 2**50
    limits = {resource.RLIMIT_AS: sizing._status("VmSize") + 64 * MiB}
    monkeypatch.setattr(sizing.resource, "getrlimit", lambda which: (limits.get(which, resource.RLIM_INFINITY), 0))
    assert 60 * MiB <= available_memory() <= 64 * MiB


def test_instances_get_the_part_of_the_host_that_checkpoints_and_the_process_leave(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sizing, "private_memory", lambda: GiB // 2)
    cpu = torch.device("cpu")
    assert worker_capacity(cpu, 0.5, 20 * GiB, 4 * GiB) == 5.5 * GiB
    # A pool need not be full: there is something left whatever it may take.
    assert worker_capacity(cpu, 0.5, 20 * GiB, 19 * GiB) == GiB


def test_instances_get_their_fraction_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * GiB, 80 * GiB))
    gpu = torch.device("cuda", 0)
    assert worker_capacity(gpu, 0.75, 10 * GiB, 9 * GiB) == 60 * GiB
    assert sizing.device_memory(gpu) == (3 * GiB, 80 * GiB)
