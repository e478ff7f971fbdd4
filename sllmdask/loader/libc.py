"""The few system calls that Python wraps badly or not at all. ctypes lets go of the GIL for the length of each.

``os.preadv`` wants a Python buffer per read and ``mmap.mmap`` places a mapping anywhere; here a read goes to an address, and
a mapping starts on a huge page. Every failure is an :class:`OSError` with its errno.
"""

from __future__ import annotations

import ctypes
import errno
import os
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE

#: Bytes of a huge page on x86-64 and, with 4 KiB base pages, on arm64.
HUGE_PAGE = 2 * 1024**2

_MADV_HUGEPAGE = 14
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_libc.pread.restype = ctypes.c_ssize_t
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _failure(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def pread(fd: int, address: int, nbytes: int, offset: int) -> int:
    """Read up to `nbytes` at `offset` of `fd` to `address`; returns how many came, 0 at the end of the file."""
    n = int(_libc.pread(fd, address, nbytes, offset))
    if n < 0:
        raise _failure("pread")
    return n


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
    # Advice only: a kernel without huge pages refuses it, and small pages serve as well, more slowly.
    _libc.madvise(address, nbytes, _MADV_HUGEPAGE)
    return int(address)


def unmap_memory(address: int, nbytes: int) -> None:
    """Give memory back; takes about 10 ms per 100 MB, during which other threads run."""
    if _libc.munmap(address, nbytes):
        raise _failure(f"munmap of {nbytes} bytes")
