"""The paged KV cache's kernels: they store and attend for any number of tokens of any sequences in one call."""
import torch

from fastgpt.autograd.tensors import dense
from fastgpt.cpu.launch import pointer
from fastgpt.extension import _C, CACHE_DTYPES


def _cache(cache):
    """csrc/engine.h's KvCache."""
    _, G, page_size, D = cache.v.shape
    for name in ("k", "v", "k_scale", "v_scale"):
        tensor = getattr(cache, name)
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"a PagedCache's {name} must be contiguous")
    return (CACHE_DTYPES[str(cache.k.dtype).removeprefix("torch.")], pointer(cache.k), pointer(cache.v), pointer(cache.k_scale),
            pointer(cache.v_scale), page_size, G, D, G * page_size)


def _sequences(block_tables, query_lens, context_lens):
    """csrc/engine.h's PagedSequence for each sequence; block_tables must stay alive as long as they are used."""
    row_bytes = block_tables.stride(0) * block_tables.element_size()
    tables = block_tables.data_ptr() + row_bytes * torch.arange(len(block_tables))
    query_lens, context_lens = query_lens.long(), context_lens.long()
    first = query_lens.cumsum(0) - query_lens
    return torch.stack([first, query_lens, context_lens - query_lens, tables], dim=1)


def store_kv(cache, k, v, block_tables, query_lens, context_lens):
    k, v, block_tables = dense(k.float(), v.float(), block_tables)
    sequences = _sequences(block_tables, query_lens, context_lens)
    _C.store_kv(_cache(cache), pointer(k), pointer(v), k.stride(0), pointer(sequences), len(sequences))


def paged_attention(q, cache, block_tables, query_lens, context_lens, *, scale=None, window=None):
    assert window is None, "why_not refuses it"
    D = q.shape[2]
    rows, block_tables = dense(q.float(), block_tables)
    out = torch.empty_like(rows)
    sequences = _sequences(block_tables, query_lens, context_lens)
    _C.paged_attention(_cache(cache), pointer(rows), rows.stride(0), q.shape[1], D ** -0.5 if scale is None else scale,
                       pointer(sequences), len(sequences), pointer(out), out.stride(0))
    return out.to(q.dtype)
