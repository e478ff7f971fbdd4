from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sllmdask import compiling
from sllmdask.loader import codec, kernels, libc
from tests.loader.xxh64 import xxh64_by_the_book

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BITS = {"F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}
PAGE = os.sysconf("SC_PAGESIZE")


def address_of(array: NDArray) -> int:
    return array.ctypes.data


# --- checksum --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
    ids=["empty", "one byte", "three bytes", "a sentence"],
)
def test_xxh64_gives_the_published_values(text, expected):
    data = np.frombuffer(text, np.uint8)
    assert kernels.xxh64(address_of(data), len(data)) == expected == xxh64_by_the_book(text)


def test_xxh64_follows_the_specification_for_any_length_and_alignment():
    rng = random.Random(1)
    data = np.frombuffer(rng.randbytes(70_000), np.uint8)
    lengths = [*range(201), 4095, 4096, 4097, 65_535, 65_536]
    for nbytes in lengths:
        start = rng.randrange(64)
        expected = xxh64_by_the_book(data[start : start + nbytes].tobytes())
        assert kernels.xxh64(address_of(data) + start, nbytes) == expected, (nbytes, start)


def test_xxh64_reads_nothing_beyond_its_bytes(fenced):
    _, end = fenced(1)
    found = {kernels.xxh64(end - nbytes, nbytes) for nbytes in range(100)}
    assert len(found) == 100, "zeros, but of another number each time"


# --- change of dtype -------------------------------------------------------------------------------------------------


def patterns(dtype: str) -> NDArray:
    """Every number of 16 bits; of float32 each upper half with the lower halves at which rounding turns, and random ones."""
    if dtype != "F32":
        return np.arange(2**16, dtype=np.uint16)
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF], np.uint32)
    return np.concatenate([(upper[:, None] | lower).ravel(), np.random.default_rng(2).integers(0, 2**32, 500_000, np.uint32)])


def as_tensor(bits: NDArray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int32 if dtype == "F32" else np.int16)).view(DTYPES[dtype])


@pytest.mark.parametrize(("source", "target"), kernels.CONVERSIONS)
def test_every_number_is_converted_to_the_bits_that_torch_gives_it(source, target):
    bits = patterns(source)
    converted = np.zeros(len(bits), BITS[target])
    kernels.cast(address_of(bits), source, address_of(converted), target, len(bits))
    theirs = as_tensor(bits, source).to(DTYPES[target])
    is_nan = as_tensor(bits, source).isnan().numpy()
    expected = theirs.view(torch.int32 if target == "F32" else torch.int16).numpy().view(BITS[target])
    np.testing.assert_array_equal(converted[~is_nan], expected[~is_nan])
    # torch's own bits of a NaN depend on how many numbers it converts at a time.
    ours = as_tensor(converted, target)
    assert ours[torch.from_numpy(is_nan)].isnan().all()
    top, its_top = np.iinfo(BITS[source]).bits - 1, np.iinfo(BITS[target]).bits - 1
    np.testing.assert_array_equal(converted >> its_top, bits >> top, "signs, those of zeros and NaNs too")


@pytest.mark.parametrize(("source", "target"), kernels.CONVERSIONS)
def test_a_conversion_touches_just_its_elements(fenced, source, target):
    rng = np.random.default_rng(3)
    nbytes, its_nbytes = DTYPES[source].itemsize, DTYPES[target].itemsize
    (begin, _), (its_begin, _) = fenced(1), fenced(1)
    for n in range(70):
        numbers = as_tensor(rng.integers(0x3000, 0x4000, n).astype(BITS[source]), source)
        address, target_address = begin + PAGE - n * nbytes, its_begin + PAGE - n * its_nbytes
        if n:
            libc.copy(address, numbers.data_ptr(), n * nbytes)
        kernels.cast(address, source, target_address, target, n)
        found = torch.empty(n, dtype=DTYPES[target])
        if n:
            libc.copy(found.data_ptr(), target_address, n * its_nbytes)
        assert torch.equal(found, numbers.to(DTYPES[target]))


def test_a_conversion_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ValueError, match="no conversion from BF16 to I8"):
        kernels.cast(0, "BF16", 0, "I8", 1)


# --- compiling, and keeping what was compiled ------------------------------------------------------------------------


def plus_one(number: int) -> int:
    return number + 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def hits(kernel: object) -> int:
    return sum(kernel.stats.cache_hits.values())


def test_what_was_compiled_is_found_by_the_next(cache):
    first, second = compiling.kernel(plus_one), compiling.kernel(plus_one)
    assert (first(1), hits(first)) == (2, 0)
    assert (second(1), hits(second)) == (2, 1)
    assert [path.suffix for path in files(cache)] == [".nbc", ".nbi"]


def test_code_of_another_version_is_never_run(cache, monkeypatch, tmp_path_factory):
    compiling.kernel(plus_one)(1)
    before = files(cache)
    other = tmp_path_factory.mktemp("other") / "compiling.py"
    other.write_bytes(Path(compiling.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(compiling, "__file__", str(other))
    second = compiling.kernel(plus_one)
    assert (second(1), hits(second)) == (2, 0)
    assert set(before) < set(files(cache)), "its files have names of their own"


def test_where_nothing_can_be_written_a_kernel_still_runs(monkeypatch):
    monkeypatch.setattr(compiling._Files, "_locator_classes", [])
    kernel = compiling.kernel(plus_one)
    assert kernel(1) == 2
    assert kernel.nopython_signatures, "compiled"


def test_a_directory_that_is_gone_or_full_costs_only_the_compilation(cache, caplog):
    kernel = compiling.kernel(plus_one)
    for directory in cache.iterdir():
        directory.rmdir()
        directory.touch()
    with caplog.at_level(logging.DEBUG, "sllmdask.compiling"):
        assert kernel(1) == 2
    assert "is not kept" in caplog.text


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("content", [b"", bytes(100), None], ids=["empty", "zeros", "half"])
def test_a_file_that_was_cut_short_is_written_again(cache, suffix, content):
    compiling.kernel(plus_one)(1)
    [path] = [path for path in files(cache) if path.suffix == suffix]
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    second, third = compiling.kernel(plus_one), compiling.kernel(plus_one)
    assert (second(1), hits(second)) == (2, 0)
    assert (third(1), hits(third)) == (2, 1)


def test_threads_may_warm_up_at_the_same_time_as_others_call():
    data = np.arange(1000, dtype=np.uint8)
    expected, found = xxh64_by_the_book(data.tobytes()), []
    start = threading.Barrier(6)

    def call() -> None:
        start.wait()
        found.append(kernels.xxh64(address_of(data), 1000))

    def warm_up() -> None:
        start.wait()
        kernels.warm_up()

    threads = [threading.Thread(target=target) for target in (call, warm_up) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


ON_A_PLAIN_PROCESSOR = """
import sys
import numpy as np
from sllmdask.loader import codec, kernels
assert "bmi2" not in kernels._machine()[1] and "ssse3" not in kernels._machine()[1]
kernels.warm_up(encoder=False)
for name in sys.argv[1:]:
    source, encoded = np.load(name + ".npy"), np.load(name + ".split16.npy")
    target = np.zeros_like(source)
    codec.decode_split16(encoded.ctypes.data, encoded.size, target.ctypes.data, target.size)
    assert (target == source).all()
    print(kernels.xxh64(source.ctypes.data, source.size))
print(*(sum(kernel.stats.cache_hits.values()) for kernel, _ in kernels._SIGNATURES))
"""


@pytest.mark.slow
def test_processes_compile_at_the_same_time_also_for_a_processor_without_special_instructions(tmp_path):
    numbers, checksums = np.random.default_rng(4).normal(0, 0.02, 40_005), []
    for dtype in (torch.bfloat16, torch.float16):
        source = torch.from_numpy(numbers).to(dtype).view(torch.uint8).numpy()
        np.save(tmp_path / f"{dtype}.npy", source)
        np.save(tmp_path / f"{dtype}.split16.npy", np.frombuffer(codec.encode_split16(source), np.uint8))
        checksums.append(str(kernels.xxh64(address_of(source), source.size)))
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
    }
    names = [str(tmp_path / f"{dtype}") for dtype in (torch.bfloat16, torch.float16)]

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-c", ON_A_PLAIN_PROCESSOR, *names]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    together = [process.communicate(timeout=100) for process in [start(), start()]]
    after = start().communicate(timeout=100)
    assert [errors for _, errors in (*together, after)] == ["", "", ""]
    assert [output.splitlines()[:2] for output, _ in (*together, after)] == [checksums] * 3
    assert after[0].splitlines()[2] == "1 1 1 0", "all that was compiled was kept"
