from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sllmdask.errors import CheckpointNotFound, DiskFull
from sllmdask.loader.disk import PARTIAL, DiskTier, named_now
from sllmdask.loader.tee import JOURNAL


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def put(root):
    """``put(name, nbytes, age)``: a copy that was used before all of smaller age."""

    def write(name: str, nbytes: int, age: int = 0) -> Path:
        (root / name / "sub").mkdir(parents=True)
        (root / name / "weights").write_bytes(bytes(nbytes - 10))
        (root / name / "sub" / "small").write_bytes(bytes(10))
        os.utime(root / name, ns=(0, 1_000_000_000 - age))
        return root / name

    return write


def names(root):
    return sorted(path.name for path in root.iterdir())


# --- finding ---------------------------------------------------------------------------------------------------------


def test_a_directory_is_where_it_is_and_a_copy_is_below_the_root(tmp_path, root, put, monkeypatch):
    disk = DiskTier(root)
    (tmp_path / "mine").mkdir()
    assert disk.find(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    assert disk.find("mine") == tmp_path / "mine"
    assert disk.find("https://example.org/m") is None
    fetched = put(disk.final("https://example.org/m").name, 100)
    assert disk.find("https://example.org/m") == fetched
    elsewhere = put(disk.final("/data/m").name, 100)
    assert disk.find("/data/m") == elsewhere


@pytest.mark.parametrize("source", ["", "/nowhere", "a/b/c", "../x"])
def test_what_is_nowhere_and_cannot_be_fetched_is_told(root, source):
    with pytest.raises(CheckpointNotFound, match="not the id of a model"):
        DiskTier(root).find(source)


def test_directories_of_one_name_on_other_nodes_are_told_apart_and_long_names_are_cut(root):
    disk = DiskTier(root)
    assert disk.final("/a/m") != disk.final("/b/m")
    assert disk.final("/a/m").parent == root
    long = disk.final("/" + "m" * 255)
    long.mkdir(parents=True)
    assert disk.final("/a/..").parent == root


def test_a_root_that_is_told_from_here_stays_where_it_was(tmp_path, monkeypatch, put):
    monkeypatch.chdir(tmp_path)
    disk = DiskTier(Path("store"), quota=100)
    copy = put("a", 100)
    monkeypatch.chdir("/")
    assert disk.copies()[0].path == copy
    with pytest.raises(DiskFull):
        disk.make_room("b", 50, {copy})


# --- room ------------------------------------------------------------------------------------------------------------


def test_copies_are_counted_and_what_is_none_is_not(root, put):
    disk = DiskTier(root, quota=1000)
    assert (disk.copies(), disk.used, disk.capacity) == ([], 0, 1000)
    put("old", 100, age=2)
    put("new", 200, age=1)
    for name in ("x.partial", "x.1-0.leaving", "x.1-0.damaged", ".hidden"):
        put(name, 50)
    (root / "file").write_bytes(bytes(50))
    assert [(copy.path.name, copy.nbytes) for copy in disk.copies()] == [("old", 100), ("new", 200)]
    assert disk.used == 300
    assert DiskTier(root).capacity > 300


def test_what_was_used_longest_ago_leaves_and_no_more_than_that(root, put):
    disk = DiskTier(root, quota=300)
    for age, name in enumerate("abc"):
        put(name, 100, age)
    assert disk.make_room("d", 0, ()) == []
    disk.touch(root / "c")
    assert disk.make_room("d", 100, ()) == [root / "b"]
    assert names(root) == ["a", "c"]
    assert disk.make_room("d", 250, ()) == [root / "a", root / "c"]
    assert names(root) == []


def test_what_nobody_wants_any_more_leaves_before_what_was_used_longer_ago(root, put, tmp_path):
    disk = DiskTier(root, quota=300)
    a, b, c = (put(name, 100, age) for age, name in enumerate("abc"))
    disk.demote(b)
    disk.demote(tmp_path)
    assert disk.make_room("d", 100, ()) == [b]
    assert (a.is_dir(), c.is_dir(), tmp_path.stat().st_mtime_ns > 0) == (True, True, True)


def test_what_is_in_use_stays_and_where_that_does_not_suffice_nothing_leaves(root, put):
    disk = DiskTier(root, quota=300)
    a, b, c = (put(name, 100, age) for age, name in enumerate("abc"))
    assert disk.make_room("d", 100, {c}) == [b]
    with pytest.raises(DiskFull) as caught:
        disk.make_room("d", 250, {c})
    assert (caught.value.needed, caught.value.free) == (250, 200)
    assert "worker.disk_quota" in caught.value.message
    assert names(root) == ["a", "c"]
    assert a.is_dir()


def test_what_is_held_by_this_or_another_process_stays(root, put):
    disk = DiskTier(root, quota=300)
    a, b, _c = (put(name, 100, age) for age, name in enumerate("abc"))
    hold = disk.hold(b)
    again = disk.hold(b)
    code = """
import sys; from pathlib import Path; from sllmdask.loader.disk import PARTIAL, DiskTier, named_now
from sllmdask.loader.tee import JOURNAL
fd = DiskTier(Path(sys.argv[1]), 300).hold(Path(sys.argv[2])); print(fd is not None, flush=True); sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(root), str(a)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"True\n"
        assert [path.name for path in disk.make_room("d", 100, ())] == ["c"]
        with pytest.raises(DiskFull):
            disk.make_room("d", 200, ())
        os.close(hold)
        with pytest.raises(DiskFull):
            disk.make_room("d", 200, ())
        os.close(again)
        assert disk.make_room("d", 200, ()) == [b]
        with pytest.raises(DiskFull):
            disk.make_room("d", 300, ())
    assert disk.make_room("d", 300, ()) == [a]


def test_a_fetch_under_way_counts_with_all_its_bytes_and_what_was_left_of_one_leaves_first(root, put):
    kib = 1024
    disk = DiskTier(root, quota=1000 * kib)
    put("copy", 100 * kib, age=9)
    put("left.partial", 500 * kib)
    (root / "left.partial" / JOURNAL).write_bytes(b"ranges")
    for name, nbytes in (("headers", 300 * kib), ("under_way", 600 * kib)):
        with (put(f"{name}.partial", 10) / "weights").open("wb") as file:
            file.truncate(nbytes)
        (root / f"{name}.partial" / JOURNAL).touch()
    held = os.open(root / "under_way.partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert disk.make_room("d", 250 * kib, ()) == [root / "left.partial"]
    assert disk.make_room("d", 350 * kib, ()) == [root / "copy"]
    with pytest.raises(DiskFull) as caught:
        disk.make_room("d", 450 * kib, ())
    assert 390 * kib < caught.value.free < 400 * kib
    os.close(held)
    assert disk.make_room("d", 950 * kib, ()) == []
    assert disk.make_room("under_way", 950 * kib, ()) == []
    assert names(root) == ["headers.partial", "under_way.partial"]


def test_only_copies_are_held(tmp_path, root, put):
    disk = DiskTier(root)
    put("m.partial", 100)
    (tmp_path / "mine").mkdir()
    assert disk.hold(tmp_path / "mine") is None
    assert disk.hold(root / "m.partial") is None
    assert disk.hold(root / "gone") is None


def test_without_a_quota_nothing_leaves(root, put):
    put("a", 100)
    assert DiskTier(root).make_room("b", 2**60, ()) == []


def test_what_a_killed_process_was_removing_is_removed_and_a_copy_that_is_gone_already_is_no_error(root, put):
    disk = DiskTier(root, quota=300)
    put("x.77-0.leaving", 100)
    disk.remove(root / "gone")
    disk.make_room("b", 10, ())
    assert names(root) == []


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_copy_is_put_aside_and_one_of_them_is_kept(root, put, tmp_path):
    disk = DiskTier(root)
    assert disk.quarantine(put("m", 100), "first")
    (first,) = names(root)
    assert first.startswith("m.") and first.endswith(".damaged")
    assert disk.quarantine(put("m", 100), "second")
    assert len(names(root)) == 1
    assert disk.quarantine(root / "m", "gone already")
    (tmp_path / "mine").mkdir()
    assert not disk.quarantine(tmp_path / "mine", "of a user")
    assert (tmp_path / "mine").is_dir()


def test_a_directory_whose_fetch_was_completed_a_moment_ago_is_found_by_its_final_name(root):
    final, partial = root / "a", root / f"a{PARTIAL}"
    partial.mkdir(parents=True)
    assert named_now(partial) == partial
    partial.rename(final)
    assert (named_now(partial), named_now(final)) == (final, final)
    final.rmdir()
    assert named_now(partial) == partial, "what is not there at all is not there by either name"
