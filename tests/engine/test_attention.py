from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sllmdask.engine.attention import NAME, AttentionOptions, PagedBatch, Span, dot_product_attention
from tests.engine.models import VOCAB, make_model

D = 8


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """Written down from the formula, row by row. (Hq, n, D) over (Hkv, L, D) -> (n, Hq, D); the rows are the last n tokens."""
    n_heads, n_rows, _ = query.shape
    n_kv_heads, n_tokens, _ = key.shape
    output = torch.zeros(n_rows, n_heads, value.shape[-1])
    for head in range(n_heads):
        kv_head = head * n_kv_heads // n_heads
        for row in range(n_rows):
            position = n_tokens - n_rows + row
            first = 0 if options.sliding_window is None else max(0, position - options.sliding_window + 1)
            scores = key[kv_head, first : position + 1] @ query[head, row] * options.scaling
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            output[row, head] = scores.softmax(0) @ value[kv_head, first : position + 1]
    return output


OPTIONS = [
    AttentionOptions(0.3),
    AttentionOptions(0.3, sliding_window=5),
    AttentionOptions(0.3, sliding_window=1),
    AttentionOptions(0.3, sliding_window=100),
    AttentionOptions(0.3, softcap=2.0),
    AttentionOptions(0.3, sliding_window=4, softcap=2.0),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_a_packed_batch_attends_like_the_formula(options: AttentionOptions, n_kv_heads: int):
    torch.manual_seed(0)
    block_size, n_heads = 4, 4
    # (tokens before, tokens now): a decode, a fresh prompt, a middle chunk, a first token, a long decode.
    shapes = [(9, 1), (0, 11), (6, 7), (0, 1), (30, 1)]
    free = torch.randperm(60)[:59].add(1).tolist()
    caches = [(torch.zeros(61, block_size, n_kv_heads, D), torch.zeros(61, block_size, n_kv_heads, D + 2))]
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    sequences, spans, row = [], [], 0
    for n_past, n_new in shapes:
        n_tokens = n_past + n_new
        blocks = torch.tensor([free.pop() for _ in range(-(-n_tokens // block_size))])
        slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:n_tokens]
        query = torch.randn(n_heads, n_new, D)
        key, value = torch.randn(n_kv_heads, n_tokens, D), torch.randn(n_kv_heads, n_tokens, D + 2)
        for cache, part in zip(caches[0], (key, value), strict=True):
            cache.flatten(0, 1)[slots[:n_past]] = part[:, :n_past].transpose(0, 1)
        sequences.append((query, key, value, n_past))
        spans.append(Span(row, row + n_new, n_past, slots))
        row += n_new
    batch = PagedBatch(caches, torch.cat([span.slots[span.n_past :] for span in spans]), spans)
    output = batch.attend(
        module,
        torch.cat([query for query, *_ in sequences], 1)[None],
        torch.cat([key[:, n_past:] for _, key, _, n_past in sequences], 1)[None],
        torch.cat([value[:, n_past:] for _, _, value, n_past in sequences], 1)[None],
        options,
        {},
    )
    expected = torch.cat([plain(query, key, value, options) for query, key, value, _ in sequences])
    torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)
    assert not any(cache[0].any() for cache in caches[0]), "block 0 is nobody's"


def test_a_mask_is_made_once_per_window():
    span = Span(0, 3, 4, torch.arange(7))
    assert span.mask(None) is span.mask(None)
    assert span.mask(2) is span.mask(2)
    assert span.mask(2).tolist() == [[True, True, False, False], [False, True, True, False], [False, False, True, True]]


def test_a_result_does_not_depend_on_the_neighbours_in_the_batch():
    torch.manual_seed(1)
    query, key, value = torch.randn(1, 4, 1, D), torch.randn(1, 2, 20, D), torch.randn(1, 2, 20, D)
    one = dot_product_attention(query, key, value, OPTIONS[0], None)
    assert one.shape == (1, 1, 4, D)
    assert dot_product_attention(query, key, value, OPTIONS[0], None).equal(one)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_without_a_batch_the_hook_is_plain_attention(tmp_path: Path, name: str):
    model = make_model(tmp_path, name).reference
    ids = torch.arange(60)[None] * 7 % VOCAB
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation(NAME)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert whole.shape == (1, 65)
