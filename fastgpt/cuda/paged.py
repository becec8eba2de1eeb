"""The paged KV cache's kernels: csrc/cuda/store_kv.cu and paged_attention.cu."""
from dataclasses import dataclass

import torch

from fastgpt import kernels
from fastgpt.autograd.tensors import MAX_HEAD_SIZE
from fastgpt.cuda import launch
from fastgpt.cuda.launch import DTYPES, pointer, rows, run
from fastgpt.extension import LARGEST_PAGE
from fastgpt.paged import LARGEST, LOAD_BYTES

MOST_DECODE_ROWS = 16  # tokens of a sequence that the split kernel takes; more are a prefill
MOST_SEQUENCES = 65535  # blocks of a grid's last dimension
LONGEST = 2 ** 22  # keys of a sequence: what csrc/cuda/launch_rules.h's reciprocal divides exactly


@dataclass
class Sequences:
    """The last query tokens of S sequences, on the device: tables (S, P), query_starts (S + 1,), context_lens (S,), all
    int32. max_query and max_context bound what they hold, so that nothing waits for the device to know."""

    tables: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    max_query: int
    max_context: int

    @classmethod
    def of(cls, block_tables, query_lens, context_lens, device):
        """Of tensors on the CPU, as `ops.paged_attention` takes them."""
        starts = torch.zeros(len(query_lens) + 1, dtype=torch.int32, device="cpu")
        starts[1:] = query_lens.cumsum(0)
        largest = [int(lens.max()) if len(lens) else 0 for lens in (query_lens, context_lens)]
        return cls(*(t.to(device, torch.int32).contiguous() for t in (block_tables, starts, context_lens)), *largest)


def slots_of(page_size, block_tables, query_lens, context_lens):
    """Where the new tokens of each sequence go, page * page_size + place: (N,) int64."""
    slots = [torch.arange(length - new, length, device="cpu") for new, length in zip(query_lens.tolist(), context_lens.tolist())]
    return torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *(
        table.long()[at // page_size] * page_size + at % page_size for table, at in zip(block_tables, slots))])


def write(cache, k, v, slots):
    """k and v (N, G, D) into the slots (N,) int64, -1 for none."""
    dtype = k.dtype if cache.v.dtype in LARGEST else cache.v.dtype
    k, v = _head_rows(k.to(dtype)), _head_rows(v.to(dtype))
    run("store_kv", k.device, _cache(cache), rows(k), rows(v), pointer(slots), len(k))


def attend(q, cache, sequences, *, scale=None, window=0, out=None):
    """q (N, H, D) -> (N, H, D): few tokens a sequence, by the kernel that splits the keys."""
    N, H, D = q.shape
    q = _head_rows(q)
    out = torch.empty(N, H, D, dtype=q.dtype, device=q.device) if out is None else out
    of = _cache(cache)
    if sequences.max_context > LONGEST:
        raise ValueError(f"paged_attention: sequences of up to {LONGEST} keys, got {sequences.max_context}")
    if D > MAX_HEAD_SIZE or len(sequences.tables) > MOST_SEQUENCES:
        raise ValueError(f"paged_attention: heads of up to {MAX_HEAD_SIZE} and {MOST_SEQUENCES} sequences, got {D} and "
                         f"{len(sequences.tables)}")
    floats = launch.executor.library.partial_floats(N, H, D, sequences.max_context)
    partial = torch.empty(floats, dtype=torch.float32, device=q.device)
    tables = sequences.tables
    run("paged_attention", q.device, of, rows(q), rows(out),
        (pointer(tables), pointer(sequences.query_starts), pointer(sequences.context_lens), tables.stride(0), len(tables),
         sequences.max_query, sequences.max_context),
        H, D ** -0.5 if scale is None else scale, window, pointer(partial), launch.executor.processors(q.device))
    return out


def prefill(q, cache, sequences, *, scale=None, window=0, out=None):
    """The same of many tokens a sequence, by the Triton kernel that tiles them."""
    from fastgpt.kernels import paged_attention as triton_kernel
    s = sequences
    return triton_kernel.prefill(q, cache.k.squeeze(-1), cache.v, cache.k_scale, cache.v_scale, s.tables, s.query_starts,
                                 s.context_lens, s.max_query, scale=scale, window=window, out=out)


def store_kv(cache, k, v, block_tables, query_lens, context_lens):
    write(cache, k, v, slots_of(cache.page_size, block_tables, query_lens, context_lens).to(k.device))


def paged_attention(q, cache, block_tables, query_lens, context_lens, *, scale=None, window=None):
    sequences = Sequences.of(block_tables, query_lens, context_lens, q.device)
    if not len(q):
        return torch.empty_like(q)
    long = sequences.max_query > MOST_DECODE_ROWS and kernels.missing(q.device.index) is None
    return (prefill if long else attend)(q, cache, sequences, scale=scale, window=window or 0)


def _head_rows(x):
    """x (N, heads, D) with the heads of a row side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _cache(cache):
    """csrc/cuda/kernels.h's PagedCache."""
    pages, G, page_size, D = cache.v.shape
    row, size = cache.v.stride(2), cache.v.element_size()
    expected = (G * page_size * row, page_size * row, row)
    scales = [x for x in (cache.k_scale, cache.v_scale) if x is not None]
    if (cache.v.stride()[:3] != expected or cache.k.stride()[:3] != expected or cache.v.stride(3) != 1 or cache.k.stride(3) != 1
            or row * size % LOAD_BYTES or (cache.k.data_ptr() | cache.v.data_ptr()) % LOAD_BYTES
            or not all(x.is_contiguous() and x.dtype == torch.float32 for x in scales)):
        raise ValueError("a PagedCache must be as PagedCache.empty makes it: aligned rows of whole 16 bytes, side by side, and "
                         "contiguous scales in float32")
    if page_size > LARGEST_PAGE:
        raise ValueError(f"a PagedCache on a GPU has pages of up to {LARGEST_PAGE} tokens, got {page_size}")
    return (DTYPES[cache.v.dtype], pointer(cache.k), pointer(cache.v), pointer(cache.k_scale), pointer(cache.v_scale), pages,
            page_size, G, D, row)
