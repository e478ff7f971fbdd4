"""Attention over paged KV on a GPU, in Triton: sequences of any lengths in one launch, prefill chunks and decodes alike.

A program takes some rows of one sequence, each with the query heads that share a KV head, and walks over the tokens that they
see, block by block through the block table. Nothing is gathered first, no mask is made, nothing is read back from the device.
Where few programs would walk far, as in a small batch that decodes at long contexts, each walk is split, and a second kernel puts
the parts together.

Source: PagedAttention (vLLM, SOSP '23); online softmax, FlashAttention (NeurIPS '22); split keys, Flash-Decoding (2023). Sinks:
Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (ICLR '24), learned ones as in GPT-OSS.

Only a process with a CUDA device imports this module, and tests, in Triton's interpreter. Triton reads a kernel's annotations, so
they are no strings here, and say no more than it understands.
"""

# mypy: disable-error-code="no-untyped-def"

from functools import lru_cache
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from sllmdask.engine.attention import AttentionOptions

#: Scores are kept in units of log 2, because 2**x is one instruction.
_LOG2_E = tl.constexpr(1.4426950408889634)

#: Bytes of query, key and value tiles of one program: every GPU since Volta has them.
_TILE_MEMORY = 96 * 1024
#: A part of a split walk has at least as many tokens: less is not worth its launch and its partial result.
_MIN_TOKENS_PER_SPLIT = 256
_MAX_SPLITS = 32


class Packed(Protocol):
    """Where the packed tokens of a step are: sequence after sequence, without padding. All tensors are on the device."""

    #: (T,), int64: the cache slot of each token, its block times the block size plus the offset in the block; none if negative.
    new_slots: Tensor
    #: (n + 1,), int32: the row at which each sequence begins, and the end.
    cu_seqlens: Tensor
    #: (n,), int32: tokens of each sequence in the cache, the new ones included.
    context_lens: Tensor
    #: (n, most blocks of a sequence), int32.
    block_tables: Tensor
    #: Rows of the sequence that has most of them.
    max_rows: int
    #: At least the tokens of the longest sequence.
    max_context: int


class TritonBackend:
    """The attention of a step by the kernels below.

    The number of splits follows from :attr:`Packed.max_context` and the shapes, never from what is on the device, so that a step
    can be recorded in a CUDA graph. A sequence's result does not depend on its neighbours' values; its last bits may depend on
    how many they are, as the number of splits does.
    """

    name = "triton"

    def check(self, device: torch.device) -> None:
        """Compile the kernels and run them on two tokens. Raises :class:`RuntimeError` with what keeps them from it.

        Triton needs a C compiler where it runs, a driver and a GPU that it knows, and a folder to keep its code in.
        """
        try:
            ones = torch.ones(2, 1, 16, device=device)
            keys, values = (torch.zeros(2, 16, 1, 16, device=device) for _ in range(2))
            numbers = torch.tensor([0, 2], dtype=torch.int32, device=device)
            store_kv(ones, ones, keys, values, torch.tensor([16, 17], device=device))
            output = paged_attention(ones, keys, values, numbers[None, :1] + 1, numbers[1:], numbers, scaling=1.0, n_splits=2)
            found = float(output.min())
        except Exception as error:
            raise RuntimeError(f"Triton's kernels do not run here: {error}") from error
        if found != 1.0:
            raise RuntimeError(f"Triton's kernels give {found} here instead of 1")

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: Packed) -> None:
        """Write `key` (1, Hkv, T, Dk) and `value` (1, Hkv, T, Dv) of the batch's tokens into the cache of one layer."""
        store_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), keys, values, batch.new_slots)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, batch: Packed, options: AttentionOptions) -> Tensor:
        """`query` (1, Hq, T, Dk), `keys` (n_blocks, block_size, Hkv, Dk), `values` (.., Dv) -> (1, T, Hq, Dv)."""
        output = paged_attention(
            query[0].transpose(0, 1),
            keys,
            values,
            batch.block_tables,
            batch.context_lens,
            batch.cu_seqlens,
            scaling=options.scaling,
            sliding_window=options.sliding_window,
            softcap=options.softcap,
            sinks=options.sinks,
            max_rows=batch.max_rows,
            max_context=batch.max_context,
        )
        return output[None]

    def close(self) -> None:
        pass


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    n_splits: int | None = None,
    max_rows: int | None = None,
    max_context: int | None = None,
) -> Tensor:
    """Causal attention of packed rows over the paged KV of their sequences.

    Row ``cu_seqlens[i] + r`` is the token of sequence `i` at position ``context_lens[i] - n_rows + r``, whose keys and values are
    in the cache already. A sequence with no token in the cache gives zeros. What no row can see is not read, block 0 included.

    :param query: (T, Hq, Dk), of dtype float32, bfloat16 or float16, as the caches
    :param key_cache: (n_blocks, block_size, Hkv, Dk); `value_cache` (n_blocks, block_size, Hkv, Dv); Hkv divides Hq
    :param block_tables: (n, most blocks of a sequence), int32; `context_lens` (n,), int32; `cu_seqlens` (n + 1,), int32
    :param sliding_window: a token sees itself and the ``sliding_window - 1`` tokens before it
    :param softcap: scores become ``softcap * tanh(score / softcap)``
    :param sinks: (Hq,), one more score of each head, which takes its part of the softmax and has no value
    :param n_splits: programs that share one walk; by default :func:`splits_for`
    :param max_rows: rows of the sequence that has most of them, if known; 1, every sequence decoding, needs fewer programs
    :param max_context: at least the tokens of the longest sequence, if known; else what the block tables can hold
    :returns: (T, Hq, Dv), of the query's dtype
    """
    n_rows, n_heads, key_dim = query.shape
    _, block_size, n_kv_heads, value_dim = value_cache.shape
    n_sequences = len(context_lens)
    group = n_heads // n_kv_heads
    one_row = max_rows == 1
    n_pairs, n_tokens = _tile_shape(one_row, _padded(key_dim), _padded(value_dim), query.element_size())
    # Every sequence may leave its last tile half empty, and no other is.
    n_tiles = n_sequences * triton.cdiv(group, n_pairs) if one_row else n_rows * group // n_pairs + n_sequences
    if n_splits is None:
        longest = block_tables.shape[1] * block_size if max_context is None else max_context
        longest = longest if sliding_window is None else min(longest, sliding_window)
        n_splits = splits_for(n_tiles * n_kv_heads, longest, _n_processors(query.device))
    output = query.new_empty(n_rows, n_heads, value_dim)
    if not n_rows:
        return output
    query, key_cache, value_cache = (_dense_rows(part) for part in (query, key_cache, value_cache))
    parts = maxima = sums = output
    if n_splits > 1:
        parts = query.new_empty(n_splits, n_rows, n_heads, value_dim, dtype=torch.float32)
        maxima, sums = query.new_empty(2, n_splits, n_rows, n_heads, dtype=torch.float32)
    _attend[n_tiles, n_kv_heads, n_splits](
        query,
        key_cache,
        value_cache,
        parts,
        maxima,
        sums,
        block_tables,
        context_lens,
        cu_seqlens,
        query if sinks is None else sinks,
        scaling,
        0.0 if softcap is None else softcap,
        0 if sliding_window is None else sliding_window,
        n_sequences,
        n_rows,
        block_tables.stride(0),
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        value_cache.stride(0),
        value_cache.stride(1),
        value_cache.stride(2),
        n_heads=n_heads,
        group=group,
        block_size=block_size,
        key_dim=key_dim,
        key_pad=_padded(key_dim),
        value_dim=value_dim,
        value_pad=_padded(value_dim),
        n_pairs=n_pairs,
        n_tokens=n_tokens,
        one_row=one_row,
        is_split=n_splits > 1,
        has_window=sliding_window is not None,
        has_softcap=softcap is not None,
        has_sinks=sinks is not None,
        upcast=_upcast(query),
        num_warps=4,
        num_stages=2,
    )
    if n_splits > 1:
        _combine[n_rows, n_heads](
            parts,
            maxima,
            sums,
            output,
            query if sinks is None else sinks,
            n_splits,
            n_rows,
            n_heads=n_heads,
            splits_pad=triton.next_power_of_2(n_splits),
            value_dim=value_dim,
            value_pad=_padded(value_dim),
            has_sinks=sinks is not None,
            num_warps=4,
        )
    return output


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, new_slots: Tensor) -> None:
    """Write the keys (T, Hkv, Dk) and values (T, Hkv, Dv) of new tokens into the caches, in one launch.

    :param new_slots: (T,), int64: block times block size, plus the offset in the block; a token with a negative one is left out
    """
    n_rows, n_kv_heads, key_dim = key.shape
    value_dim = value.shape[2]
    if not n_rows:
        return
    key, value = _dense_rows(key), _dense_rows(value)
    _store[n_rows, n_kv_heads](
        key,
        value,
        key_cache,
        value_cache,
        new_slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        value_cache.stride(0),
        value_cache.stride(1),
        value_cache.stride(2),
        block_size=key_cache.shape[1],
        key_dim=key_dim,
        key_pad=_padded(key_dim),
        value_dim=value_dim,
        value_pad=_padded(value_dim),
        num_warps=1,
    )


def splits_for(n_programs: int, n_tokens: int, n_processors: int) -> int:
    """Into how many parts each walk over up to `n_tokens` tokens is split, so that `n_programs` times as many fill the device.

    A power of two: the second kernel is compiled for few numbers.
    """
    wanted = min(2 * n_processors // max(n_programs, 1), n_tokens // _MIN_TOKENS_PER_SPLIT, _MAX_SPLITS)
    return 1 << max(wanted.bit_length() - 1, 0)


def _tile_shape(one_row: bool, key_pad: int, value_pad: int, itemsize: int) -> tuple[int, int]:
    """How many (row, query head) pairs a program takes, and how many tokens it looks at together.

    Both at least 16, the smallest side of a matrix product. Two tiles of keys and values are in flight.
    """
    n_pairs, n_tokens = 16 if one_row else 64, 64

    def nbytes() -> int:
        return itemsize * (n_pairs * key_pad + 2 * n_tokens * (key_pad + value_pad))

    while nbytes() > _TILE_MEMORY and n_tokens > 16:
        n_tokens //= 2
    while nbytes() > _TILE_MEMORY and n_pairs > 16:
        n_pairs //= 2
    return n_pairs, n_tokens


def _padded(dim: int) -> int:
    """Triton's tiles have sides that are powers of two; the rest is masked."""
    return max(16, triton.next_power_of_2(dim))


def _dense_rows(tensor: Tensor) -> Tensor:
    """The kernels take any strides but the last."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _upcast(tensor: Tensor) -> bool:
    """Whether tiles become float32 first: Triton's interpreter multiplies bit patterns of bfloat16 as if they were numbers."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16


@lru_cache
def _n_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# --- the kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["window", "n_sequences", "n_rows_total", "table_stride"])
def _attend(
    query,
    key_cache,
    value_cache,
    output,
    maxima,
    sums,
    block_tables,
    context_lens,
    cu_seqlens,
    sinks,
    scaling,
    softcap,
    window,
    n_sequences,
    n_rows_total,
    table_stride,
    query_row_stride,
    query_head_stride,
    key_block_stride,
    key_token_stride,
    key_head_stride,
    value_block_stride,
    value_token_stride,
    value_head_stride,
    n_heads: tl.constexpr,
    group: tl.constexpr,
    block_size: tl.constexpr,
    key_dim: tl.constexpr,
    key_pad: tl.constexpr,
    value_dim: tl.constexpr,
    value_pad: tl.constexpr,
    n_pairs: tl.constexpr,
    n_tokens: tl.constexpr,
    one_row: tl.constexpr,
    is_split: tl.constexpr,
    has_window: tl.constexpr,
    has_softcap: tl.constexpr,
    has_sinks: tl.constexpr,
    upcast: tl.constexpr,
):
    """One tile of (row, query head) pairs of one sequence and one KV head, over all tokens that it sees, or a part of them.

    Where walks are split, `output`, `maxima` and `sums` take the part's sum of weighted values, its largest score and its sum of
    weights, (n_splits, T, Hq, Dv) and (n_splits, T, Hq); else `output` takes the result.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if one_row:
        tiles_of_one: tl.constexpr = (group + n_pairs - 1) // n_pairs
        sequence = tile // tiles_of_one
        tile = tile % tiles_of_one
    else:
        # Sequence i begins at tile cu_seqlens[i] * group // n_pairs + i or before: the last one that does not begin later is it.
        low = 0
        high = n_sequences
        while low < high:
            middle = (low + high) // 2
            if tl.load(cu_seqlens + middle) * group // n_pairs + middle <= tile:
                low = middle + 1
            else:
                high = middle
        sequence = low - 1
        tile -= tl.load(cu_seqlens + sequence) * group // n_pairs + sequence

    first_row = tl.load(cu_seqlens + sequence)
    n_rows = tl.load(cu_seqlens + sequence + 1) - first_row
    if tile * n_pairs >= n_rows * group:
        return
    n_past = tl.load(context_lens + sequence) - n_rows

    pair = tile * n_pairs + tl.arange(0, n_pairs)
    is_pair = pair < n_rows * group
    position = n_past + pair // group
    row = (first_row + pair // group).to(tl.int64)
    head = kv_head * group + pair % group
    key_column = tl.arange(0, key_pad)
    value_column = tl.arange(0, value_pad)
    q = tl.load(
        query + row[:, None] * query_row_stride + head[:, None] * query_head_stride + key_column[None, :],
        mask=is_pair[:, None] & (key_column < key_dim)[None, :],
        other=0.0,
    )
    if upcast:
        q = q.to(tl.float32)

    # Tokens that some row of the tile sees. Walks begin at multiples of n_tokens, whatever the tile: a row's sums are then taken
    # in the same order wherever the row is.
    seen_from = 0
    if has_window:
        seen_from = tl.maximum(n_past + tile * n_pairs // group - window + 1, 0)
    seen_to = n_past + tl.minimum((tile * n_pairs + n_pairs - 1) // group, n_rows - 1) + 1
    begin = seen_from // n_tokens * n_tokens
    end = seen_to
    if is_split:
        steps = (tl.maximum(seen_to - begin, 0) + n_tokens - 1) // n_tokens
        n_tokens_of_part = (steps + tl.num_programs(2) - 1) // tl.num_programs(2) * n_tokens
        begin += split * n_tokens_of_part
        end = tl.minimum(seen_to, begin + n_tokens_of_part)

    largest = tl.full([n_pairs], float("-inf"), tl.float32)
    total = tl.zeros([n_pairs], tl.float32)
    if has_sinks and not is_split:
        largest = tl.load(sinks + head, mask=is_pair, other=0.0).to(tl.float32) * _LOG2_E
        total += 1.0
    weighted = tl.zeros([n_pairs, value_pad], tl.float32)

    for start in range(begin, end, n_tokens):
        token = start + tl.arange(0, n_tokens)
        # What lies outside may be anything, not a number included, so it is not read.
        is_token = (token >= seen_from) & (token < seen_to)
        block = tl.load(block_tables + sequence.to(tl.int64) * table_stride + token // block_size, mask=is_token, other=0)
        block = block.to(tl.int64)
        offset = token % block_size
        k = tl.load(
            key_cache
            + (block * key_block_stride + offset * key_token_stride + kv_head * key_head_stride)[None, :]
            + key_column[:, None],
            mask=is_token[None, :] & (key_column < key_dim)[:, None],
            other=0.0,
        )
        if upcast:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        if has_softcap:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which goes to its limits where exp overflows.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        is_seen = is_token[None, :] & (token[None, :] <= position[:, None])
        if has_window:
            is_seen = is_seen & (token[None, :] > position[:, None] - window)
        scores = tl.where(is_seen, scores * _LOG2_E, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen nothing yet has no largest score; any finite number does.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        weighted = weighted * shrink[:, None]
        v = tl.load(
            value_cache
            + (block * value_block_stride + offset * value_token_stride + kv_head * value_head_stride)[:, None]
            + value_column[None, :],
            mask=is_token[:, None] & (value_column < value_dim)[None, :],
            other=0.0,
        )
        if upcast:
            v = v.to(tl.float32)
        weighted += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = new_largest

    place = row * n_heads + head
    if is_split:
        place += split.to(tl.int64) * n_rows_total * n_heads
        tl.store(maxima + place, largest, mask=is_pair)
        tl.store(sums + place, total, mask=is_pair)
    else:
        weighted = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        output + place[:, None] * value_dim + value_column[None, :],
        weighted,
        mask=is_pair[:, None] & (value_column < value_dim)[None, :],
    )


@triton.jit(do_not_specialize=["n_splits", "n_rows_total"])
def _combine(
    parts,
    maxima,
    sums,
    output,
    sinks,
    n_splits,
    n_rows_total,
    n_heads: tl.constexpr,
    splits_pad: tl.constexpr,
    value_dim: tl.constexpr,
    value_pad: tl.constexpr,
    has_sinks: tl.constexpr,
):
    """Put the parts of one row and one head together."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, splits_pad)
    is_part = split < n_splits
    column = tl.arange(0, value_pad)
    place = (split.to(tl.int64) * n_rows_total + row) * n_heads + head
    largest_of_part = tl.load(maxima + place, mask=is_part, other=float("-inf"))
    largest = tl.max(largest_of_part, 0)
    if has_sinks:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2_E
        largest = tl.maximum(largest, sink)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    shrink = tl.exp2(largest_of_part - base)
    total = tl.sum(shrink * tl.load(sums + place, mask=is_part, other=0.0), 0)
    if has_sinks:
        total += tl.exp2(sink - base)
    weighted = tl.load(
        parts + place[:, None] * value_dim + column[None, :],
        mask=is_part[:, None] & (column < value_dim)[None, :],
        other=0.0,
    )
    result = tl.sum(weighted * shrink[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + (row * n_heads + head) * value_dim + column, result, mask=column < value_dim)


@triton.jit
def _store(
    key,
    value,
    key_cache,
    value_cache,
    new_slots,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    key_block_stride,
    key_token_stride,
    key_cache_head_stride,
    value_block_stride,
    value_token_stride,
    value_cache_head_stride,
    block_size: tl.constexpr,
    key_dim: tl.constexpr,
    key_pad: tl.constexpr,
    value_dim: tl.constexpr,
    value_pad: tl.constexpr,
):
    """Key and value of one token and one head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(new_slots + row)
    if slot < 0:
        return
    block = slot // block_size
    offset = slot % block_size
    column = tl.arange(0, key_pad)
    k = tl.load(key + row * key_row_stride + head * key_head_stride + column, mask=column < key_dim)
    place = block * key_block_stride + offset * key_token_stride + head * key_cache_head_stride
    tl.store(key_cache + place + column, k, mask=column < key_dim)
    column = tl.arange(0, value_pad)
    v = tl.load(value + row * value_row_stride + head * value_head_stride + column, mask=column < value_dim)
    place = block * value_block_stride + offset * value_token_stride + head * value_cache_head_stride
    tl.store(value_cache + place + column, v, mask=column < value_dim)
