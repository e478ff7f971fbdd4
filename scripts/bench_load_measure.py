"""What every measurement of ``bench_load.py`` stands on: cold files, backed memory, limits of the machine, statistics.

Nothing here comes from the package that is measured, and nothing imports torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import platform
import random
import re
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 * 1024**2
MIB = 1024**2
#: Threads and bytes per read that the direct-read limit is searched over.
LIMIT_SETTINGS = tuple((n_threads, size * MIB) for n_threads in (2, 4, 8) for size in (2, 8))
N_RESAMPLES = 4000
#: ``MADV_POPULATE_WRITE``, Linux 5.14.
_POPULATE_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

Bytes = NDArray[np.uint8]


class BenchError(Exception):
    """The benchmark cannot go on, in words for its user."""


class WrongBytes(Exception):
    """Somebody gave other bytes, or another token, than the files hold."""


def turns(names: Sequence[str], n_repeats: int, seed: int) -> Iterator[tuple[int, str]]:
    """(repeat, name): each name once per repeat, in an order that is shuffled for each."""
    order, rng = list(names), random.Random(seed)
    for repeat in range(n_repeats):
        rng.shuffle(order)
        yield from ((repeat, name) for name in order)


# --- files: cold, and seen to be ---------------------------------------------------------------------------------------------


def files_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def weights_in(directory: Path) -> list[Path]:
    """The files of `directory` that are not small: its weights."""
    return [path for path in files_in(directory) if path.suffix in (".safetensors", ".bin", ".tensors", ".data")]


def cached_bytes(paths: Iterable[Path]) -> int:
    """Bytes of `paths` that are in the page cache, by ``mincore``."""
    n_pages = 0
    for path in paths:
        nbytes = path.stat().st_size
        if not nbytes:
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        finally:
            os.close(fd)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap", str(path))
        pages = np.zeros(-(-nbytes // PAGE), np.uint8)
        failed = _libc.mincore(address, nbytes, pages.ctypes.data)
        number = ctypes.get_errno()
        _libc.munmap(address, nbytes)
        if failed:
            raise OSError(number, "mincore", str(path))
        n_pages += int((pages & 1).sum())
    return n_pages * PAGE


def make_cold(paths: Sequence[Path]) -> None:
    """Drop `paths` from the page cache and see that they are gone; raises :class:`BenchError` where they stay."""
    for attempt in range(5):
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            try:
                # Pages that wait to be written cannot be dropped.
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        left = cached_bytes(paths)
        if not left:
            return
        # Pages that another processor still has on its way into the lists cannot be dropped at once.
        time.sleep(0.02 * 2**attempt)
    raise BenchError(f"the files of {paths[0].parent} cannot be made cold: {left / 1e6:.1f} MB stay in the page cache")


def make_warm(paths: Sequence[Path]) -> None:
    """Read `paths` into the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(8 * MIB):
                pass


# --- memory ------------------------------------------------------------------------------------------------------------------


@contextmanager
def mapped(nbytes: int) -> Iterator[Bytes]:
    """`nbytes` of private memory on huge pages, every page of it taken already; given back at the end of the block."""
    area = mmap.mmap(-1, nbytes + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        area.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(area, np.uint8)
        start = -whole.ctypes.data % HUGE_PAGE
        memory = whole[start : start + nbytes]
        try:
            area.madvise(_POPULATE_WRITE)
        except OSError:
            memory[::PAGE] = 1
        yield memory
        del memory, whole
    finally:
        # A view that still lives keeps the mapping; it goes with the last of them.
        with suppress(BufferError):
            area.close()


def touch_and_free(nbytes: int) -> float:
    """Take `nbytes` of memory and give it back; returns seconds.

    A virtual machine's host may back its memory when it is first touched, at many times the price of a page fault. After this,
    the kernel's free pages are backed, for whoever comes next.
    """
    started = time.perf_counter()
    with mapped(nbytes):
        pass
    return time.perf_counter() - started


def start_cold(directories: Iterable[Path], nbytes: int) -> float:
    """No byte of any of `directories` in the page cache, up to `nbytes` of free memory backed; returns seconds of the latter."""
    cold = [path for directory in directories for path in files_in(directory)]
    make_cold(cold)
    seconds = touch_and_free(min(nbytes, int(0.7 * available_memory())))
    make_cold(cold)
    return seconds


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    text = Path("/proc/meminfo").read_text()
    (kilobytes,) = re.findall(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(kilobytes) * 1024


# --- limits of the machine ---------------------------------------------------------------------------------------------------


def supports_direct_reads(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        with mapped(HUGE_PAGE) as memory:
            os.preadv(fd, [memory[: 64 * 1024].data], 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def read_directly(paths: Sequence[Path], memory: Bytes, n_threads: int, chunk: int) -> float:
    """Seconds in which `n_threads` threads bring all bytes of `paths` to `memory`, by direct reads of `chunk` bytes.

    No header is parsed, no tensor made: what the disk can do, and no loader can beat with the same bytes.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        pieces, position = [], 0
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            stack.callback(os.close, fd)
            nbytes = os.fstat(fd).st_size
            for offset in range(0, nbytes, chunk):
                size = -(-min(chunk, nbytes - offset) // PAGE) * PAGE
                pieces.append((fd, offset, position, size, min(chunk, nbytes - offset)))
                position += size
        left, lock = iter(pieces), threading.Lock()

        def work(_: int) -> None:
            while True:
                with lock:
                    piece = next(left, None)
                if piece is None:
                    return
                fd, offset, position, size, wanted = piece
                done = 0
                while done < wanted:
                    n = os.preadv(fd, [memory[position + done : position + size].data], offset + done)
                    if n <= 0:
                        raise BenchError("a file ended early: is somebody writing to the work directory?")
                    done += n

        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(work, range(n_threads)))
    return time.perf_counter() - started


def find_limit(directory: Path, n_tries: int, cold: Callable[[], object], on_try: Callable[[str], object]) -> tuple[int, int]:
    """The setting of :data:`LIMIT_SETTINGS` with the smallest median; each try calls `on_try`, with its name, and `cold`."""
    medians = {}
    for n_threads, chunk in LIMIT_SETTINGS:
        times = []
        for _ in range(n_tries):
            on_try(f"{n_threads} threads, {chunk // MIB} MiB")
            times.append(limit_seconds(directory, (n_threads, chunk), cold))
        medians[n_threads, chunk] = statistics.median(times)
    return min(medians, key=lambda setting: medians[setting])


def limit_seconds(directory: Path, setting: tuple[int, int], cold: Callable[[], object]) -> float:
    """One direct read of the weights in `directory`, after `cold` was called."""
    paths = weights_in(directory)
    cold()
    with mapped(sum(path.stat().st_size + PAGE for path in paths)) as memory:
        return read_directly(paths, memory, *setting)


def copy_rate(nbytes: int, n_threads: int) -> float:
    """Bytes per second that `n_threads` copy from memory to memory; the best of five."""
    with mapped(nbytes) as source, mapped(nbytes) as target, ThreadPoolExecutor(n_threads) as pool:
        edges = [nbytes * i // n_threads for i in range(n_threads + 1)]

        def copy(part: int) -> None:
            np.copyto(target[edges[part] : edges[part + 1]], source[edges[part] : edges[part + 1]])

        rates = []
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(copy, range(n_threads)))
            rates.append(nbytes / (time.perf_counter() - started))
        return max(rates)


# --- what the bytes must be --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """A checkpoint as its files say, read without any library: SHA-256 by tensor, bytes, and the sum that touching gives."""

    digests: Mapping[str, str]
    nbytes: int
    touch_sum: int


def page_sum(data: Bytes) -> int:
    """The sum over one byte of each page of `data`, from its first byte on, and its last byte: touches every page."""
    return int(data[::PAGE].sum(dtype=np.int64)) + int(data[-1]) if data.size else 0


def digest(data: Bytes) -> str:
    return hashlib.sha256(data.data).hexdigest()


def read_truth(directory: Path) -> Truth:
    """The truth of the safetensors files in `directory`."""
    digests: dict[str, str] = {}
    nbytes = touch_sum = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path in files_in(directory):
            if path.suffix != ".safetensors":
                continue
            with path.open("rb") as file:
                (n_header,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(n_header))
            data = np.memmap(path, np.uint8, "r", offset=8 + n_header)
            tensors = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items() if name != "__metadata__"}
            digests |= zip(tensors, pool.map(digest, tensors.values()), strict=True)
            nbytes += sum(tensor.size for tensor in tensors.values())
            touch_sum += sum(pool.map(page_sum, tensors.values()))
    return Truth(digests, nbytes, touch_sum)


# --- statistics --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A median and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _resampled(n: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(n, size=(N_RESAMPLES, n))


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """The median of `values`, which are not empty."""
    sample = np.asarray(values)
    medians = np.median(sample[_resampled(len(sample), seed)], axis=1)
    return Estimate(statistics.median(values), *_interval(medians))


def estimate_ratio(values: Sequence[float], base: Sequence[float], seed: int = 0) -> Estimate:
    """The median of `values` over the median of `base`; value i and base i are of the same repeat and are drawn together."""
    above, below = np.asarray(values), np.asarray(base)
    drawn = _resampled(len(above), seed)
    ratios = np.median(above[drawn], axis=1) / np.median(below[drawn], axis=1)
    return Estimate(statistics.median(values) / statistics.median(base), *_interval(ratios))


# --- the machine -------------------------------------------------------------------------------------------------------------


def machine(work_dir: Path, packages: Iterable[str]) -> dict[str, Any]:
    """What a reader needs to know of this machine to judge the figures."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": os.sysconf("SC_PHYS_PAGES") * PAGE,
        "kernel": platform.release(),
        "disk": disk_of(work_dir),
        "transparent_huge_pages": {
            name: _chosen(Path("/sys/kernel/mm/transparent_hugepage") / name) for name in ("enabled", "defrag", "shmem_enabled")
        },
        "python": platform.python_version(),
        "packages": versions,
        "commit": _commit(),
        "load": os.getloadavg(),
    }


def disk_of(directory: Path) -> dict[str, Any]:
    """File system, device and model of the disk under `directory`."""
    fields = ("SOURCE", "FSTYPE", "OPTIONS")
    try:
        found = _output(["findmnt", "--noheadings", "--output", ",".join(fields), "--target", str(directory)]).split(None, 2)
    except OSError:
        return {}
    disk: dict[str, Any] = {name.lower(): value for name, value in zip(fields, found, strict=False)}
    block = Path("/sys/class/block") / Path(disk.get("source", "")).name
    # A partition's queue and model are its disk's.
    for place in (block, block.resolve().parent):
        for name, file in (
            ("model", "device/model"),
            ("rotational", "queue/rotational"),
            ("read_ahead_kb", "queue/read_ahead_kb"),
        ):
            if name not in disk and (place / file).is_file():
                disk[name] = (place / file).read_text().strip()
    return disk


def _chosen(path: Path) -> str | None:
    """The word in brackets of a kernel setting."""
    if not path.is_file():
        return None
    chosen = re.search(r"\[(\S+)\]", path.read_text())
    return chosen[1] if chosen else path.read_text().strip()


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]).strip()
        changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"]).strip()
    except OSError:
        return None
    return commit + ("-dirty" if changed else "") if commit else None


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
