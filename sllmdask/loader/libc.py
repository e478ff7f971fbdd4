"""The few system calls that Python wraps badly or not at all. ctypes lets go of the GIL for the length of each.

``os.preadv`` wants a Python buffer per read and ``mmap.mmap`` places a mapping anywhere; here a read goes to an address, and
a mapping starts on a huge page. What else needs ctypes is here, too. Every failure is an :class:`OSError` with its errno.
"""

from __future__ import annotations

import ctypes
import errno
import os
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE

#: Bytes of a huge page on x86-64 and, with 4 KiB base pages, on arm64.
HUGE_PAGE = 2 * 1024**2
#: What :func:`renameat2` is to do where the target is there: refuse, or give each the name of the other.
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2

_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_AT_FDCWD = -100
_SYS_CACHESTAT = 451
_PyBUF_WRITE = 0x200
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_libc.pread.restype = ctypes.c_ssize_t
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.pwrite.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_libc.pwrite.restype = ctypes.c_ssize_t
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.memcpy.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.mremap.restype = ctypes.c_void_p
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_view_of = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_view_of.restype = ctypes.py_object


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64)]


class _CacheStat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


def _failure(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def pread(fd: int, address: int, nbytes: int, offset: int) -> int:
    """Read up to `nbytes` at `offset` of `fd` to `address`; returns how many came, 0 at the end of the file."""
    n = int(_libc.pread(fd, address, nbytes, offset))
    if n < 0:
        raise _failure("pread")
    return n


def pwrite(fd: int, address: int, nbytes: int, offset: int) -> None:
    """Write all `nbytes` at `address` to `offset` of `fd`."""
    while nbytes:
        n = int(_libc.pwrite(fd, address, nbytes, offset))
        if n < 0:
            if ctypes.get_errno() == errno.EINTR:
                continue
            raise _failure("pwrite")
        address, nbytes, offset = address + n, nbytes - n, offset + n


def copy(target: int, source: int, nbytes: int) -> None:
    """Copy `nbytes` from address `source` to address `target`, which do not overlap."""
    _libc.memcpy(target, source, nbytes)


def open_direct(path: str) -> int | None:
    """A descriptor for reads that bypass the page cache; ``None`` where the file system has no such thing (some tmpfs, FUSE)."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


def open_buffered(path: str) -> int:
    """A descriptor for large reads through the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd


def map_memory(nbytes: int) -> int:
    """Address of `nbytes` fresh private bytes, zero, on a huge-page boundary. Memory is taken page by page as it is touched.

    Private, because the first touch of shared memory costs two to three times as much.
    """
    spare = nbytes + HUGE_PAGE
    start = _libc.mmap(None, spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if start is None or start == _MAP_FAILED:
        raise _failure(f"mmap of {nbytes} bytes")
    address = -(-start // HUGE_PAGE) * HUGE_PAGE
    end = address + -(-nbytes // os.sysconf("SC_PAGESIZE")) * os.sysconf("SC_PAGESIZE")
    if address > start:
        unmap_memory(start, address - start)
    if start + spare > end:
        unmap_memory(end, start + spare - end)
    advise_huge(address, nbytes)
    return int(address)


def advise_huge(address: int, nbytes: int) -> None:
    """Ask for huge pages. Advice only: a kernel without them refuses it, and small pages serve as well, more slowly."""
    _libc.madvise(address, nbytes, _MADV_HUGEPAGE)


def populate(address: int, nbytes: int, *, write: bool = True) -> bool:
    """Fault in the whole pages of a mapping now, as by a write or a read to each; contents stay. False: Linux before 5.14."""
    while _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ):
        number = ctypes.get_errno()
        if number == errno.EINVAL:
            return False
        if number not in (errno.EINTR, errno.EAGAIN):
            raise OSError(number, f"populating {nbytes} bytes: {os.strerror(number)}")
    return True


def reserve_addresses(nbytes: int) -> int:
    """Address of `nbytes` on a huge-page boundary at which nothing is mapped: they fault until something is mapped over them."""
    spare = nbytes + HUGE_PAGE
    start = _libc.mmap(None, spare, _PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if start is None or start == _MAP_FAILED:
        raise _failure(f"mmap of {nbytes} bytes")
    address = -(-start // HUGE_PAGE) * HUGE_PAGE
    if address > start:
        unmap_memory(start, address - start)
    if start + spare > address + nbytes:
        unmap_memory(address + nbytes, start + spare - address - nbytes)
    return int(address)


def map_shared(fd: int, offset: int, nbytes: int, address: int) -> None:
    """Map ``[offset, offset + nbytes)`` of `fd`, shared and writable, over `address`, where nothing else may be in use."""
    found = _libc.mmap(address, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | _MAP_FIXED, fd, offset)
    if found != address:
        raise _failure(f"mmap of {nbytes} shared bytes")


def allocate(fd: int, offset: int, nbytes: int) -> None:
    """Take memory or disk for a range of `fd` now; ENOSPC if there is not enough."""
    while _libc.fallocate(fd, 0, offset, nbytes):
        if ctypes.get_errno() != errno.EINTR:
            raise _failure(f"fallocate of {nbytes} bytes")


def punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """Give the memory or disk behind a range of `fd` back; it reads as zeros afterwards."""
    if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, nbytes):
        raise _failure(f"punching a hole of {nbytes} bytes")


def unmap_memory(address: int, nbytes: int) -> None:
    """Give memory back; takes about 10 ms per 100 MB, during which other threads run."""
    if _libc.munmap(address, nbytes):
        raise _failure(f"munmap of {nbytes} bytes")


def clear(address: int, nbytes: int) -> None:
    """Write zeros to `nbytes` at `address`."""
    ctypes.memset(address, 0, nbytes)


def move_pages(source: int, nbytes: int, target: int) -> None:
    """Move the pages of one mapping from `source` to `target`, in place of what is mapped there; at `source` nothing is left.

    About 1 ms per GiB where both begin on a huge page: page tables are moved, not bytes.
    """
    if _libc.mremap(source, nbytes, nbytes, _MREMAP_MAYMOVE | _MREMAP_FIXED, target) != target:
        raise _failure(f"mremap of {nbytes} bytes")


def cached_pages(fd: int, offset: int, nbytes: int) -> int:
    """Pages of a range of `fd` that are in the page cache; 0 where the system does not tell (Linux before 6.5, others' files)."""
    found = _CacheStat()
    if _libc.syscall(_SYS_CACHESTAT, fd, ctypes.byref(_Range(offset, nbytes)), ctypes.byref(found), 0):
        return 0
    return int(found.cached)


def renameat2(source: str | os.PathLike[str], target: str | os.PathLike[str], flag: int) -> bool:
    """Rename as renameat2(2) with `flag`; returns whether there is such a call here. Raises :class:`OSError`."""
    try:
        call = _libc.renameat2
    except AttributeError:
        return False
    if not call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag)):
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


# --- memory as Python sees it, and as the system does ----------------------------------------------------------------


def memory_view(address: int, nbytes: int) -> memoryview:
    """The writable bytes at `address`, which the caller keeps mapped."""
    return _view_of(address, nbytes, _PyBUF_WRITE)


def address_of_bytes(scratch: bytearray | memoryview) -> int:
    """Where `scratch`, which can be written to, begins; it must live on and keep its size."""
    return ctypes.addressof(ctypes.c_char.from_buffer(scratch))
