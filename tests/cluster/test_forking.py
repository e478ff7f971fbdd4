"""Programs that are forks of one process do what they do when they are started by themselves."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client

from tests.cluster.harness import Processes, forks, until

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("arguments", [["version", "--json"], ["status", "--server", "http://127.0.0.1:1"], ["verzion"]], ids=str)
def test_a_fork_says_what_the_program_says_and_ends_with_its_status(tmp_path: Path, arguments: list[str]):
    told = {}
    for from_scratch in (True, False):
        programs = Processes(tmp_path, from_scratch=from_scratch)
        name = f"program-{from_scratch}"
        status = programs.start(name, "sllmdask", *arguments).wait(60)
        told[from_scratch] = (status, programs.log(name))
    assert told[False] == told[True]
    assert told[True][1]


def test_a_fork_has_a_session_a_directory_and_a_log_of_its_own(tmp_path: Path):
    programs = Processes(tmp_path)
    try:
        programs.start_scheduler()
        pid = programs.running["scheduler"].pid
        until("it listens", lambda: "Scheduler at" in programs.log("scheduler"))
        assert (os.getsid(pid), os.getpgid(pid)) == (pid, pid)
        assert Path(f"/proc/{pid}/cwd").readlink() == tmp_path
    finally:
        programs.close()


def test_a_killed_fork_is_told_with_its_signal(tmp_path: Path):
    programs = Processes(tmp_path)
    programs.start_scheduler()
    process = programs.running["scheduler"]
    assert process.poll() is None
    programs.stop("scheduler", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_nanny_that_is_a_fork_has_its_worker_as_a_child_in_its_group_and_starts_it_again(tmp_path: Path):
    programs = Processes(tmp_path)
    try:
        programs.start_scheduler()
        programs.start_worker("0")
        nanny = psutil.Process(programs.running["worker-0"].pid)

        def registered(times: int) -> int | None:
            return programs.log("worker-0").count("Registered to:") == times and worker_of(nanny)

        first = until("the worker joined", lambda: registered(1))
        assert os.getpgid(first) == nanny.pid
        with Client(programs.scheduler, set_as_default=False) as client:
            # Some 50 ms after its worker has joined; before, one that dies is one that did not start.
            until("the nanny knows", lambda: client.run(state_of_worker, nanny=True).popitem()[1] == "running")
        os.kill(first, signal.SIGKILL)
        assert until("the next one joined", lambda: registered(2)) != first
        family = [nanny, *nanny.children(recursive=True)]
    finally:
        programs.close()
    until("nobody is left", lambda: not [each for each in family if each.is_running() and each.status() != "zombie"])


def state_of_worker(dask_worker: Any) -> str:
    """By its nanny's account."""
    return str(dask_worker.process.status.name)


def worker_of(nanny: psutil.Process) -> int | None:
    """The child that ``multiprocessing`` has started, and not the one that forks it, nor the one that counts its semaphores."""
    found = [each.pid for each in nanny.children() if each.num_threads() > 1 and each.status() != "zombie"]
    return found[0] if found else None


def test_what_another_environment_would_import_is_not_forked():
    same = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    assert forks().can({**same, "DASK_SLLMDASK__WORKER__SLOTS": "3"})
    assert not forks().can({**same, "PYTHONPATH": "/elsewhere"})
    assert not forks().can({**same, "HF_HOME": "/elsewhere"})


def test_a_setting_in_the_environment_is_read(tmp_path: Path):
    programs = Processes(tmp_path)
    try:
        programs.start_scheduler(DASK_SLLMDASK__WORKER__SLOTZ="1")
        until("it says what is wrong with it", lambda: "slotz" in programs.log("scheduler"))
    finally:
        programs.close()
