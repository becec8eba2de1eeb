"""The paged KV cache as tensors: what `ops.store_kv` writes and `ops.paged_attention` reads.

Keys lie in a page by 16 neighbours, (D, 16), so that a vector of scores is made of neighbouring numbers; values lie row by
row. A sequence's block table lists its pages in order.
"""
from dataclasses import dataclass

import torch

from fastgpt.extension import KEY_LANES as LANES

DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass
class PagedCache:
    """k (pages, G, page_size / 16, D, 16), v (pages, G, page_size, D), both float32, bfloat16 or int8; of int8, k_scale and
    v_scale (pages, G, page_size) float32: the row's largest magnitude / 127."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def __post_init__(self):
        pages, G, page_size, D = self.v.shape
        expected = (pages, G, page_size // LANES, D, LANES)
        if page_size % LANES or tuple(self.k.shape) != expected:
            raise ValueError(f"a PagedCache's k must have shape {expected} for v's {tuple(self.v.shape)}, and a page size that is "
                             f"a multiple of {LANES}; got {tuple(self.k.shape)}")
        scales = [scale for scale in (self.k_scale, self.v_scale) if scale is not None]
        if len(scales) == 1 or not scales and torch.int8 in (self.k.dtype, self.v.dtype) or any(
                scale.shape != self.v.shape[:3] for scale in scales):
            raise ValueError(f"a PagedCache of int8 has k_scale and v_scale of shape {(pages, G, page_size)}")

    @classmethod
    def empty(cls, pages, heads, page_size, head_size, dtype=torch.float32, device=None):
        """Uninitialised pages: page_size a multiple of 16."""
        if page_size < LANES or page_size % LANES:
            raise ValueError(f"page_size must be a multiple of {LANES}, got {page_size}")
        if dtype not in DTYPES:
            raise ValueError(f"a KV cache's dtype must be one of {DTYPES}, got {dtype}")
        k = torch.empty(pages, heads, page_size // LANES, head_size, LANES, dtype=dtype, device=device)
        v = torch.empty(pages, heads, page_size, head_size, dtype=dtype, device=device)
        scales = (torch.empty(pages, heads, page_size, device=device) for _ in range(2)) if dtype == torch.int8 else ()
        return cls(k, v, *scales)

    @property
    def page_size(self):
        return self.v.shape[2]

    def rows(self, name, table, count):
        """The first `count` keys ("k") or values ("v") of the sequence with this block table, dequantised: (G, count, D)."""
        pages = getattr(self, name)[table.long()]
        if name == "k":
            pages = pages.transpose(-1, -2).flatten(2, 3)  # (pages, G, page_size, D)
        rows = pages.transpose(0, 1).flatten(1, 2)[:, :count]  # (G, count, D)
        scale = getattr(self, f"{name}_scale")
        if scale is None:
            return rows
        return rows * scale[table.long()].transpose(0, 1).flatten(1, 2)[:, :count, None]
