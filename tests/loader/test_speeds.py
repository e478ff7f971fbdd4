"""What a store keeps of its speeds, and how it finds out how fast its disk is."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from sllmdask.loader import libc
from sllmdask.loader.bandwidth import BandwidthMeter
from sllmdask.loader.disk import DiskTier
from sllmdask.loader.probe import CHUNK_NBYTES, probe
from sllmdask.loader.speeds import KeptSpeeds
from sllmdask.loader.throttle import Throttle

DAY_S = 24 * 3600.0


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


def speeds(root: Path, clock: Clock | None = None, *, limit: float = 0.0) -> KeptSpeeds:
    return KeptSpeeds(DiskTier(root), Throttle(limit), 2, clock or Clock())


@pytest.fixture
def direct(tmp_path: Path) -> None:
    """Only where the file system has direct reads: elsewhere nothing can be told of the disk."""
    (tmp_path / "file").write_bytes(b"x")
    fd = libc.open_direct(str(tmp_path / "file"))
    if fd is None:
        pytest.skip("no direct reads in the directory of the tests")
    os.close(fd)


@pytest.mark.usefixtures("direct")
def test_a_disk_without_any_checkpoint_is_probed_and_nothing_is_left_there(tmp_path: Path, preads: list[tuple[int, int]]):
    root = tmp_path / "store"
    (root).mkdir()
    (root / ".probe-1-of-one-that-was-killed").write_bytes(b"x" * 100)
    found = speeds(root).probe(threading.Event())
    assert found is not None and found > 0
    assert len({offset for offset, _ in preads}) == len(preads) > 1, "nothing twice"
    assert [path.name.startswith(".speeds-") for path in root.iterdir()] == [True]


@pytest.mark.usefixtures("direct")
def test_a_checkpoint_that_is_there_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = tmp_path / "store" / "hub--model"
    copy.mkdir(parents=True)
    (copy / "config.json").write_text("{}")
    (copy / "model.safetensors").write_bytes(os.urandom(3 * CHUNK_NBYTES))
    opened: list[str] = []
    open_direct = libc.open_direct
    monkeypatch.setattr(libc, "open_direct", lambda path: (opened.append(path), open_direct(path))[1])
    assert speeds(tmp_path / "store").probe(threading.Event())
    assert opened == [str(copy / "model.safetensors")]


@pytest.mark.usefixtures("direct")
def test_the_next_process_of_the_host_takes_the_probe_over_for_a_day(tmp_path: Path, preads: list[tuple[int, int]]):
    clock = Clock()
    found = speeds(tmp_path, clock).probe(threading.Event())
    n_reads = len(preads)
    assert speeds(tmp_path, clock).probe(threading.Event()) == found and len(preads) == n_reads
    clock.now += DAY_S + 1
    assert speeds(tmp_path, clock).probe(threading.Event()) and len(preads) > n_reads


def test_a_probe_that_is_called_off_or_too_short_tells_nothing(tmp_path: Path):
    called_off = threading.Event()
    called_off.set()
    throttle = Throttle(0.0)
    assert speeds(tmp_path / "store").probe(called_off) is None
    assert probe(tmp_path, None, n_threads=2, throttle=throttle, cancel=called_off) is None
    (tmp_path / "short").write_bytes(b"x" * CHUNK_NBYTES)
    assert probe(tmp_path, tmp_path / "short", n_threads=2, throttle=throttle, cancel=threading.Event()) is None


def test_what_was_measured_is_known_to_the_next_worker_unless_it_was_of_another_disk(tmp_path: Path):
    meter = BandwidthMeter()
    meter.observe("disk", 10**9, 2.0)
    meter.observe("remote", 10**9, 20.0)
    kept = speeds(tmp_path, limit=1e6)
    kept.keep(meter.kept())
    again = BandwidthMeter()
    again.take_over(speeds(tmp_path, limit=1e6).recall())
    assert again.snapshot() == meter.snapshot()
    other = BandwidthMeter()
    other.take_over(speeds(tmp_path).recall())
    assert set(other.snapshot()) == {"remote"}, "with another limit the disk gives another speed"
    told = json.loads(kept.path.read_text())
    kept.path.write_text(json.dumps(told | {"device": -1}))
    assert set(speeds(tmp_path, limit=1e6).recall()["loads"]) == {"remote"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "device": 1, "read_limit": 1}', "\x00"])
def test_a_file_that_does_not_read_as_such_is_ignored_and_replaced(tmp_path: Path, text: str):
    kept = speeds(tmp_path)
    kept.path.write_text(text)
    assert kept.recall() == {}
    kept.keep({"loads": {}, "probed": {"disk": 1e9}})
    assert speeds(tmp_path).recall()["probed"] == {"disk": 1e9}
    assert [path.name for path in tmp_path.iterdir()] == [kept.path.name]


def test_a_directory_that_cannot_be_written_to_is_no_failure(tmp_path: Path):
    (tmp_path / "file").write_text("")
    kept = speeds(tmp_path / "file" / "store")
    kept.keep({"loads": {}, "probed": {}})
    assert kept.recall() == {} and kept.probe(threading.Event()) is None
