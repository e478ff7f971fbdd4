"""The weights of a model on a device: one allocation, filled in large copies behind the reader.

Host memory is page-locked, so that a copy runs by DMA and beside the reads: while one chunk goes to the device, the next ones
come from the disk. Each thread has a queue of copies of its own (a CUDA stream). Two ways lead here: the copy follows a
checkpoint that arrives in host memory and stays there, or is there already (:func:`copy_behind`); or a checkpoint goes through a
few chunks of host memory, however large it is (:func:`stream_through`).

On the device only tensors are kept, not the headers and paddings of files, and each begins where the widest loads of a kernel
may: a copy can put its bytes anywhere, so nothing is moved afterwards.

Source of the pipeline: ServerlessLLM (OSDI '24), section 4 (pinned pool, one allocation per device, overlapped stages).
"""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from sllmdask.errors import Cancelled, ConfigError, InsufficientMemory
from sllmdask.loader import libc
from sllmdask.loader.arrivals import Arrivals
from sllmdask.loader.buffers import Buffer, address_of
from sllmdask.loader.fast_format import ALIGNMENT
from sllmdask.loader.format import CheckpointIndex, read_index
from sllmdask.loader.plan import BLOCK, ReadPlan, plan_reads, round_up
from sllmdask.loader.reader import ChunkSource, Outlet, Tee, read_chunks
from sllmdask.loader.tiers import StateDict, device_views

#: (bytes so far, bytes in all): never backwards, and equal at the end.
Progress = Callable[[int, int], None]

#: Bytes. Host memory is locked in pieces that end at multiples of it, and no copy crosses one: CUDA refuses a copy from memory
#: that was locked in two pieces, or of which only a part is locked. Enough to fill a bus, and to be told often how far it is.
STEP = 64 * 1024**2
#: Copies that are begun before the first of them is waited for: the bus always has the next one.
QUEUED = 2
#: Bytes. Where every tensor begins on a device: CUDA's vector loads and matrix products want 16.
LEAST_ALIGNMENT = 16
#: Bytes of one read of safetensors.
CHUNK = 4 * 1024**2
#: Seconds after which a load that waits for the ring looks whether it was called off.
_PATIENCE_S = 0.05
#: Locked for every GPU of the process (cudaHostRegisterPortable).
_PORTABLE = 1


class Lane(Protocol):
    """One thread's queue of copies to a device's memory; a context manager, behind which none of them runs any more.

    A copy may run at any time until :meth:`wait` has returned, so its source must stay as it is. What it fails of is raised by
    any later call.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Begin to copy `nbytes` at host address `source` to byte `target` of the memory."""

    def mark(self) -> object:
        """This point of the queue, for :meth:`wait`."""

    def wait(self, mark: object) -> None:
        """Return when every copy begun before `mark` is done."""


class Device(Protocol):
    """A place for weights beside host memory. All methods belong to any thread."""

    def allocate(self, model: str, nbytes: int) -> Tensor:
        """uint8 of shape ``(nbytes,)``, contents undefined; given back when nothing refers to it.

        Raises :class:`InsufficientMemory`.
        """

    def lane(self, memory: Tensor) -> Lane:
        """A queue of copies into `memory`, for the thread that asks."""

    def pin(self, address: int, nbytes: int) -> bool:
        """Lock host memory so that copies from it run by DMA; false where the system refuses: they work, more slowly."""

    def unpin(self, address: int) -> None:
        """Undo a :meth:`pin` that began at `address`, before the pages there are unmapped, moved or given back."""


# --- CUDA ------------------------------------------------------------------------------------------------------------


class _CudaLane:
    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._stream = torch.cuda.Stream(memory.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.synchronize()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        host = torch.frombuffer(libc.memory_view(source, nbytes), dtype=torch.uint8)
        with torch.cuda.stream(self._stream):
            self._memory[target : target + nbytes].copy_(host, non_blocking=True)

    def mark(self) -> object:
        return self._stream.record_event()

    def wait(self, mark: object) -> None:
        assert isinstance(mark, torch.cuda.Event)
        mark.synchronize()


class CudaDevice:
    """One GPU, as torch names it. Raises :class:`ConfigError` if torch sees none of that name."""

    def __init__(self, device: str | int | torch.device = "cuda:0") -> None:
        name = f"cuda:{device}" if isinstance(device, int) else str(device)
        try:
            wanted = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"torch knows no device {name!r}: {str(error).splitlines()[0]}", "device") from None
        if wanted.type != "cuda":
            raise ConfigError(f"device {name!r} is not a GPU", "device")
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = wanted.index if wanted.index is not None else torch.cuda.current_device() if n else 0
        # torch keeps eight bits of the number: its cuda:256 is cuda:0.
        if name not in ("cuda", f"cuda:{index}") or not 0 <= index < n:
            raise ConfigError(f"device is {name!r}, but torch sees {n} GPUs here", "device")
        self.device = torch.device("cuda", index)

    def allocate(self, model: str, nbytes: int) -> Tensor:
        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            free, _ = torch.cuda.mem_get_info(self.device)
            raise InsufficientMemory(model, nbytes, free) from None
        # torch hands out memory that kernels queued on this stream may still use; the lanes are other streams.
        torch.cuda.current_stream(self.device).synchronize()
        return memory

    def lane(self, memory: Tensor) -> Lane:
        return _CudaLane(memory)

    def pin(self, address: int, nbytes: int) -> bool:
        with torch.cuda.device(self.device):
            if int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE)) == 0:
                return True
            # The refusal stays this thread's last error, and torch would raise it after whatever this thread runs next.
            with suppress(RuntimeError):
                torch.zeros(1, device=self.device)
            return False

    def unpin(self, address: int) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.cudart().cudaHostUnregister(address)


# --- locked host memory ----------------------------------------------------------------------------------------------


def _steps(address: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """(address, nbytes) of the parts of some memory, cut where addresses are multiples of ``STEP``."""
    end = address + nbytes
    while address < end:
        size = min(end, (address // STEP + 1) * STEP) - address
        yield address, size
        address += size


class Pins:
    """Host memory that stays page-locked for a device: each piece once, until it is removed. All methods belong to any thread.

    The pages behind locked memory must stay: :meth:`remove` it before it is unmapped or moved, and before a hole is punched into
    a shared file, in whatever process. The device would go on to read the old pages.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pieces: dict[int, int] = {}
        self._closed = False
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are locked."""
        with self._lock:
            return sum(self._pieces.values())

    def add(self, address: int, nbytes: int, cancel: threading.Event | None = None) -> bool:
        """Lock `nbytes` at `address`, a multiple of the page size; returns whether all of them are locked now.

        Slow, about as a copy of them: for a thread in the background. `cancel` is looked at between steps of ``STEP`` bytes;
        what is locked by then stays so. To add what is locked does nothing; memory that was added overlaps no other.
        """
        for start, size in _steps(address, nbytes):
            with self._lock:
                if self._closed or (cancel is not None and cancel.is_set()):
                    return False
                if start in self._pieces:
                    assert self._pieces[start] == size, "overlaps what is locked"
                elif self._device.pin(start, size):
                    self._pieces[start] = size
                else:
                    return False
        return True

    def remove(self, address: int, nbytes: int) -> None:
        """Unlock what of `nbytes` at `address` is locked. No copy from it may run."""
        with self._lock:
            for start in [start for start in self._pieces if address <= start < address + nbytes]:
                del self._pieces[start]
                self._device.unpin(start)

    def close(self) -> None:
        """Unlock everything; nothing is locked afterwards, whoever asks."""
        with self._lock:
            self._closed = True
            while self._pieces:
                self._device.unpin(self._pieces.popitem()[0])


@contextmanager
def pinned(device: Device, address: int, nbytes: int) -> Iterator[Pins]:
    """Host memory that is page-locked inside the block, as far as the system allows."""
    pins = Pins(device)
    try:
        pins.add(address, nbytes)
        yield pins
    finally:
        pins.close()


# --- where tensors lie on a device -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes ``[source, source + nbytes)`` of a plan's buffer belong at byte `target` of the device's memory."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where on a device, in an allocation of `nbytes` bytes, the tensors of a checkpoint lie.

    `positions`: where each tensor with bytes begins; those of aliases are equal. `pieces`: what is copied, in the order of the
    plan's buffer, without overlap.
    """

    nbytes: int
    positions: Mapping[str, int]
    pieces: tuple[Piece, ...]

    def inside(self, begin: int, end: int) -> Iterator[Piece]:
        """What of the bytes ``[begin, end)`` of the plan's buffer is copied."""
        number = max(0, bisect_right(self.pieces, begin, key=lambda piece: piece.source) - 1)
        while number < len(self.pieces) and self.pieces[number].source < end:
            piece = self.pieces[number]
            first, last = max(begin, piece.source), min(end, piece.source + piece.nbytes)
            if first < last:
                yield Piece(first, piece.target + first - piece.source, last - first)
            number += 1


def lay_out(index: CheckpointIndex, plan: ReadPlan) -> Layout:
    """Give the tensors of `index`, which `plan` reads, their places on a device. Pure.

    Tensors that lie side by side in a file stay so, and are copied as one, as long as each begins at a multiple of
    ``LEAST_ALIGNMENT``; one that would not begins anew at a multiple of ``ALIGNMENT``.
    """
    # Where its bytes are when they have been read, whether or not they may stay there.
    source_of = {**plan.positions, **{copy.tensor: copy.source for copy in plan.copies}}
    positions: dict[str, int] = {}
    placed: dict[int, int] = {}
    pieces: list[Piece] = []
    for tensor in sorted((tensor for tensor in index.tensors if tensor.nbytes), key=lambda tensor: source_of[tensor.name]):
        source = source_of[tensor.name]
        if source not in placed:
            last = pieces[-1] if pieces else Piece(-ALIGNMENT, 0, 0)
            gap = source - last.source - last.nbytes
            target = last.target + last.nbytes + gap
            if gap < ALIGNMENT and target % LEAST_ALIGNMENT == 0:
                pieces[-1] = replace(last, nbytes=last.nbytes + gap + tensor.nbytes)
            else:
                target = round_up(last.target + last.nbytes, ALIGNMENT)
                pieces.append(Piece(source, target, tensor.nbytes))
            placed[source] = target
        positions[tensor.name] = placed[source]
    end = pieces[-1].target + pieces[-1].nbytes if pieces else 0
    return Layout(round_up(end, ALIGNMENT), positions, tuple(pieces))


def _begin(lane: Lane, layout: Layout, begin: int, end: int, address: int) -> None:
    """Begin to copy what is needed of the bytes ``[begin, end)`` of a plan's buffer, which are at `address`."""
    for piece in layout.inside(begin, end):
        target = piece.target
        for source, nbytes in _steps(address + piece.source - begin, piece.nbytes):
            lane.copy(target, source, nbytes)
            target += nbytes


# --- from host memory ------------------------------------------------------------------------------------------------


def copy_behind(
    plan: ReadPlan,
    address: int,
    layout: Layout,
    memory: Tensor,
    device: Device,
    *,
    arriving: Arrivals | None = None,
    arrived: Arrivals | None = None,
    on_progress: Callable[[int], None] | None = None,
    cancel: threading.Event | None = None,
) -> None:
    """Copy the tensors that `plan` brings to host address `address` on to `memory`, uint8 of shape ``(layout.nbytes,)``.

    In the plan's order, on the calling thread. `arriving` says what has been read so far (``None``: everything): chunks that lie
    side by side go as one copy, as far as they are there, up to ``STEP`` bytes. `arrived`, another :class:`Arrivals` of `plan`,
    is told what is on the device. `on_progress` is called with the tensor bytes there: 0 at first, never backwards.

    `cancel` is looked at between copies; who waits for `arriving` meanwhile hears of it when the read ends, which should be
    called off as well. The memory at `address` should be locked (:class:`Pins`). The caller keeps it as it is, and looks at how
    the read itself ends: a file may turn out to have changed when all of it is here.

    Raises what `arriving` failed with, :class:`Cancelled`, or the device's error, and tells it to `arrived`. When it returns or
    raises, no copy runs any more.
    """
    done = 0
    under_way: deque[tuple[object, range]] = deque()

    def finish() -> None:
        nonlocal done
        mark, chunks = under_way.popleft()
        lane.wait(mark)
        for number in chunks:
            done += plan.chunks[number].payload
            if arrived is not None:
                arrived.arrived(number)
        if on_progress is not None:
            on_progress(done)

    try:
        if on_progress is not None:
            on_progress(0)
        with device.lane(memory) as lane:
            number = 0
            while number < len(plan.chunks):
                if cancel is not None and cancel.is_set():
                    raise Cancelled("the copy to the device was called off")
                if arriving is not None:
                    if not arriving.has_chunk(number):
                        # There is nothing else to do for the lane.
                        while under_way:
                            finish()
                    arriving.wait_chunk(number)
                chunks = _together(plan, number, arriving)
                first, last = plan.chunks[chunks[0]], plan.chunks[chunks[-1]]
                _begin(lane, layout, first.position, last.position + last.decoded, address + first.position)
                under_way.append((lane.mark(), chunks))
                if len(under_way) > QUEUED:
                    finish()
                number = chunks.stop
            while under_way:
                finish()
    except BaseException as error:
        if arrived is not None:
            arrived.fail(error)
        raise


def _together(plan: ReadPlan, first: int, arriving: Arrivals | None) -> range:
    """Numbers of the chunks, from `first` on, that are there and lie side by side, ``STEP`` bytes or one chunk at most."""
    chunks = plan.chunks
    stop, nbytes = first + 1, chunks[first].decoded
    while stop < len(chunks) and chunks[stop].position == chunks[stop - 1].position + chunks[stop - 1].decoded:
        nbytes += chunks[stop].decoded
        if nbytes > STEP or (arriving is not None and not arriving.has_chunk(stop)):
            break
        stop += 1
    return range(first, stop)


# --- through a ring --------------------------------------------------------------------------------------------------


def _slot_nbytes(plan: ReadPlan) -> int:
    return round_up(max((max(chunk.nbytes, chunk.decoded) for chunk in plan.chunks), default=BLOCK), BLOCK)


def _slots_per_thread(plan: ReadPlan) -> int:
    """One to read or decode into while the others are copied, and one for what is to be decoded."""
    return QUEUED + any(chunk.codec != "raw" for chunk in plan.chunks)


def ring_nbytes(plan: ReadPlan, n_threads: int) -> int:
    """Bytes of a :class:`Ring` with which `n_threads` can bring `plan` to a device; those of one are the least."""
    return n_threads * _slots_per_thread(plan) * _slot_nbytes(plan)


class _Slots:
    """Equal parts of a ring. Any thread may borrow."""

    def __init__(self, address: int, nbytes: int, slot_nbytes: int) -> None:
        self.slot_nbytes = slot_nbytes
        #: list.append and list.pop are atomic.
        self.free = [address + n * slot_nbytes for n in range(nbytes // slot_nbytes)]

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[int]:
        assert nbytes <= self.slot_nbytes
        address = self.free.pop()
        try:
            yield address
        finally:
            self.free.append(address)


class Ring:
    """`nbytes` of host memory, page-locked for `device` where the system allows it, through which chunks go there.

    For one load at a time, another one waits. Locking takes its time, so a process keeps a ring for its next load. All of a
    load's host memory is here. :meth:`close` it, by hand or as a context manager; the end of the object closes it as well.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = round_up(max(nbytes, 1), BLOCK)
        self._address = libc.map_memory(self.nbytes)
        pins = Pins(device)
        self._end = weakref.finalize(self, _end_ring, pins, self._address, self.nbytes)
        self._end.atexit = False
        self._lock = threading.Lock()
        try:
            pins.add(self._address, self.nbytes)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back, after the load that uses it."""
        with self._lock:
            self._end()

    @contextmanager
    def slots(self, slot_nbytes: int, cancel: threading.Event | None = None) -> Iterator[_Slots]:
        """The ring, for one load, cut in parts of `slot_nbytes`. Raises :class:`Cancelled` if called off while it waits."""
        while not self._lock.acquire(timeout=_PATIENCE_S):
            if cancel is not None and cancel.is_set():
                raise Cancelled("the load was called off while another one had the ring")
        try:
            assert self._end.alive, "closed"
            yield _Slots(self._address, self.nbytes, slot_nbytes)
        finally:
            self._lock.release()


def _end_ring(pins: Pins, address: int, nbytes: int) -> None:
    try:
        pins.close()
    finally:
        libc.unmap_memory(address, nbytes)


class _Ferry:
    """One thread's slots and lane: a chunk has landed when its copy is done, and its slot is used again only then."""

    def __init__(self, plan: ReadPlan, layout: Layout, lane: Lane, slots: list[int], landed: Callable[[int], None]) -> None:
        self._plan, self._layout, self._lane, self._landed = plan, layout, lane, landed
        self._slots = deque(slots)
        self._under_way: deque[tuple[object, int]] = deque()

    def room(self, chunk: int) -> int:  # noqa: ARG002 - every slot has room for any chunk
        if len(self._under_way) == len(self._slots):
            self._land()
        return self._slots[0]

    def put(self, chunk: int) -> None:
        read = self._plan.chunks[chunk]
        _begin(self._lane, self._layout, read.position, read.position + read.decoded, self._slots[0])
        self._under_way.append((self._lane.mark(), chunk))
        self._slots.rotate(-1)

    def drain(self) -> None:
        while self._under_way:
            self._land()

    def _land(self) -> None:
        mark, chunk = self._under_way.popleft()
        self._lane.wait(mark)
        self._landed(chunk)


class _Crossing:
    """What the chunks of `plan` go to while they are read: a sink of :func:`sllmdask.loader.reader.read_chunks`."""

    def __init__(self, plan: ReadPlan, layout: Layout, memory: Tensor, device: Device, slots: _Slots) -> None:
        self._plan, self._layout, self._memory, self._device, self._slots = plan, layout, memory, device, slots

    @contextmanager
    def open(self, landed: Callable[[int], None]) -> Iterator[Outlet]:
        with ExitStack() as stack:
            slots = [stack.enter_context(self._slots.borrow(self._slots.slot_nbytes)) for _ in range(QUEUED)]
            # Inside the slots' lease: behind it no copy runs.
            with self._device.lane(self._memory) as lane:
                ferry = _Ferry(self._plan, self._layout, lane, slots, landed)
                yield ferry
                ferry.drain()


def stream_through(
    plan: ReadPlan,
    layout: Layout,
    memory: Tensor,
    device: Device,
    ring: Ring,
    *,
    source: ChunkSource | None = None,
    n_threads: int = 4,
    arrived: Arrivals | None = None,
    tee: Tee | None = None,
    on_progress: Callable[[int], None] | None = None,
    cancel: threading.Event | None = None,
) -> None:
    """Bring the tensors of `plan` to `memory`, uint8 of shape ``(layout.nbytes,)``, through `ring`, which may be far smaller.

    Each of up to `n_threads` threads, as many as the ring has room for, reads a chunk into a slot, checks it, decodes it into
    another slot if it is encoded, begins its copy, and goes on with the next slot while that runs. Host memory: the ring.

    `source`, `tee`, `on_progress` and `cancel` as in :func:`sllmdask.loader.reader.read_chunks`; `arrived` and `on_progress` hear
    of chunks that are on the device. Raises what that raises, :class:`ConfigError` if the ring is too small for one thread
    (:func:`ring_nbytes`), or the device's error. When it returns or raises, no thread and no copy runs any more.
    """
    try:
        with ring.slots(_slot_nbytes(plan), cancel) as slots:
            n_fit = len(slots.free) // _slots_per_thread(plan)
            if not n_fit:
                least = ring_nbytes(plan, 1)
                raise ConfigError(f"a ring of {ring.nbytes} bytes is too small: this checkpoint needs {least}", "ring_nbytes")
            read_chunks(
                plan,
                _Crossing(plan, layout, memory, device, slots),
                source=source,
                n_threads=min(n_threads, n_fit),
                arrivals=arrived,
                staging=slots,
                tee=tee,
                on_progress=on_progress,
                cancel=cancel,
            )
    except BaseException as error:
        if arrived is not None:
            arrived.fail(error)
        raise


def load_to_device(
    path: str | os.PathLike[str],
    device: Device | str | torch.device,
    *,
    n_readers: int = 4,
    ring_nbytes: int | None = None,
    verify: bool = True,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> StateDict:
    """The tensors of the checkpoint at `path`, a directory or one file, on `device`, by name.

    From the disk through locked host memory of `ring_nbytes` bytes at most, by default what `n_readers` threads can use (some
    32 MiB), into one allocation, which is given back when the last tensor is gone. `verify`: compare the checksums of our format.
    `progress` is called from any thread.

    Raises :class:`CheckpointError`, :class:`OSError`, :class:`InsufficientMemory` of the device, :class:`ConfigError` (no such
    device, or `ring_nbytes` too small), :class:`Cancelled`. Whatever it raises, nothing is left.
    """
    where: Device = CudaDevice(device) if isinstance(device, str | torch.device) else device
    index = read_index(path)
    plan = plan_reads(index, CHUNK)
    if not verify:
        plan = replace(plan, chunks=tuple(replace(chunk, checksum=None) for chunk in plan.chunks))
    layout = lay_out(index, plan)
    memory = where.allocate(str(path), layout.nbytes)
    with Ring(where, _affordable(plan, n_readers, ring_nbytes)) as ring:
        stream_through(
            plan,
            layout,
            memory,
            where,
            ring,
            n_threads=n_readers,
            on_progress=None if progress is None else lambda done: progress(done, plan.payload),
            cancel=cancel,
        )
    return device_views(index, layout.positions, memory)


def _affordable(plan: ReadPlan, n_threads: int, limit: int | None) -> int:
    """Bytes of the ring for `n_threads` threads, or as many as fit in `limit` bytes."""
    useful = ring_nbytes(plan, max(1, min(n_threads, len(plan.chunks))))
    return useful if limit is None else min(useful, limit // BLOCK * BLOCK)


class DeviceCopy:
    """A checkpoint that follows, from host memory where it is or is still arriving, to a device.

    `tensors` have their places on the device at once; ``arrived`` says which of them may be used. The host memory is locked
    while the copies run and must stay until :meth:`close` has returned, after which it is not needed any more.
    """

    def __init__(
        self, model: str, index: CheckpointIndex, plan: ReadPlan, buffer: Buffer, device: Device, arriving: Arrivals | None
    ) -> None:
        """`arriving`: ``None`` if every byte is in `buffer`. Raises :class:`InsufficientMemory` of the device."""
        layout = lay_out(index, plan)
        memory = device.allocate(model, layout.nbytes)
        self.tensors = device_views(index, layout.positions, memory)
        self.arrived = Arrivals(plan)
        self._cancel = threading.Event()
        held = [buffer, memory]
        self._thread = threading.Thread(
            target=self._run, args=(plan, layout, held, device, arriving), name=f"to-device-{model}", daemon=True
        )
        self._thread.start()

    def _run(self, plan: ReadPlan, layout: Layout, held: list[Any], device: Device, arriving: Arrivals | None) -> None:
        buffer, memory = held
        held.clear()
        pins = Pins(device)
        try:
            pins.add(address_of(buffer), plan.nbytes, self._cancel)
            copy_behind(
                plan, address_of(buffer), layout, memory, device, arriving=arriving, arrived=self.arrived, cancel=self._cancel
            )
        except BaseException as error:  # noqa: BLE001 - told to whoever waits for tensors
            self.arrived.fail(error)
        finally:
            pins.close()
            del buffer, memory

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the last copy is done, or has failed; false after `timeout_s` seconds."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Call off what is not copied yet; returns when no copy runs and the host memory is locked no more.

        A wait for bytes that are still to be read ends only when their read does: that is called off before.
        """
        self._cancel.set()
        self.arrived.fail(Cancelled("the copy to the device was called off"))
        self._thread.join()
