"""Paged attention on the CPU, compiled by numba. A row's result depends on nothing but the row.

A row (one token, one head) goes through its own keys in chunks of 32, which begin at multiples of 32 of their position, whatever
the block size is, and keeps a running maximum, a running sum and running values. Each sum is a chain of fused multiply-adds
(one rounding each) in the order of the index: IEEE 754 leaves nothing open, and nothing here lets the compiler reorder it. So
how many rows are computed together, and by how many threads, is free to be what is fastest, and the bits are the same: for a
row in a chunk of a prompt, alone, or computed again after a preemption.

What is fast: the rows of a tile share each chunk of keys, which is widened to float32 and transposed once, so that 32 scores
are two vectors and four rows are computed at a time. Memory is given by address: the caller keeps it alive.

Source: online softmax, Milakov and Gimelshein 2018; tiles, FlashAttention (Dao et al., NeurIPS '22); the exponential is that of
the Cephes library (Moshier).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.core import cgutils
from numba.core.cgutils import ir
from torch import Tensor

from sllmdask.compiling import instruction, kernel
from sllmdask.engine.attention import AttentionOptions, PackedBatch, Span, TorchStore

#: Keys of one chunk, floats of one vector, rows that are computed at a time, and floats that the values of a row are padded to.
_CHUNK, _LANES, _ROWS, _PADDING = 32, 16, 4, 32
#: Rows of one head that share a chunk of keys.
_ROWS_OF_TILE = 32
#: Multiply-adds below which waking another thread costs more than it saves.
_WORK_OF_THREAD = 1 << 20

# --- vectors, in LLVM's own language ---------------------------------------------------------------------------------

_I16, _I32, _I64, _F32 = (*(ir.IntType(n) for n in (16, 32, 64)), ir.FloatType())
_VECTOR, _HALVES, _WORDS = (ir.VectorType(kind, _LANES) for kind in (_F32, _I16, _I32))
_I64_TYPE = types.int64


def _at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """The pointer to a `kind` at `address` plus `offset` bytes."""
    return builder.inttoptr(builder.add(address, _I64(offset)) if offset else address, kind.as_pointer())


def _load(builder: Any, address: Any, offset: int = 0) -> Any:
    return builder.load(_at(builder, address, offset, _VECTOR), align=4)


def _store(builder: Any, vector: Any, address: Any, offset: int = 0) -> None:
    builder.store(vector, _at(builder, address, offset, _VECTOR), align=4)


def _load_halves(builder: Any, address: Any) -> Any:
    """16 numbers of bfloat16 as float32; exact."""
    words = builder.zext(builder.load(_at(builder, address, 0, _HALVES), align=2), _WORDS)
    return builder.bitcast(builder.shl(words, ir.Constant(_WORDS, [16] * _LANES)), _VECTOR)


def _shuffle(builder: Any, one: Any, other: Any, order: Sequence[int]) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_I32, len(order)), list(order)))


def _everywhere(builder: Any, number: Any) -> Any:
    """A vector of sixteen times `number`."""
    single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, _I32(0))
    return _shuffle(builder, single, single, [0] * _LANES)


def _fma(builder: Any, one: Any, other: Any, addend: Any) -> Any:
    """``one * other + addend``, rounded once."""
    kind = one.type
    name = "llvm.fma.v16f32" if kind == _VECTOR else "llvm.fma.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(function, [one, other, addend])


@instruction(types.float32(types.float32, types.float32, types.float32))
def _fused(builder: Any, one: Any, other: Any, addend: Any) -> Any:
    """``one * other + addend``, rounded once."""
    return _fma(builder, one, other, addend)


@instruction(types.float32(types.float32))
def _floor(builder: Any, number: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_F32, [_F32]), "llvm.floor.f32")
    return builder.call(function, [number])


@instruction(types.float32(types.int32))
def _float_of(builder: Any, bits: Any) -> Any:
    return builder.bitcast(bits, _F32)


@instruction(types.CPointer(types.float32)(types.int64))
def _floats(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _F32.as_pointer())


@instruction(types.CPointer(types.uint16)(types.int64))
def _shorts(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I16.as_pointer())


@instruction(types.float32(types.int64))
def _largest(builder: Any, scores: Any) -> Any:
    """The largest of the 32 floats at `scores`; those that are not numbers are passed over."""

    def larger(one: Any, other: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", one, other), one, other)

    vector = larger(_load(builder, scores), larger(_load(builder, scores, 64), ir.Constant(_VECTOR, [-np.inf] * _LANES)))
    for width in (8, 4, 2, 1):
        vector = larger(vector, _shuffle(builder, vector, vector, [(lane + width) % _LANES for lane in range(_LANES)]))
    return builder.extract_element(vector, _I32(0))


@instruction(_I64_TYPE(*[_I64_TYPE] * 2))
def _prefetch(builder: Any, address: Any, nbytes: Any) -> Any:
    """Have the `nbytes` from `address` on brought near: a head's numbers of one token lie far from those of the next."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    with cgutils.for_range(builder, builder.udiv(builder.add(nbytes, _I64(63)), _I64(64))) as loop:
        line = builder.add(address, builder.mul(loop.index, _I64(64)))
        # To read; near all levels of the cache; data.
        builder.call(function, [builder.inttoptr(line, pointer), _I32(0), _I32(3), _I32(1)])
    return _I64(0)


def _transpose(builder: Any, rows: Any, offset: Any, target: Any, load: Callable[[Any, Any], Any]) -> Any:
    """16 floats of each of 16 rows, whose addresses are at `rows`, to 16 lines at `target`, 128 bytes apart."""
    vectors = []
    for lane in range(_LANES):
        row = builder.load(_at(builder, rows, 8 * lane, _I64), align=8)
        vectors.append(load(builder, builder.add(row, offset)))
    # Blocks of 1, 2, 4 and 8 lanes change places across the diagonal.
    for block in (1, 2, 4, 8):
        for low in (number for number in range(_LANES) if not number & block):
            upper, lower = vectors[low], vectors[low + block]
            kept = [lane if not lane & block else _LANES + lane - block for lane in range(_LANES)]
            moved = [lane + block if not lane & block else _LANES + lane for lane in range(_LANES)]
            vectors[low] = _shuffle(builder, upper, lower, kept)
            vectors[low + block] = _shuffle(builder, upper, lower, moved)
    for line, vector in enumerate(vectors):
        _store(builder, vector, target, 4 * _CHUNK * line)
    return _I64(0)


@instruction(_I64_TYPE(*[_I64_TYPE] * 3))
def _transpose_floats(builder: Any, rows: Any, offset: Any, target: Any) -> Any:
    return _transpose(builder, rows, offset, target, _load)


@instruction(_I64_TYPE(*[_I64_TYPE] * 3))
def _transpose_halves(builder: Any, rows: Any, offset: Any, target: Any) -> Any:
    return _transpose(builder, rows, offset, target, _load_halves)


@instruction(_I64_TYPE(*[_I64_TYPE] * 2))
def _copy_floats(builder: Any, source: Any, target: Any) -> Any:
    """16 floats from `source` to `target`."""
    _store(builder, _load(builder, source), target)
    return _I64(0)


@instruction(_I64_TYPE(*[_I64_TYPE] * 2))
def _copy_halves(builder: Any, source: Any, target: Any) -> Any:
    """16 numbers of bfloat16 from `source`, as floats, to `target`."""
    _store(builder, _load_halves(builder, source), target)
    return _I64(0)


def _scores(builder: Any, queries: Sequence[Any], keys: Any, n_dims: Any, target: Any) -> Any:
    """Products of queries with the 32 keys of a transposed chunk, to lines of 32 floats at `target`; sums in order of index."""
    sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(2)] for _ in queries]
    for cell in (cell for line in sums for cell in line):
        builder.store(ir.Constant(_VECTOR, [0.0] * _LANES), cell)
    with cgutils.for_range(builder, n_dims) as loop:
        line = builder.add(keys, builder.mul(loop.index, _I64(4 * _CHUNK)))
        columns = [_load(builder, line), _load(builder, line, 4 * _LANES)]
        place = builder.mul(loop.index, _I64(4))
        for query, cells in zip(queries, sums, strict=True):
            number = builder.load(_at(builder, builder.add(query, place), 0, _F32), align=4)
            factor = _everywhere(builder, number)
            for cell, column in zip(cells, columns, strict=True):
                builder.store(_fma(builder, factor, column, builder.load(cell)), cell)
    for row, cells in enumerate(sums):
        for half, cell in enumerate(cells):
            _store(builder, builder.load(cell), target, 4 * (row * _CHUNK + half * _LANES))
    return _I64(0)


@instruction(_I64_TYPE(*[_I64_TYPE] * 4))
def _scores_of_one(builder: Any, query: Any, keys: Any, n_dims: Any, target: Any) -> Any:
    return _scores(builder, [query], keys, n_dims, target)


@instruction(_I64_TYPE(*[_I64_TYPE] * 7))
def _scores_of_four(builder: Any, one: Any, two: Any, three: Any, four: Any, keys: Any, n_dims: Any, target: Any) -> Any:
    return _scores(builder, [one, two, three, four], keys, n_dims, target)


def _add_values(
    builder: Any, n_rows: int, n_vectors: int, weights: Any, first: Any, stop: Any, values: Any, pitch: Any, sums: Any, apart: Any
) -> Any:
    """Add the keys' values, `pitch` bytes apart, times their weights to the running values of `n_rows` rows, `apart` bytes apart.

    One key after the other, from `first` up to `stop`; `n_vectors` times 16 columns.
    """
    cells = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(n_vectors)] for _ in range(n_rows)]
    places = [builder.add(sums, builder.mul(apart, _I64(row))) for row in range(n_rows)]
    for place, line in zip(places, cells, strict=True):
        for number, cell in enumerate(line):
            builder.store(_load(builder, place, 4 * _LANES * number), cell)
    with cgutils.for_range(builder, stop, start=first) as loop:
        value = builder.add(values, builder.mul(loop.index, pitch))
        columns = [_load(builder, value, 4 * _LANES * number) for number in range(n_vectors)]
        weight = builder.add(weights, builder.mul(loop.index, _I64(4)))
        for row, line in enumerate(cells):
            factor = _everywhere(builder, builder.load(_at(builder, weight, 4 * _CHUNK * row, _F32), align=4))
            for cell, column in zip(line, columns, strict=True):
                builder.store(_fma(builder, factor, column, builder.load(cell)), cell)
    for place, line in zip(places, cells, strict=True):
        for number, cell in enumerate(line):
            _store(builder, builder.load(cell), place, 4 * _LANES * number)
    return _I64(0)


@instruction(_I64_TYPE(*[_I64_TYPE] * 6))
def _add_to_one(builder: Any, weights: Any, first: Any, stop: Any, values: Any, pitch: Any, sums: Any) -> Any:
    return _add_values(builder, 1, 2, weights, first, stop, values, pitch, sums, _I64(0))


@instruction(_I64_TYPE(*[_I64_TYPE] * 6))
def _add_to_one_wide(builder: Any, weights: Any, first: Any, stop: Any, values: Any, pitch: Any, sums: Any) -> Any:
    return _add_values(builder, 1, 4, weights, first, stop, values, pitch, sums, _I64(0))


@instruction(_I64_TYPE(*[_I64_TYPE] * 5))
def _add_to_four(builder: Any, weights: Any, values: Any, pitch: Any, sums: Any, apart: Any) -> Any:
    return _add_values(builder, 4, 2, weights, _I64(0), _I64(_CHUNK), values, pitch, sums, apart)


# --- arithmetic ------------------------------------------------------------------------------------------------------

# Every number has its type: numba would compute with Python's in float64.
_ZERO, _HALF, _ONE, _TWO = (np.float32(number) for number in (0, 0.5, 1, 2))
_LOWEST, _LOG2E = np.float32(-87.0), np.float32(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C0, _C1, _C2, _C3, _C4, _C5 = (
    np.float32(number)
    for number in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
_BIAS, _SHIFT = np.int32(127), np.int32(23)
_NEVER = np.float32(-np.inf)


@njit(inline="always")
def _exponential(x: Any) -> Any:
    """``exp(x)`` for x <= 0 within two units in the last place; 0 below -87; not a number stays that."""
    above = x if x > _LOWEST else _LOWEST
    whole = _floor(_fused(above, _LOG2E, _HALF))
    rest = _fused(whole, -_LN2_LOW, _fused(whole, -_LN2_HIGH, x))
    series = _fused(_fused(_fused(_fused(_fused(_C0, rest, _C1), rest, _C2), rest, _C3), rest, _C4), rest, _C5)
    result = (_fused(series, rest * rest, rest) + _ONE) * _float_of((np.int32(whole) + _BIAS) << _SHIFT)
    return _ZERO if x < _LOWEST else result


@njit(inline="always")
def _hyperbolic_tangent(x: Any) -> Any:
    shrunk = _exponential(-_TWO * abs(x))
    size = (_ONE - shrunk) / (_ONE + shrunk)
    return -size if x < _ZERO else size


@njit(inline="always")
def _widened(address: Any, is_half: Any) -> Any:
    """The number at `address` as float32."""
    if is_half:
        number = _float_of(np.int32(np.uint32(carray(_shorts(address), 1)[0]) << np.uint32(16)))
    else:
        number = carray(_floats(address), 1)[0]
    return number


@njit
def _load_chunk(
    key_rows: Any, value_rows: Any, n_keys: int, is_half: Any, key_dim: int, value_dim: int, keys: int, values: int, pitch: int
) -> None:
    """Keys transposed to `keys` (key_dim, 32), values to `values` (32, pitch in bytes)."""
    rows = np.int64(key_rows.ctypes.data)
    itemsize = 2 if is_half else 4
    for first in range(0, n_keys, _LANES):
        for key in range(n_keys, first + _LANES):
            key_rows[key] = key_rows[n_keys - 1]
        whole = key_dim // _LANES * _LANES
        for dim in range(0, whole, _LANES):
            target = keys + 4 * (dim * _CHUNK + first)
            if is_half:
                _transpose_halves(rows + 8 * first, dim * itemsize, target)
            else:
                _transpose_floats(rows + 8 * first, dim * itemsize, target)
        for dim in range(whole, key_dim):
            line = carray(_floats(keys + 4 * (dim * _CHUNK + first)), _LANES)
            for lane in range(_LANES):
                line[lane] = _widened(key_rows[first + lane] + dim * itemsize, is_half)
    whole = value_dim // _LANES * _LANES
    for key in range(n_keys):
        for dim in range(0, whole, _LANES):
            if is_half:
                _copy_halves(value_rows[key] + dim * itemsize, values + key * pitch + 4 * dim)
            else:
                _copy_floats(value_rows[key] + dim * itemsize, values + key * pitch + 4 * dim)
        tail = carray(_floats(values + key * pitch + 4 * whole), value_dim - whole)
        for dim in range(value_dim - whole):
            tail[dim] = _widened(value_rows[key] + (whole + dim) * itemsize, is_half)


@njit
def _weigh(
    scores: int, first: int, stop: int, scaling: Any, softcap: Any, top: Any, sums: int, values: int, n_columns: int
) -> Any:
    """Scores of one row to weights, of the keys `first` to `stop` of a chunk; returns the row's largest score so far.

    Its running sums (32) and running values are scaled down to that.
    """
    line = carray(_floats(scores), _CHUNK)
    for lane in range(_CHUNK):
        line[lane] = line[lane] * scaling
    if softcap > _ZERO:
        for lane in range(_CHUNK):
            line[lane] = softcap * _hyperbolic_tangent(line[lane] / softcap)
    if first > 0 or stop < _CHUNK:
        for lane in range(_CHUNK):
            line[lane] = line[lane] if first <= lane < stop else _NEVER
    found = _largest(scores)
    new_top = found if found > top else top
    total = carray(_floats(sums), _CHUNK)
    if new_top != top:
        shrunk = _exponential(top - new_top)
        for lane in range(_CHUNK):
            total[lane] *= shrunk
        running = carray(_floats(values), n_columns)
        for column in range(n_columns):
            running[column] *= shrunk
    for lane in range(_CHUNK):
        weight = _exponential(line[lane] - new_top)
        line[lane] = weight
        total[lane] += weight
    return new_top


@kernel
def _attend(
    query: int,
    output: int,
    keys: int,
    values: int,
    is_half: bool,
    shape: tuple[int, int, int, int, int],
    tiles: Any,
    block_tables: Any,
    scaling: Any,
    window: int,
    softcap: Any,
    sinks: Any,
    first_item: int,
    step: int,
) -> int:
    """Every `step`-th pair of a tile and a KV head, from `first_item` on. Returns how many.

    `query` and `output` float32 (T, Hq, D); `shape`: block size, KV heads, query heads of each, dimensions of keys and of values;
    `tiles` int32 (n, 4): sequence, first packed row, rows, position of the first; `window` 0 and `softcap` 0: none; `sinks`
    float32 (Hq,) or empty.
    """
    block_size, n_kv_heads, group, key_dim, value_dim = shape
    itemsize = 2 if is_half else 4
    n_columns = (value_dim + _PADDING - 1) // _PADDING * _PADDING
    pitch = 4 * n_columns
    most = 0
    for tile in range(tiles.shape[0]):
        most = max(most, tiles[tile, 2] * group)
    key_rows, value_rows = np.zeros(_CHUNK, np.int64), np.zeros(_CHUNK, np.int64)
    chunk_keys = np.zeros((key_dim, _CHUNK), np.float32)
    # The columns that only pad stay 0.
    chunk_values = np.zeros((_CHUNK, n_columns), np.float32)
    weights = np.zeros((_ROWS, _CHUNK), np.float32)
    firsts, stops, where = np.zeros(_ROWS, np.int64), np.zeros(_ROWS, np.int64), np.zeros(_ROWS, np.int64)
    tops = np.zeros(most, np.float32)
    sums = np.zeros((most, _CHUNK), np.float32)
    running = np.zeros((most, n_columns), np.float32)
    keys_at, values_at = np.int64(chunk_keys.ctypes.data), np.int64(chunk_values.ctypes.data)
    weights_at, sums_at, running_at = np.int64(weights.ctypes.data), np.int64(sums.ctypes.data), np.int64(running.ctypes.data)
    n_items = 0
    for item in range(first_item, tiles.shape[0] * n_kv_heads, step):
        n_items += 1
        head, tile = item % n_kv_heads, item // n_kv_heads
        sequence, first_row = np.int64(tiles[tile, 0]), np.int64(tiles[tile, 1])
        n_vectors, position = np.int64(tiles[tile, 2]) * group, np.int64(tiles[tile, 3])
        last = position + np.int64(tiles[tile, 2]) - 1
        for vector in range(n_vectors):
            tops[vector] = _NEVER
            sums[vector, :] = _ZERO
            running[vector, :] = _ZERO
        oldest: Any = max(0, position - window + 1) if window > 0 else 0
        for chunk in range(oldest // _CHUNK, last // _CHUNK + 1):
            base = chunk * _CHUNK
            n_keys: Any = min(_CHUNK, last + 1 - base)
            for key in range(n_keys):
                slot = np.int64(block_tables[sequence, (base + key) // block_size]) * block_size + (base + key) % block_size
                key_rows[key] = keys + (slot * n_kv_heads + head) * key_dim * itemsize
                value_rows[key] = values + (slot * n_kv_heads + head) * value_dim * itemsize
            following: Any = min(last + 1, base + 2 * _CHUNK)
            for key in range(base + _CHUNK, following):
                slot = np.int64(block_tables[sequence, key // block_size]) * block_size + key % block_size
                _prefetch(keys + (slot * n_kv_heads + head) * key_dim * itemsize, key_dim * itemsize)
                _prefetch(values + (slot * n_kv_heads + head) * value_dim * itemsize, value_dim * itemsize)
            _load_chunk(key_rows, value_rows, n_keys, is_half, key_dim, value_dim, keys_at, values_at, pitch)
            for vector in range(0, n_vectors, _ROWS):
                n_rows: Any = min(_ROWS, n_vectors - vector)
                # Query heads of a KV head are neighbours, and so are rows of a head, Hq apart.
                for row in range(n_rows):
                    token, member = (vector + row) // group, (vector + row) % group
                    where[row] = query + 4 * key_dim * ((first_row + token) * n_kv_heads * group + head * group + member)
                    seen = position + token
                    until: Any = min(_CHUNK, seen + 1 - base)
                    since: Any = max(0, seen - window + 1 - base) if window > 0 else 0
                    firsts[row], stops[row] = since, until
                if n_rows == _ROWS:
                    _scores_of_four(where[0], where[1], where[2], where[3], keys_at, key_dim, weights_at)
                else:
                    for row in range(n_rows):
                        _scores_of_one(where[row], keys_at, key_dim, weights_at + 4 * _CHUNK * row)
                together = n_rows == _ROWS
                for row in range(n_rows):
                    together = together and firsts[row] == 0 and stops[row] == _CHUNK
                    if firsts[row] < stops[row]:
                        tops[vector + row] = _weigh(
                            weights_at + 4 * _CHUNK * row,
                            firsts[row],
                            stops[row],
                            scaling,
                            softcap,
                            tops[vector + row],
                            sums_at + 4 * _CHUNK * (vector + row),
                            running_at + pitch * (vector + row),
                            n_columns,
                        )
                if together:
                    for column in range(0, pitch, 4 * _PADDING):
                        _add_to_four(weights_at, values_at + column, pitch, running_at + pitch * vector + column, pitch)
                    continue
                for row in range(n_rows):
                    # Not beyond what the row sees: a weight of 0 would let what is not a number through.
                    if firsts[row] < stops[row]:
                        line, place = weights_at + 4 * _CHUNK * row, running_at + pitch * (vector + row)
                        column = 0
                        while column + 8 * _PADDING <= pitch:
                            _add_to_one_wide(line, firsts[row], stops[row], values_at + column, pitch, place + column)
                            column += 8 * _PADDING
                        while column < pitch:
                            _add_to_one(line, firsts[row], stops[row], values_at + column, pitch, place + column)
                            column += 4 * _PADDING
        for vector in range(n_vectors):
            token, member = vector // group, vector % group
            width = _CHUNK // 2
            while width:
                for lane in range(width):
                    sums[vector, lane] += sums[vector, lane + width]
                width //= 2
            total, shrunk = sums[vector, 0], _ONE
            if sinks.shape[0]:
                sink = sinks[head * group + member]
                top = max(tops[vector], sink)
                shrunk = _exponential(tops[vector] - top)
                total = _fused(total, shrunk, _exponential(sink - top))
            place = output + 4 * value_dim * ((first_row + token) * n_kv_heads * group + head * group + member)
            line = carray(_floats(place), value_dim)
            for column in range(value_dim):
                line[column] = running[vector, column] * shrunk / total
    # Named once more, so that what is used by its address is not freed before.
    return n_items if len(chunk_keys) + len(chunk_values) + len(weights) else 0


# --- the backend -----------------------------------------------------------------------------------------------------


class NumbaBackend(TorchStore):
    """The kernel over all sequences, divided between torch's threads. For float32 and bfloat16 in contiguous caches."""

    name = "numba"

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, batch: PackedBatch, options: AttentionOptions) -> Tensor:
        assert keys.is_contiguous()
        assert values.is_contiguous()
        assert keys.dtype in (torch.float32, torch.bfloat16)
        n_heads, n_kv_heads = query.shape[1], keys.shape[2]
        shape = (batch.block_size, n_kv_heads, n_heads // n_kv_heads, keys.shape[3], values.shape[3])
        rows = query[0].transpose(0, 1).to(torch.float32).contiguous()
        output = torch.empty(rows.shape[0], n_heads, values.shape[3], dtype=torch.float32)
        sinks = _NO_SINKS if options.sinks is None else options.sinks.detach().float().contiguous().numpy()
        tiles, n_seen = batch.once(("tiles", shape[2]), lambda: _tiles(batch, shape[2]))
        tables = batch.once("tables", lambda: batch.block_tables.numpy())
        n_shares = self._n_threads(n_seen * n_heads * (keys.shape[3] + values.shape[3]), len(tiles) * n_kv_heads)

        def run(share: int) -> None:
            _attend(
                rows.data_ptr(),
                output.data_ptr(),
                keys.data_ptr(),
                values.data_ptr(),
                keys.dtype == torch.bfloat16,
                shape,
                tiles,
                tables,
                np.float32(options.scaling),
                options.sliding_window or 0,
                np.float32(options.softcap or 0),
                sinks,
                share,
                n_shares,
            )

        if n_shares == 1:
            run(0)
        else:
            assert self._pool is not None
            others = [self._pool.submit(run, share) for share in range(1, n_shares)]
            try:
                run(0)
            finally:
                for other in others:
                    other.result()
        return output.to(query.dtype)[None]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _n_threads(self, work: int, n_items: int) -> int:
        """Threads for so many multiply-adds; they are there afterwards."""
        n_threads = max(1, min(torch.get_num_threads(), n_items, work // _WORK_OF_THREAD))
        if n_threads > 1 and self._pool is None:
            self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sllmdask-attention")
        return n_threads


_NO_SINKS = np.empty(0, np.float32)


def _tiles(batch: PackedBatch, group: int) -> tuple[np.ndarray[Any, Any], int]:
    """(n, 4) int32, as the kernel takes them, those with most to do first; and how many keys all rows see together."""
    n_rows = max(1, _ROWS_OF_TILE // group)
    tiles: list[tuple[int, int, int, int]] = []
    n_seen = 0
    for number, span in enumerate(batch.spans):
        n_seen += span.n_rows * span.n_context
        for row in range(0, span.n_rows, n_rows):
            tiles.append((number, span.start + row, min(n_rows, span.n_rows - row), span.n_past + row))
    tiles.sort(key=lambda tile: tile[2] * (tile[2] + tile[3]), reverse=True)
    return np.array(tiles, dtype=np.int32).reshape(-1, 4), n_seen


def warm_up() -> None:
    """Have the kernel compiled, or read from where it is kept."""
    zeros = torch.zeros(1, 1, 1, _LANES)
    batch = PackedBatch([Span(0, 1, 0, torch.zeros(1, dtype=torch.long))], [np.zeros(1, np.int32)], 1)
    NumbaBackend().attend(zeros, zeros, zeros, batch, AttentionOptions(1.0))
