from __future__ import annotations

import hashlib
import os
import random
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sllmdask.loader import kernels, libc
from sllmdask.loader.codec import LOG2_BLOCK, decode_split16, encode_split16

PAGE = os.sysconf("SC_PAGESIZE")


def bfloat16(numbers: NDArray) -> NDArray[np.uint8]:
    return torch.from_numpy(numbers.astype(np.float32)).to(torch.bfloat16).view(torch.uint8).numpy()


def float16(numbers: NDArray) -> NDArray[np.uint8]:
    return numbers.astype(np.float16).view(np.uint8)


def encode(source: NDArray[np.uint8], log2_block: int) -> bytes:
    """Also where that is larger than the source."""
    target = np.empty(kernels.split16_bound(source.size // 2, log2_block), np.uint8)
    nbytes = kernels.split16_encode(source.ctypes.data, source.size // 2, target.ctypes.data, log2_block)
    assert nbytes <= target.size
    return target[:nbytes].tobytes()


def decode(encoded: bytes, nbytes: int) -> bytes:
    source, target = np.frombuffer(encoded, np.uint8), np.full(nbytes, 0xAA, np.uint8)
    decode_split16(source.ctypes.data, source.size, target.ctypes.data, nbytes)
    return target.tobytes()


def decode_by_the_book(encoded: bytes) -> bytes:
    """The format's description, read number by number."""

    def bits(part: bytes, width: int, n: int) -> list[int]:
        whole = int.from_bytes(part, "little")
        assert whole < 1 << (width * n), "what is left of a part is 0"
        return [whole >> (width * i) & ((1 << width) - 1) for i in range(n)]

    magic, version, log2_block, zero, n_numbers, nbytes = struct.unpack_from("<4sBBHII", encoded)
    assert (magic, version, zero, nbytes) == (b"SP16", 1, 0, len(encoded))
    at, left, numbers = 16, n_numbers - n_numbers % 16, b""
    while left:
        n = min(left, 2**log2_block)
        left -= n
        kind, n2, n3, n_exceptions = struct.unpack_from("<IIII", encoded, at)
        symbols = encoded[at + 16 : at + 30]
        assert encoded[at + 30 : at + 32] == b"\0\0"
        at += 32
        if kind == 0:
            numbers += encoded[at : at + 2 * n]
            at += 2 * n
            continue
        n_kept = {1: 0, 2: 3}[kind]
        parts = []
        sizes = (n // 4, -(-n2 // 4), -(-3 * n3 // 8), n * n_kept // 8, 2 * n_exceptions, n_exceptions, n)
        for size in sizes:
            parts.append(encoded[at : at + size])
            at += size
        second, third = iter(bits(parts[1], 2, n2)), iter(bits(parts[2], 3, n3))
        ranks = []
        for first in bits(parts[0], 2, n):
            rank = first
            if rank == 3:
                rank = 3 + next(second)
                if rank == 6:
                    rank = 6 + next(third)
            ranks.append(rank)
        assert [*second, *third] == []
        chosen = [symbols[rank] for rank in ranks]
        for position, symbol in zip(struct.unpack(f"<{n_exceptions}H", parts[4]), parts[5], strict=True):
            chosen[position] = symbol
        kept = bits(parts[3], n_kept, n) if n_kept else [0] * n
        for symbol, middle, low in zip(chosen, kept, parts[6], strict=True):
            rotated = (symbol << n_kept | middle) << 8 | low
            numbers += struct.pack("<H", rotated >> 1 | (rotated & 1) << 15)
    return numbers + encoded[at:]


# --- round trips -----------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(5)
N = 3 * 2**LOG2_BLOCK + 1000 + 7
CASES = {
    "bfloat16 weights": bfloat16(RNG.normal(0, 0.02, N)),
    "float16 weights": float16(RNG.normal(0, 0.02, N)),
    "ones": bfloat16(np.ones(N)),
    "zeros": np.zeros(2 * N, np.uint8),
    "pruned": bfloat16(RNG.normal(0, 0.02, N) * (RNG.random(N) < 0.3)),
    "heavy tails": bfloat16(RNG.standard_cauchy(N)),
    "rows of different scales": bfloat16(RNG.normal(0, 1, N) * 10.0 ** (np.arange(N) // 500 % 9 - 6)),
    "infinities and NaNs": bfloat16(np.where(RNG.random(N) < 0.1, RNG.choice([np.inf, -np.inf, np.nan], N), RNG.normal(0, 1, N))),
    "weights, then anything": np.concatenate([bfloat16(RNG.normal(0, 1, N)), RNG.integers(0, 256, 2 * N, np.uint8)]),
    "weights of both dtypes": np.concatenate([bfloat16(RNG.normal(0, 1, 20_000)), float16(RNG.normal(0, 1, 20_000))]),
    "anything": RNG.integers(0, 256, 2 * N, np.uint8),
    "every number": np.arange(2**16, dtype=np.uint16).view(np.uint8),
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_encoded_is_smaller_and_comes_back(name):
    source = CASES[name]
    encoded = encode_split16(source)
    if name in ("anything", "every number"):
        assert encoded is None
    else:
        assert len(encoded) < source.size
        assert decode(encoded, source.size) == source.tobytes()
        assert decode_by_the_book(encoded) == source.tobytes()


@pytest.mark.parametrize("log2_block", [4, 5, 8, 16])
@pytest.mark.parametrize("name", CASES)
def test_blocks_of_any_size_come_back(name, log2_block):
    source = CASES[name][:8006]
    assert decode(encode(source, log2_block), source.size) == source.tobytes()


@given(st.binary(max_size=600).filter(lambda data: len(data) % 2 == 0), st.integers(4, 16))
def test_any_bytes_come_back(data, log2_block):
    source = np.frombuffer(data, np.uint8)
    encoded = encode(source, log2_block)
    assert decode(encoded, len(data)) == data == decode_by_the_book(encoded)
    shorter = encode_split16(source)
    assert shorter is None or (len(shorter) < len(data) and decode(shorter, len(data)) == data)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1500), st.integers(1, 60), st.booleans(), st.integers(0, 2**32 - 1), st.integers(4, 9))
def test_numbers_of_few_exponents_come_back(n, n_exponents, is_half, seed, log2_block):
    rng = np.random.default_rng(seed)
    exponents = rng.integers(0, 31 if is_half else 256, n_exponents)
    skewed = exponents[np.minimum(rng.geometric(0.3, n) - 1, n_exponents - 1)].astype(np.uint16)
    rest = rng.integers(0, 2**16, n, np.uint16)
    numbers = (rest & 0x83FF) | (skewed << 10) if is_half else (rest & 0x807F) | (skewed << 7)
    source = numbers.view(np.uint8)
    encoded = encode(source, log2_block)
    assert decode(encoded, source.size) == source.tobytes() == decode_by_the_book(encoded)


@pytest.mark.parametrize(
    ("source", "ratio"),
    [
        (bfloat16(RNG.normal(0, 0.02, 2**20)), 0.67),
        (bfloat16(RNG.normal(0, 0.0141, 2**20)), 0.67),
        (bfloat16(RNG.uniform(-0.05, 0.05, 2**20)), 0.66),
        (float16(RNG.normal(0, 0.02, 2**20)), 0.86),
    ],
)
def test_weights_shrink_nearly_as_far_as_their_entropy_allows(source, ratio):
    high = np.bitwise_or(source[1::2] << 1, source[::2] >> 7)
    counts = np.bincount(high, minlength=256) / high.size
    entropy = (8 - sum(p * np.log2(p) for p in counts if p)) / 16
    assert entropy < len(encode_split16(source)) / source.size < ratio


def test_neither_source_nor_target_need_be_aligned():
    source = bfloat16(RNG.normal(0, 1, 5000))
    for shift in range(1, 9):
        moved = np.concatenate([np.zeros(shift, np.uint8), source])[shift:]
        encoded = np.frombuffer(bytes(shift) + encode_split16(moved), np.uint8)
        target = np.zeros(source.size + shift, np.uint8)
        decode_split16(encoded.ctypes.data + shift, encoded.size - shift, target.ctypes.data + shift, source.size)
        assert target[shift:].tobytes() == source.tobytes()


def test_threads_decode_side_by_side():
    sources = [bfloat16(RNG.normal(0, 10.0**-k, 30_000)) for k in range(4)]
    encoded = [encode_split16(source) for source in sources]
    with ThreadPoolExecutor(4) as threads:
        for source, decoded in zip(sources * 5, threads.map(decode, encoded * 5, [60_000] * 20), strict=True):
            assert decoded == source.tobytes()


def test_only_an_even_number_of_contiguous_bytes_is_encoded():
    with pytest.raises(ValueError, match="an even number of bytes below 4 GiB, not 7"):
        encode_split16(np.zeros(7, np.uint8))
    with pytest.raises(ValueError, match="contiguous bytes"):
        encode_split16(np.zeros(16, np.uint8)[::2])
    with pytest.raises(ValueError, match="contiguous bytes"):
        encode_split16(np.zeros(16, np.float32))


# --- the format, byte by byte ----------------------------------------------------------------------------------------

#: Twenty numbers: sixteen in one block, of which the last is an exception, and four as they are.
GOLDEN = b"".join(
    [
        b"SP16\x01\x0e\x00\x00",
        struct.pack("<II", 20, 16 + 32 + 4 + 2 + 2 + 3 + 16 + 8),
        struct.pack("<IIII", 1, 6, 3, 1),
        bytes([127, 126, 125, 124, 123, 122, 121, 120, 119, 118, 117, 116, 115, 114, 0, 0]),
        # First codes 0 1 2 3, 3 3 3 3, 3 0 0 0, 0 0 0 0.
        bytes([0b11100100, 0b11111111, 0b00000011, 0b00000000]),
        # Second codes 0 1 2 3, 3 3.
        bytes([0b11100100, 0b00001111]),
        # Third codes 0 1 7.
        bytes([0b11001000, 0b00000001]),
        struct.pack("<HB", 15, 200),
        # Sign in the lowest bit, mantissa above.
        bytes([0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0x80]),
        bytes([1, 2, 3, 4, 5, 6, 7, 8]),
    ]
)
GOLDEN_NUMBERS = [1.0, -0.5, 0.25 * (1 + 2 / 256), -0.125 * (1 + 2 / 256), *(2.0**-k for k in (4, 5, 6, 7, 13))]
GOLDEN_NUMBERS += [1.0] * 5 + [-(1 + 127 / 128), 2.0**73 * 1.5]


def test_the_format_is_as_described():
    expected = bfloat16(np.array(GOLDEN_NUMBERS)).tobytes() + bytes([1, 2, 3, 4, 5, 6, 7, 8])
    assert decode(GOLDEN, 40) == expected == decode_by_the_book(GOLDEN)


def test_the_encoder_writes_the_same_bytes_as_ever():
    source = np.concatenate([bfloat16(np.arange(-30_000, 30_000) / 7000), float16(np.arange(20_005) / 3000)])
    assert (
        hashlib.sha256(encode_split16(source)).hexdigest() == "5c9567a0fb865840503f5dcfe9cb0bd9747bbac751389808dd1d7d69690b3441"
    )


# --- damage ----------------------------------------------------------------------------------------------------------


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (b"", "does not begin"),
        (GOLDEN[:15], "does not begin"),
        (patched(GOLDEN, 0, b"x"), "does not begin"),
        (patched(GOLDEN, 4, b"\x02"), "does not begin"),
        (patched(GOLDEN, 5, b"\x03"), "does not begin"),
        (patched(GOLDEN, 5, b"\x11"), "does not begin"),
        (patched(GOLDEN, 6, b"\x01"), "does not begin"),
        (patched(GOLDEN, 8, b"\x15"), "another number of bytes"),
        (patched(GOLDEN, 8, b"\xff\xff\xff\xff"), "another number of bytes"),
        (GOLDEN[:-1], "longer or shorter"),
        (GOLDEN + b"\0", "longer or shorter"),
        (patched(GOLDEN, 12, b"\x00"), "longer or shorter"),
        (patched(GOLDEN + b"\0", 12, bytes([len(GOLDEN) + 1])), "longer or shorter"),
        (patched(GOLDEN[:40], 12, bytes([40])), "behind the end"),
        (patched(GOLDEN[:70], 12, bytes([70])), "behind the end"),
        (patched(GOLDEN[:60], 12, bytes([60, 0, 0, 0, 0] + [0] * 31)), "behind the end"),
        (patched(GOLDEN, 16, b"\x03"), "header of a block"),
        (patched(GOLDEN, 16, b"\x02"), "header of a block"),
        (patched(GOLDEN, 16, b"\x00"), "header of a block"),
        (patched(GOLDEN, 19, b"\x01"), "header of a block"),
        (patched(GOLDEN, 20, b"\x11"), "header of a block"),
        (patched(GOLDEN, 24, b"\x07"), "header of a block"),
        (patched(GOLDEN, 28, b"\x11"), "header of a block"),
        (patched(GOLDEN, 46, b"\x01"), "header of a block"),
        (patched(GOLDEN, 28, b"\x10"), "behind the end"),
        (patched(GOLDEN, 48, b"\x00"), "codes of a block"),
        (patched(GOLDEN, 51, b"\xff"), "codes of a block"),
        (patched(GOLDEN, 52, b"\x00"), "codes of a block"),
        (patched(GOLDEN, 56, b"\x10"), "an exception"),
        (patched(GOLDEN, 57, b"\x01"), "an exception"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_damage_is_told_by_its_kind(damaged, reason):
    with pytest.raises(ValueError, match=reason):
        decode(damaged, 40)


@pytest.mark.parametrize("nbytes", [-2, 0, 38, 39, 41, 42, 2**40 + 40])
def test_a_target_of_another_size_is_refused_untouched(nbytes):
    source, target = np.frombuffer(GOLDEN, np.uint8), np.full(64, 0xAA, np.uint8)
    with pytest.raises(ValueError, match="another number of bytes"):
        decode_split16(source.ctypes.data, source.size, target.ctypes.data, nbytes)
    assert (target == 0xAA).all()


def mutated(rng: random.Random, data: bytes) -> bytes:
    """`data` with a few bytes changed, often such as lead far: lengths, counts, codes that all ask for more."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 50])):
        at = rng.randrange(16, 64) if rng.random() < 0.5 else rng.randrange(16, len(changed))
        size = rng.choice([1, 1, 4, 40])
        changed[at : at + size] = rng.choice([rng.randbytes(size), b"\xff" * size, bytes(size)])[: len(changed) - at]
    if rng.random() < 0.3:
        changed = changed[: rng.randrange(len(changed) + 1)]
    if rng.random() < 0.9 and len(changed) >= 16:
        changed[12:16] = struct.pack("<I", len(changed))
    return bytes(changed)


@pytest.mark.parametrize("n", [16, 48, 160, 1000, 2003])
@pytest.mark.parametrize("log2_block", [4, 6, 14])
def test_whatever_the_bytes_nothing_outside_is_read_or_written(fenced, n, log2_block):
    rng, numbers = random.Random(1000 * n + log2_block), np.random.default_rng(n)
    originals = [
        encode(bfloat16(numbers.normal(0, 1, n)), log2_block),
        encode(float16(numbers.standard_cauchy(n)), log2_block),
        encode(numbers.integers(0, 256, 2 * n, np.uint8), log2_block),
    ]
    source, target = fenced(8), fenced(2)
    outcomes = {"decoded": 0, "refused": 0}
    for i in range(600):
        damaged = mutated(rng, originals[i % 3])
        # By turns at the end and at the beginning of what may be touched.
        at, to = (source[0], target[0]) if i % 2 else (source[1] - len(damaged), target[1] - 2 * n)
        if damaged:
            libc.copy(at, np.frombuffer(damaged, np.uint8).ctypes.data, len(damaged))
        try:
            decode_split16(at, len(damaged), to, 2 * n)
            outcomes["decoded"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, "both happen, and the process lives"


def test_what_lies_beside_the_target_stays(fenced):
    rng = random.Random(6)
    original = encode(bfloat16(RNG.normal(0, 1, 480)), 6)
    target = np.full(960 + 2 * 512, 0xAA, np.uint8)
    for _ in range(2000):
        damaged = np.frombuffer(mutated(rng, original) or b"\0", np.uint8)
        fault = kernels.split16_decode(damaged.ctypes.data, damaged.size, target.ctypes.data + 512, 960)
        assert 0 <= fault < len(kernels.FAULTS)
        assert (target[:512] == 0xAA).all() and (target[-512:] == 0xAA).all()
