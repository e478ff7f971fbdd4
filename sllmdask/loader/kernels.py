"""The loops over bytes: checksum, change of dtype, and the codec of :mod:`sllmdask.loader.codec`. Compiled, without the GIL.

Each kernel has one signature. It is compiled on first use, or by :func:`warm_up`, and kept on disk
(:mod:`sllmdask.compiling`). Memory is given by address, as ``ctypes`` calls take it: the caller keeps it alive, and vouches
for `nbytes` of it.

All kernels live in this one file, because a change to a file invalidates only what was compiled from that file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core.cgutils import ir, raw_memcpy
from numba.core.registry import cpu_target

from sllmdask.compiling import instruction, kernel

# numba takes uint64 and a Python number together for a float64, so numbers in kernels have a type.
_0, _1, _2, _3, _4, _5, _6, _7, _8, _15, _16, _24, _32 = (np.uint64(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 24, 32))

# --- what numba has no name for --------------------------------------------------------------------------------------

_I8, _I16, _I32, _I64, _F32 = (*(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType())
_BYTES, _WORDS = ir.VectorType(_I8, 16), ir.VectorType(_I16, 16)
#: Processors that have the instruction PDEP, but are faster without it.
_SLOW_PDEP = ("bdver4", "znver1", "znver2")


def _machine() -> tuple[str, list[str]]:
    """The processor that code is made for, by LLVM's name, and what it can do."""
    _, name, features = cpu_target.target_context.codegen().magic_tuple()
    return name, [feature.removeprefix("+") for feature in features.split(",") if feature.startswith("+")]


@instruction(types.uint64(types.uint64))
def _load(builder: Any, address: Any) -> Any:
    """The eight bytes at `address`, aligned or not."""
    return builder.load(builder.inttoptr(address, _I64.as_pointer()), align=1)


@instruction(types.CPointer(types.uint8)(types.uint64))
def _u8(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I8.as_pointer())


@instruction(types.CPointer(types.uint16)(types.uint64))
def _u16(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I16.as_pointer())


@instruction(types.CPointer(types.uint32)(types.uint64))
def _u32(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I32.as_pointer())


@instruction(types.float32(types.uint32))
def _float_of(builder: Any, bits: Any) -> Any:
    return builder.bitcast(bits, _F32)


@instruction(types.uint32(types.float32))
def _bits_of(builder: Any, number: Any) -> Any:
    return builder.bitcast(number, _I32)


@instruction(types.uint64(types.uint64))
def _popcount(builder: Any, bits: Any) -> Any:
    return builder.ctpop(bits)


@instruction(types.int64(types.uint64, types.uint64, types.uint64))
def _copy(builder: Any, target: Any, source: Any, nbytes: Any) -> Any:
    """Copy `nbytes` from address `source` to address `target`. Returns 0: there is no instruction without a value."""
    raw_memcpy(builder, builder.inttoptr(target, _I8.as_pointer()), builder.inttoptr(source, _I8.as_pointer()), nbytes, 1)
    return _I64(0)


def _deposit_one_by_one(bits: Any, marks: Any, width: Any) -> Any:
    field = (_1 << width) - _1
    result = _0
    while marks:
        lowest = marks & (~marks + _1)
        result |= (bits & field) * lowest
        bits >>= width
        marks ^= lowest
    return result


@instruction(types.uint64(types.uint64, types.uint64, types.uint64))
def _deposit(builder: Any, bits: Any, marks: Any, width: Any) -> Any:
    """The next `width` of `bits`, from the lowest on, at each of `marks`: single bits, at least `width` apart. Between them 0."""
    name, features = _machine()
    if "bmi2" not in features or name in _SLOW_PDEP:
        signature = types.uint64(types.uint64, types.uint64, types.uint64)
        return cpu_target.target_context.compile_internal(builder, _deposit_one_by_one, signature, (bits, marks, width))
    pdep = builder.module.declare_intrinsic("llvm.x86.bmi.pdep.64", (), ir.FunctionType(_I64, [_I64, _I64]))
    return builder.call(pdep, [bits, builder.sub(builder.shl(marks, width), marks)])


@instruction(types.int64(*[types.uint64] * 6))
def _join(builder: Any, table_low: Any, table_high: Any, codes: Any, kept: Any, low: Any, target: Any) -> Any:
    """Write 16 numbers of 16 bits to address `target`, rotated right by one: ``table[code] | kept``, then a byte from `low` on.

    `codes` and `kept` are 16 times four bits; the table is 16 bytes. Returns 0.
    """

    def all_lanes(kind: Any, number: int) -> Any:
        return ir.Constant(kind, [number] * kind.count)

    def in_turn(one: Any, other: Any) -> Any:
        order = [lane for n in range(one.type.count) for lane in (n, one.type.count + n)]
        return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_I32, len(order)), order))

    def spread(word: Any) -> Any:
        even = builder.bitcast(word, ir.VectorType(_I8, 8))
        return builder.and_(in_turn(even, builder.lshr(even, all_lanes(even.type, 4))), all_lanes(_BYTES, 15))

    table = ir.Constant(ir.VectorType(_I64, 2), ir.Undefined)
    table = builder.insert_element(table, table_low, _I32(0))
    table = builder.bitcast(builder.insert_element(table, table_high, _I32(1)), _BYTES)
    codes = spread(codes)
    if "ssse3" in _machine()[1]:
        lookup = builder.module.declare_intrinsic("llvm.x86.ssse3.pshuf.b.128", (), ir.FunctionType(_BYTES, [_BYTES, _BYTES]))
        high = builder.call(lookup, [table, codes])
    else:
        high = ir.Constant(_BYTES, ir.Undefined)
        for lane in range(16):
            symbol = builder.extract_element(table, builder.extract_element(codes, _I32(lane)))
            high = builder.insert_element(high, symbol, _I32(lane))
    low_bytes = builder.load(builder.inttoptr(low, _BYTES.as_pointer()), align=1)
    words = builder.bitcast(in_turn(low_bytes, builder.or_(high, spread(kept))), _WORDS)
    words = builder.or_(builder.lshr(words, all_lanes(_WORDS, 1)), builder.shl(words, all_lanes(_WORDS, 15)))
    builder.store(words, builder.inttoptr(target, _WORDS.as_pointer()), align=1)
    return _I64(0)


@njit(inline="always")
def _put(target: Any, position: Any, number: Any, nbytes: int) -> None:
    """The last `nbytes` bytes of `number`, lowest first, to ``target[position:]``."""
    for n in range(nbytes):
        target[position + n] = np.uint8(np.uint64(number) >> np.uint64(8 * n))


@njit(inline="always")
def _rotated_number(data: Any, i: Any) -> Any:
    """The 16-bit number `i` of the bytes `data`, rotated left by one: the sign is its last bit."""
    high = np.int64(data[2 * i + 1])
    return ((high & 0x7F) << 9) | (np.int64(data[2 * i]) << 1) | (high >> 7)


# --- checksum --------------------------------------------------------------------------------------------------------

_PRIME_1, _PRIME_2, _PRIME_3, _PRIME_4, _PRIME_5 = (
    np.uint64(prime)
    for prime in (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
)


@njit(inline="always")
def _rotated(word: Any, n_bits: int) -> Any:
    return (word << np.uint64(n_bits)) | (word >> np.uint64(64 - n_bits))


@njit(inline="always")
def _round(lane: Any, word: Any) -> Any:
    return _rotated(lane + word * _PRIME_2, 31) * _PRIME_1


@njit(inline="always")
def _merged(result: Any, lane: Any) -> Any:
    return (result ^ _round(_0, lane)) * _PRIME_1 + _PRIME_4


@kernel
def _xxh64(address: int, nbytes: int) -> Any:
    position, left = np.uint64(address), np.uint64(nbytes)
    if nbytes >= 32:
        lane1, lane2, lane3, lane4 = _PRIME_1 + _PRIME_2, _PRIME_2, _0, _0 - _PRIME_1
        for _ in range(left >> _5):
            lane1 = _round(lane1, _load(position))
            lane2 = _round(lane2, _load(position + _8))
            lane3 = _round(lane3, _load(position + _16))
            lane4 = _round(lane4, _load(position + _24))
            position += _32
        result = _rotated(lane1, 1) + _rotated(lane2, 7) + _rotated(lane3, 12) + _rotated(lane4, 18)
        result = _merged(_merged(_merged(_merged(result, lane1), lane2), lane3), lane4)
        left &= np.uint64(31)
    else:
        result = _PRIME_5
    result += np.uint64(nbytes)
    while left >= _8:
        result = _rotated(result ^ _round(_0, _load(position)), 27) * _PRIME_1 + _PRIME_4
        position, left = position + _8, left - _8
    if left >= _4:
        # Not a load of eight bytes: they may end outside.
        tail = carray(_u8(position), 4)
        word = _0
        for n in range(4):
            word |= np.uint64(tail[n]) << np.uint64(8 * n)
        result = _rotated(result ^ (word * _PRIME_1), 23) * _PRIME_2 + _PRIME_3
        position, left = position + _4, left - _4
    for byte in carray(_u8(position), np.int64(left)):
        result = _rotated(result ^ (np.uint64(byte) * _PRIME_5), 11) * _PRIME_1
    result = (result ^ (result >> np.uint64(33))) * _PRIME_2
    result = (result ^ (result >> np.uint64(29))) * _PRIME_3
    return result ^ (result >> _32)


def xxh64(address: int, nbytes: int) -> int:
    """XXH64 with seed 0 of the `nbytes` at `address`, which need not be aligned.

    Source: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
    """
    return int(_xxh64(address, nbytes))


# --- change of dtype -------------------------------------------------------------------------------------------------

_SIGN, _INFINITY, _QUIET = np.uint32(0x80000000), np.uint32(0x7F800000), np.uint32(0x400000)
#: Bits of float32: the least that float16 takes for infinity before rounding (2**16), its least normal number (2**-14), and a
#: number to which a subnormal one is added so that the sum's last bits are those of a float16 (2**-1).
_HALF_OVERFLOW, _HALF_NORMAL, _HALF_SHIFT = np.uint32(0x47800000), np.uint32(0x38800000), np.uint32(0x3F000000)


@njit(inline="always")
def _bfloat16_of(bits: Any) -> Any:
    """Rounds to nearest, ties to even: bits of float32 to bits of bfloat16."""
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    is_nan = (bits & ~_SIGN) > _INFINITY
    return np.uint16((bits | _QUIET if is_nan else rounded) >> np.uint32(16))


@njit(inline="always")
def _float16_of(bits: Any) -> Any:
    """Rounds to nearest, ties to even: bits of float32 to bits of float16. After F. Giesen, "float->half variants"."""
    magnitude = bits & ~_SIGN
    normal = (magnitude - np.uint32(0x38000000 - 0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
    subnormal = _bits_of(_float_of(magnitude) + _float_of(_HALF_SHIFT)) - _HALF_SHIFT
    nan = np.uint32(0x7E00) | ((magnitude >> np.uint32(13)) & np.uint32(0x3FF))
    special = nan if magnitude > _INFINITY else np.uint32(0x7C00)
    finite = subnormal if magnitude < _HALF_NORMAL else normal
    return np.uint16((special if magnitude >= _HALF_OVERFLOW else finite) | ((bits & _SIGN) >> np.uint32(16)))


@njit(inline="always")
def _from_float16(half: Any) -> Any:
    """Bits of float16 to bits of float32; exact. After F. Giesen, "half->float"."""
    bits = np.uint32(half)
    shifted = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    exponent = shifted & np.uint32(0x7C00 << 13)
    normal = shifted + np.uint32(112 << 23)
    special = (shifted | _INFINITY) | (_QUIET if shifted > exponent else np.uint32(0))
    subnormal = _bits_of(_float_of(normal + np.uint32(1 << 23)) - _float_of(_HALF_NORMAL))
    finite = subnormal if exponent == 0 else normal
    magnitude = special if exponent == np.uint32(0x7C00 << 13) else finite
    return magnitude | ((bits & np.uint32(0x8000)) << np.uint32(16))


@kernel
def _cast(conversion: int, source: int, target: int, n: int) -> None:
    from_address, to_address = np.uint64(source), np.uint64(target)
    words, half_words = carray(_u32(from_address), n), carray(_u16(from_address), n)
    target_words, target_half_words = carray(_u32(to_address), n), carray(_u16(to_address), n)
    if conversion == 0:
        for i in range(n):
            target_half_words[i] = _bfloat16_of(words[i])
    elif conversion == 1:
        for i in range(n):
            target_half_words[i] = _float16_of(words[i])
    elif conversion == 2:
        for i in range(n):
            target_words[i] = np.uint32(half_words[i]) << np.uint32(16)
    elif conversion == 3:
        for i in range(n):
            target_half_words[i] = _float16_of(np.uint32(half_words[i]) << np.uint32(16))
    elif conversion == 4:
        for i in range(n):
            target_words[i] = _from_float16(half_words[i])
    else:
        for i in range(n):
            target_half_words[i] = _bfloat16_of(_from_float16(half_words[i]))


#: (from, to), named as in a safetensors header, in the order of `_cast`.
CONVERSIONS = (("F32", "BF16"), ("F32", "F16"), ("BF16", "F32"), ("BF16", "F16"), ("F16", "F32"), ("F16", "BF16"))


def cast(source: int, source_dtype: str, target: int, target_dtype: str, n: int) -> None:
    """Convert `n` numbers at address `source` to another dtype at address `target`: one of :data:`CONVERSIONS`.

    Rounds to nearest, ties to even, as ``torch.Tensor.to`` does. A NaN stays one, with its sign and the upper bits of its
    payload, made quiet where float16 takes part or bits are lost (torch itself is of several minds). Source and target are
    aligned to their elements and do not overlap. Raises :class:`ValueError` for dtypes that are not in the table.
    """
    try:
        conversion = CONVERSIONS.index((source_dtype, target_dtype))
    except ValueError:
        raise ValueError(f"no conversion from {source_dtype} to {target_dtype}") from None
    _cast(conversion, source, target, n)


# --- codec "split16": the format is described in codec.py ------------------------------------------------------------

#: Bytes of the header of a stream, and of each of its blocks.
HEADER, BLOCK_HEADER = 16, 32
#: b"SP16", version 1: the first five bytes of a stream.
_MAGIC = np.uint64(int.from_bytes(b"SP16\x01", "little"))
#: What :func:`split16_decode` finds wrong; 0 is nothing.
FAULTS = (
    "",
    "it does not begin as such data does",
    "it decodes to another number of bytes",
    "it is longer or shorter than it says",
    "the header of a block is invalid",
    "a block ends behind the end of the data",
    "the codes of a block contradict its header",
    "an exception is no number of its block",
)
_NOTHING, _BEGIN, _TARGET, _LENGTH, _BLOCK, _END, _CODES, _EXCEPTIONS = range(8)

_BYTE_MASK, _HALF_MASK = np.uint64(0xFF), np.uint64(0xFFFFFFFF)
_HEADER_NBYTES, _BLOCK_HEADER_NBYTES = np.uint64(HEADER), np.uint64(BLOCK_HEADER)
#: The lowest of each four bits, and in each byte the bits that a symbol of five bits has not.
_EACH_4, _NOT_5_BITS = np.uint64(0x1111111111111111), np.uint64(0xE0E0E0E0E0E0E0E0)
_NO_CODE = np.uint64(1 << 63)


@kernel
def _split16_decode(source_address: int, source_nbytes: int, target_address: int, target_nbytes: int) -> int:
    # Every length is below 2**33, so that no sum of a few of them wraps around.
    source, end, target = np.uint64(source_address), np.uint64(source_address + source_nbytes), np.uint64(target_address)
    if source_nbytes < HEADER:
        return _BEGIN
    word = _load(source)
    log2_block = (word >> np.uint64(40)) & _BYTE_MASK
    if word & np.uint64((1 << 40) - 1) != _MAGIC or word >> np.uint64(48) != _0 or log2_block < _4 or log2_block > _16:
        return _BEGIN
    word = _load(source + _8)
    n_numbers = word & _HALF_MASK
    if n_numbers << _1 != np.uint64(target_nbytes):
        return _TARGET
    if word >> _32 != np.uint64(source_nbytes):
        return _LENGTH
    source += _HEADER_NBYTES
    left = n_numbers & ~_15
    while left:
        n = min(left, _1 << log2_block)
        left -= n
        if end - source < _BLOCK_HEADER_NBYTES:
            return _END
        word = _load(source)
        kind, n_codes2 = word & _HALF_MASK, word >> _32
        word = _load(source + _8)
        n_codes3, n_exceptions = word & _HALF_MASK, word >> _32
        table_low, table_high = _load(source + _16), _load(source + _24)
        source += _BLOCK_HEADER_NBYTES
        if kind == _0:
            if n_codes2 | n_codes3 | n_exceptions | table_low | table_high != _0:
                return _BLOCK
            if end - source < n << _1:
                return _END
            _copy(target, source, n << _1)
            source += n << _1
            target += n << _1
            continue
        n_kept = _3 if kind == _2 else _0
        if kind > _2 or n_codes2 > n or n_codes3 > n_codes2 or n_exceptions > n or table_high >> np.uint64(48) != _0:
            return _BLOCK
        if n_kept and (table_low | table_high) & _NOT_5_BITS != _0:
            return _BLOCK
        codes1 = source
        codes2 = codes1 + (n >> _2)
        codes3 = codes2 + ((n_codes2 + _3) >> _2)
        kept = codes3 + ((n_codes3 * _3 + _7) >> _3)
        exceptions = kept + ((n * n_kept) >> _3)
        low = exceptions + n_exceptions * _3
        source = low + n
        if source > end:
            return _END
        # Inside the loop nothing is checked, and nothing need be: whatever the codes, fewer than n / 4 + 8 bytes are read from
        # codes2 on and 3 * n / 8 + 8 from codes3 on, and `low`, the last part, has n bytes, which is no less.
        table_low, table_high = table_low << n_kept, table_high << n_kept
        block, bit2, bit3 = target, _0, _0
        for _ in range(n >> _4):
            # A word of 16 codes, four bits each. Where one is 3, the next code of that number is added.
            codes = _deposit(_load(codes1), _EACH_4, _2)
            escapes = codes & (codes >> _1) & _EACH_4
            more = _deposit(_load(codes2 + (bit2 >> _3)) >> (bit2 & _7), escapes, _2)
            bit2 += _popcount(escapes) << _1
            codes += more
            escapes = more & (more >> _1) & _EACH_4
            codes += _deposit(_load(codes3 + (bit3 >> _3)) >> (bit3 & _7), escapes, _3)
            bit3 += _popcount(escapes) * _3
            if n_kept:
                _join(table_low, table_high, codes, _deposit(_load(kept), _EACH_4, _3), low, target)
                kept += _6
            else:
                _join(table_low, table_high, codes, _0, low, target)
            codes1, low, target = codes1 + _4, low + _16, target + _32
        if bit2 != n_codes2 << _1 or bit3 != n_codes3 * _3:
            return _CODES
        # Positions, then symbols: neither is aligned, and the target need not be.
        positions = carray(_u8(exceptions), np.int64(n_exceptions << _1))
        symbols = carray(_u8(exceptions + (n_exceptions << _1)), np.int64(n_exceptions))
        numbers = carray(_u8(block), np.int64(n << _1))
        n_unchanged = 8 + np.int64(n_kept)
        for i in range(np.int64(n_exceptions)):
            position, symbol = np.int64(positions[2 * i]) | (np.int64(positions[2 * i + 1]) << 8), np.int64(symbols[i])
            if position >= np.int64(n) or symbol >> (16 - n_unchanged):
                return _EXCEPTIONS
            rotated = (_rotated_number(numbers, position) & ((1 << n_unchanged) - 1)) | (symbol << n_unchanged)
            _put(numbers, 2 * position, (rotated >> 1) | (rotated << 15), 2)
    tail = (n_numbers & _15) << _1
    if end - source != tail:
        return _LENGTH
    _copy(target, source, tail)
    return _NOTHING


def split16_decode(source: int, source_nbytes: int, target: int, target_nbytes: int) -> int:
    """Decode to exactly `target_nbytes` at `target`, or return what is wrong: an index of :data:`FAULTS`, 0 for nothing.

    Whatever the source holds, nothing outside source and target is read or written. Both have less than 2**32 bytes.
    """
    return int(_split16_decode(source, source_nbytes, target, target_nbytes))


@kernel
def _split16_encode(source_address: int, n_numbers: int, target_address: int, log2_block: int) -> int:
    n_blocked = n_numbers & ~15
    n_blocks = (n_blocked + (1 << log2_block) - 1) >> log2_block
    data = carray(_u8(np.uint64(source_address)), 2 * n_numbers)
    target = carray(_u8(np.uint64(target_address)), HEADER + n_blocks * BLOCK_HEADER + 2 * n_numbers)
    counts, totals, symbols = np.zeros((4, 256), np.int64), np.zeros((2, 256), np.int64), np.zeros((2, 14), np.int64)
    codes = np.zeros(256, np.uint64)
    end = HEADER
    for start in range(0, n_blocked, 1 << log2_block):
        n = min(n_blocked - start, 1 << log2_block)
        # Four tables, so that one count need not wait for the one before.
        counts[:] = 0
        for i in range(start, start + n, 4):
            for k in range(4):
                counts[k, _rotated_number(data, i + k) >> 8] += 1
        totals[:] = 0
        for high in range(256):
            count = counts[0, high] + counts[1, high] + counts[2, high] + counts[3, high]
            totals[0, high] = count
            totals[1, high >> 3] += count
        least, kind, n_codes2, n_codes3, n_exceptions = 2 * n, 0, 0, 0, 0
        for n_kept in range(0, 4, 3):
            total = totals[n_kept // 3]
            short, middle, long = 0, 0, 0
            for rank in range(14):
                symbol = np.argmax(total)
                symbols[n_kept // 3, rank] = symbol
                if rank < 3:
                    short += total[symbol]
                elif rank < 6:
                    middle += total[symbol]
                else:
                    long += total[symbol]
                total[symbol] = -1
            rest = n - short - middle - long
            nbytes = n // 4 + (middle + long + 3) // 4 + (3 * long + 7) // 8 + n * n_kept // 8 + 3 * rest + n
            if nbytes < least:
                least, kind, n_codes2, n_codes3, n_exceptions = nbytes, 1 + n_kept // 3, middle + long, long, rest
        for i in range(end, end + BLOCK_HEADER):
            target[i] = 0
        if kind == 0:
            end += BLOCK_HEADER
            for i in range(2 * n):
                target[end + i] = data[2 * start + i]
            end += 2 * n
            continue
        target[end] = kind
        _put(target, end + 4, n_codes2, 4)
        _put(target, end + 8, n_codes3, 4)
        _put(target, end + 12, n_exceptions, 4)
        # For each symbol its three codes and the bits of the second and of the third, in a byte each. An exception has code 0.
        codes[:] = _NO_CODE
        for rank in range(14):
            symbol = symbols[kind - 1, rank]
            target[end + 16 + rank] = symbol
            if rank < 3:
                codes[symbol] = rank
            elif rank < 6:
                codes[symbol] = 3 | ((rank - 3) << 8) | (2 << 24)
            else:
                codes[symbol] = 3 | (3 << 8) | ((rank - 6) << 16) | (2 << 24) | (3 << 32)
        n_kept = 3 if kind == 2 else 0
        at1 = end + BLOCK_HEADER
        at2 = at1 + n // 4
        at3 = at2 + (n_codes2 + 3) // 4
        at_kept = at3 + (3 * n_codes3 + 7) // 8
        at_position = at_kept + n * n_kept // 8
        at_symbol = at_position + 2 * n_exceptions
        at_low = at_symbol + n_exceptions
        end = at_low + n
        bits2, bits3, n_bits2, n_bits3 = _0, _0, _0, _0
        for group in range(0, n, 8):
            bits1, bits_kept = _0, _0
            for i in range(8):
                number = _rotated_number(data, start + group + i)
                target[at_low + group + i] = np.uint8(number & 0xFF)
                symbol = number >> (8 + n_kept)
                code = codes[symbol]
                if code == _NO_CODE:
                    _put(target, at_position, group + i, 2)
                    target[at_symbol] = symbol
                    at_position, at_symbol, code = at_position + 2, at_symbol + 1, _0
                bits1 |= (code & _BYTE_MASK) << np.uint64(2 * i)
                bits2 |= ((code >> _8) & _BYTE_MASK) << n_bits2
                bits3 |= ((code >> _16) & _BYTE_MASK) << n_bits3
                n_bits2 += (code >> _24) & _BYTE_MASK
                n_bits3 += code >> _32
                bits_kept |= np.uint64((number >> 8) & 7) << np.uint64(3 * i)
            _put(target, at1, bits1, 2)
            at1 += 2
            if n_kept:
                _put(target, at_kept, bits_kept, 3)
                at_kept += 3
            # Up to 31 bits wait, and eight numbers add up to 24.
            if n_bits2 >= _32:
                _put(target, at2, bits2, 4)
                at2, bits2, n_bits2 = at2 + 4, bits2 >> _32, n_bits2 - _32
            if n_bits3 >= _32:
                _put(target, at3, bits3, 4)
                at3, bits3, n_bits3 = at3 + 4, bits3 >> _32, n_bits3 - _32
        for k in range((np.int64(n_bits2) + 7) // 8):
            _put(target, at2 + k, bits2 >> np.uint64(8 * k), 1)
        for k in range((np.int64(n_bits3) + 7) // 8):
            _put(target, at3 + k, bits3 >> np.uint64(8 * k), 1)
    tail = 2 * (n_numbers - n_blocked)
    for i in range(tail):
        target[end + i] = data[2 * n_blocked + i]
    end += tail
    _put(target, 0, _MAGIC, 5)
    target[5], target[6], target[7] = log2_block, 0, 0
    _put(target, 8, n_numbers, 4)
    _put(target, 12, end, 4)
    return end


def split16_encode(source: int, n_numbers: int, target: int, log2_block: int) -> int:
    """Encode 16-bit numbers in blocks of ``2**log2_block``; returns the bytes written, at most :func:`split16_bound`."""
    return int(_split16_encode(source, n_numbers, target, log2_block))


def split16_bound(n_numbers: int, log2_block: int) -> int:
    """The most bytes that `n_numbers` are encoded to."""
    return HEADER + -(-n_numbers >> log2_block) * BLOCK_HEADER + 2 * n_numbers


# ---------------------------------------------------------------------------------------------------------------------

_SIGNATURES = (
    (_xxh64, "(int64, int64)"),
    (_cast, "(int64, int64, int64, int64)"),
    (_split16_decode, "(int64, int64, int64, int64)"),
    (_split16_encode, "(int64, int64, int64, int64)"),
)


def warm_up(*, encoder: bool = True) -> None:
    """Compile every kernel, or fetch it from the disk. May run in a thread of its own; a second call does nothing.

    Without `encoder`, which only writing needs, it takes half of the time where nothing is on the disk yet.
    """
    for compiled, signature in _SIGNATURES:
        if encoder or compiled is not _split16_encode:
            compiled.compile(signature)
