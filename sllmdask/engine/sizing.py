"""How much memory there is, and how much of it an instance takes for KV and for its steps.

Source of sizing the KV cache by what weights and a step leave of the device: vLLM (SOSP '23), section 4 and its
``gpu_memory_utilization``.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from sllmdask.batching.blocks import blocks_for
from sllmdask.batching.memory import MemoryLedger
from sllmdask.engine.logprobs import rows_at_once

#: Of the memory that a worker may have by its limits: at least this part is for its instances, however much its pool may take.
_LEAST_PART = 10
#: Copies of a step's logits in float32 that sampling makes: converted, filtered, and what is drawn from.
_N_LOGITS = 3
#: Tokens of a window that a cache which is sized by itself holds in any case, or the instance does not start.
_LEAST_WINDOW = 8192
#: Bytes that count for a limit although they are given back at once when somebody needs them, by the version of cgroups.
_RECLAIMABLE = {1: "total_inactive_file", 2: "inactive_file"}


# --- what there is ---------------------------------------------------------------------------------------------------


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a device; a CPU's are the host's, and its total is what is free now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    free = available_memory()
    return free, free


def worker_capacity(device: torch.device, fraction: float, host_limit: int, host_pool: int) -> int:
    """Bytes that the instances of a worker may take on `device` beside the checkpoints in host memory.

    `fraction` of a GPU. On a CPU the same part of `host_limit`, less the `host_pool` bytes that checkpoints may take and what the
    process has taken by now; at least a tenth of that part, since a pool need not be full.
    """
    if device.type == "cuda":
        return int(fraction * device_memory(device)[1])
    part = int(fraction * host_limit)
    return max(part - host_pool - private_memory(), part // _LEAST_PART)


def own_ledger(device: torch.device, fraction: float = 0.9) -> MemoryLedger:
    """The ledger of an engine that is alone in its process: `fraction` of what is free on `device`."""
    return MemoryLedger(int(fraction * device_memory(device)[0]))


def private_memory() -> int:
    """Bytes that this process has to itself."""
    return _status("RssAnon")


def available_memory() -> int:
    """Bytes that this process could still take without swapping: of the host, of its cgroups, and by its own limits."""
    return max(0, min(_host_available(), *_cgroup_available(), *_rlimit_available()))


def _host_available() -> int:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_available(root: Path = Path("/")) -> Iterator[int]:
    """What each memory limit that this process is under leaves, whether its cgroups are of version 1 or 2."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                top, version, names = root / "sys/fs/cgroup", 2, ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                top, version, names = root / "sys/fs/cgroup/memory", 1, ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            here = top / path.lstrip("/")
            for group in (here, *here.parents):
                # Inside a container the own group is often the root of what can be seen, whatever its path says.
                with suppress(OSError, ValueError):
                    limit, used = (int((group / name).read_text(encoding="ascii")) for name in names)
                    stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
                    yield limit - used + int(stat.get(_RECLAIMABLE[version], 0))
                if group == top:
                    break


def _rlimit_available() -> Iterator[int]:
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - _status(name)


def _status(name: str) -> int:
    """A size in ``/proc/self/status``, in bytes; 0 where there is no such thing."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
    return 0


# --- what an instance takes ------------------------------------------------------------------------------------------


def least_window(max_model_len: int) -> int:
    """Tokens of one request that a cache holds at least which is sized by itself; longer windows are as long as memory allows."""
    return min(max_model_len, _LEAST_WINDOW)


def kv_blocks(
    *, bytes_per_block: int, block_size: int, max_model_len: int, max_running: int, fair_nbytes: int, free_nbytes: int
) -> int:
    """Blocks of a KV cache that is sized by itself; 0 if not even one request of :func:`least_window` tokens would fit.

    No more than `max_running` requests of `max_model_len` tokens can use. Of memory, what `fair_nbytes` hold; where that is less
    than the least window needs, as much as that one needs, if it is in `free_nbytes`. One block belongs to nobody, and is counted
    with their bytes, see :class:`~sllmdask.batching.blocks.BlockPool`.
    """
    least = blocks_for(least_window(max_model_len), block_size)
    n_fair, n_free = (nbytes // bytes_per_block - 1 for nbytes in (fair_nbytes, free_nbytes))
    if n_free < least:
        return 0
    return min(max(n_fair, least), n_free, max_running * blocks_for(max_model_len, block_size))


def activation_nbytes(
    layers: Iterable[torch.nn.Module], *, n_tokens: int, n_logits: int, vocab_size: int, itemsize: int, n_experts: int = 1
) -> int:
    """Bytes that one step of `n_tokens` tokens makes and drops, at most, by the shapes of `layers`; an estimate.

    In the widest layer, what every matrix gives is there at once, twice: as it is and as it goes on. Then the logits: of
    `n_logits` sequences, and of the tokens of prompts whose log probabilities are told; none without a vocabulary. `n_experts`:
    how many experts compute each token.
    """
    widest = 0
    for layer in layers:
        shapes = [parameter.shape for parameter in layer.parameters() if parameter.dim() >= 2]
        widest = max(widest, sum(max(shape[-2:]) * (n_experts if len(shape) > 2 else 1) for shape in shapes))
    in_layer = 2 * widest * n_tokens * itemsize
    sampled = n_logits * vocab_size * (itemsize + 4 * _N_LOGITS)
    told = min(rows_at_once(vocab_size), n_tokens) * vocab_size * (itemsize + 4) if vocab_size else 0
    return in_layer + sampled + told
