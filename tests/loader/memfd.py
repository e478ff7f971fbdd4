"""Who holds the memory of a pool, which lives as long as one process does, and whether a process has ended."""

from __future__ import annotations

import os
import select


def holders(inode: int) -> set[int]:
    """Processes that have the pool's file open or mapped."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8") as file:
                if any("sllmdask-host-memory" in line and line.split()[4] == str(inode) for line in file):
                    found.add(int(pid))
            for fd in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{fd}"
                if "sllmdask-host-memory" in os.readlink(path) and os.stat(path).st_ino == inode:
                    found.add(int(pid))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def ended(pidfd: int, timeout_s: float = 30.0) -> bool:
    """Whether the process of a descriptor ends within so many seconds."""
    return bool(select.select([pidfd], [], [], timeout_s)[0])
