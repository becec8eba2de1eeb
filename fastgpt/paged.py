"""The paged KV cache as tensors: what `ops.store_kv` writes and `ops.paged_attention` reads.

On the CPU keys lie in a page by 16 neighbours, (D, 16), so that a vector of scores is made of neighbouring numbers; on a GPU
row by row, as values do everywhere, each padded to whole 16 bytes. A sequence's block table lists its pages in order.
"""
from dataclasses import dataclass

import torch

from fastgpt.extension import KEY_LANES as LANES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
# What a row's largest magnitude becomes where a row has a scale.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LOAD_BYTES = 16  # of a GPU's widest load


@dataclass
class PagedCache:
    """k (pages, G, page_size / lanes, D, lanes), v (pages, G, page_size, D), both of one of `DTYPES`; lanes: how many keys
    lie side by side, 16 on the CPU and 1 on a GPU. Of int8 and float8_e4m3fn, k_scale and v_scale (pages, G, page_size)
    float32: the row's largest magnitude over the dtype's."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def __post_init__(self):
        pages, G, page_size, D = self.v.shape
        lanes = self.k.shape[-1]
        expected = (pages, G, page_size // lanes, D, lanes)
        if lanes not in (1, LANES) or page_size % lanes or tuple(self.k.shape) != expected:
            expected = (pages, G, page_size // LANES, D, LANES)
            raise ValueError(f"a PagedCache's k must have shape {expected} for v's {tuple(self.v.shape)}, and a page size that is "
                             f"a multiple of {LANES} (or any, and 1 in place of {LANES}, on a GPU); got {tuple(self.k.shape)}")
        scales = [scale for scale in (self.k_scale, self.v_scale) if scale is not None]
        if len(scales) == 1 or not scales and {self.k.dtype, self.v.dtype} & LARGEST.keys() or any(
                scale.shape != self.v.shape[:3] for scale in scales):
            raise ValueError(f"a PagedCache of int8 or float8_e4m3fn has k_scale and v_scale of shape {(pages, G, page_size)}")

    @classmethod
    def empty(cls, pages, heads, page_size, head_size, dtype=torch.float32, device=None, lanes=None):
        """Pages without contents, zeros where rows are padded. page_size: a multiple of lanes, which are the device's own
        where none are given."""
        if lanes is None:
            lanes = LANES if torch.empty(0, device=device).device.type == "cpu" else 1
        if page_size < lanes or page_size % lanes:
            raise ValueError(f"page_size must be a multiple of {lanes}, got {page_size}")
        if dtype not in DTYPES:
            raise ValueError(f"a KV cache's dtype must be one of {DTYPES}, got {dtype}")
        rows = (pages, heads, page_size, row_size(head_size, dtype) if lanes == 1 else head_size)
        if lanes == 1:
            k, v = (torch.zeros(rows, dtype=dtype, device=device)[..., :head_size] for _ in "kv")
            k = k.unsqueeze(-1)
        else:
            k = torch.empty(pages, heads, page_size // lanes, head_size, lanes, dtype=dtype, device=device)
            v = torch.empty(rows, dtype=dtype, device=device)
        scales = (torch.empty(rows[:3], dtype=torch.float32, device=device) for _ in range(2)) if dtype in LARGEST else ()
        return cls(k, v, *scales)

    @property
    def page_size(self):
        return self.v.shape[2]

    @property
    def lanes(self):
        return self.k.shape[-1]

    def rows(self, name, table, count):
        """The first `count` keys ("k") or values ("v") of the sequence with this block table, dequantised: (G, count, D)."""
        pages = getattr(self, name)[table.long()]
        if name == "k":
            pages = pages.transpose(-1, -2).flatten(2, 3)  # (pages, G, page_size, D)
        rows = pages.transpose(0, 1).flatten(1, 2)[:, :count]  # (G, count, D)
        scale = getattr(self, f"{name}_scale")
        if scale is None:
            return rows
        return rows.to(scale.dtype) * scale[table.long()].transpose(0, 1).flatten(1, 2)[:, :count, None]


def row_size(D, dtype):
    """Numbers that a row of D takes on a GPU: whole 16 bytes."""
    step = LOAD_BYTES // dtype.itemsize
    return -(-D // step) * step
