"""The paged KV cache's ops: pages of every size and order against attention over the whole sequences."""
import pytest
import torch
from numerics import assert_accurate

from fastgpt import ops, reference
from fastgpt.paged import PagedCache

LENS = [(1, 1), (1, 200), (5, 5), (70, 130), (1, 129), (0, 40), (130, 300)]  # (new tokens, with those before)
DTYPES = [torch.float32, torch.bfloat16, torch.int8]


class Case:
    """Sequences whose earlier tokens are in the cache. `pages` differ from case to case, the tokens don't."""

    def __init__(self, page_size=64, dtype=torch.float32, D=24, H=6, G=3, order=0):
        torch.manual_seed(1)
        self.query_lens = torch.tensor([new for new, _ in LENS])
        self.context_lens = torch.tensor([length for _, length in LENS])
        N, most = int(self.query_lens.sum()), -(-int(self.context_lens.max()) // page_size)
        self.past = [torch.randn(2, length - new, G, D) for new, length in LENS]
        self.q, self.k, self.v = torch.randn(N, H, D), torch.randn(N, G, D), torch.randn(N, G, D)
        pages = len(LENS) * most + 3
        self.tables = torch.randperm(pages, generator=torch.Generator().manual_seed(order))[:len(LENS) * most]
        self.tables = self.tables.view(len(LENS), most).int()
        self.cache = PagedCache.empty(pages, G, page_size, D, dtype)
        for x in (self.cache.k, self.cache.v):  # what is not written must not be read
            x.fill_(float("nan") if dtype.is_floating_point else 99)
        lens = torch.tensor([past.shape[1] for past in self.past])
        ops.store_kv(self.cache, *torch.cat(self.past, dim=1), self.tables, lens, lens)

    def run(self):
        lens = self.tables, self.query_lens, self.context_lens
        ops.store_kv(self.cache, self.k, self.v, *lens)
        return ops.paged_attention(self.q, self.cache, *lens)

    def truth(self, dtype=torch.float64):
        """Attention over the whole sequences, from the rows that were stored."""
        wide = PagedCache(*(t if t is None else t.to(dtype) for t in (self.cache.k, self.cache.v, self.cache.k_scale,
                                                                      self.cache.v_scale)))
        return reference.paged_attention(self.q.to(dtype), wide, self.tables, self.query_lens, self.context_lens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "page_size"), [(1, 16), (24, 16), (59, 32), (64, 64), (80, 48), (128, 256)])
def test_equals_attention(level, dtype, D, page_size):
    case = Case(page_size, dtype, D)
    assert_accurate("paged attention", case.run(), case.truth(), case.truth(torch.float32))


def test_groups_of_heads(level):
    for H, G in ((1, 1), (4, 1), (6, 6), (8, 2)):
        case = Case(H=H, G=G)
        assert_accurate(f"{H} heads on {G}", case.run(), case.truth(), case.truth(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_no_page(level, dtype):
    outs = [Case(page_size, dtype, order=order).run() for page_size, order in ((16, 0), (16, 1), (64, 2), (256, 3))]
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stores_what_the_reference_stores(level, dtype):
    case, other = Case(16, dtype), Case(16, dtype)
    case.run()
    with ops.backend("reference"):
        other.run()
    for name in ("k", "v"):
        for table, length in zip(case.tables, case.context_lens.tolist()):
            ours, theirs = (c.cache.rows(name, table, length) for c in (case, other))
            if dtype == torch.int8:  # a tie may round to either side
                assert (ours - theirs).abs().max() <= ours.abs().max() / 127 * 1.01
            else:
                assert torch.equal(ours, theirs)


def test_reference_answers_when_asked():
    case, other = Case(), Case()
    with ops.backend("reference"):
        expected = other.run()
    assert torch.allclose(case.run(), expected, atol=1e-5)


def test_bfloat16_queries():
    case = Case()
    case.q, case.k, case.v = case.q.bfloat16(), case.k.bfloat16(), case.v.bfloat16()
    out = case.run()
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), case.truth(), atol=0.02)


def test_nothing_to_do():
    cache = PagedCache.empty(2, 1, 16, 8)
    none = torch.zeros(0, dtype=torch.int64)
    tables = torch.zeros(0, 1, dtype=torch.int32)
    ops.store_kv(cache, torch.zeros(0, 1, 8), torch.zeros(0, 1, 8), tables, none, none)
    assert ops.paged_attention(torch.zeros(0, 1, 8), cache, tables, none, none).shape == (0, 1, 8)


@pytest.mark.parametrize(("change", "message"), [
    ({"tables": torch.zeros(7, 9, dtype=torch.int64)}, "int32"),
    ({"tables": torch.full((7, 9), 99, dtype=torch.int32)}, "pages in"),
    ({"tables": torch.zeros(7, 1, dtype=torch.int32)}, "context_lens"),
    ({"query_lens": torch.tensor([1, 1, 1, 1, 1, 1, 1])}, "add up"),
    ({"query_lens": torch.tensor([1])}, "shape"),
    ({"context_lens": torch.tensor([0, 200, 5, 130, 129, 40, 300])}, "context_lens"),
    ({"q": torch.zeros(208, 6, 7)}, "tokens must have shape"),
    ({"q": torch.zeros(208, 5, 24)}, "multiple"),
    ({"k": torch.zeros(208, 2, 24)}, "k and v"),
])
def test_wrong_arguments_are_named(change, message):
    case = Case()
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        case.run()


def test_parts_that_do_not_belong_together_are_refused():
    k, v, scale = torch.zeros(2, 1, 1, 8, 16), torch.zeros(2, 1, 16, 8), torch.zeros(2, 1, 16)
    for arguments in ((k[:1], v), (k, v[:, :, :8]), (k, v, scale), (k.to(torch.int8), v.to(torch.int8)),
                      (k.to(torch.int8), v.to(torch.int8), scale, scale[:1])):
        with pytest.raises(ValueError, match="PagedCache"):
            PagedCache(*arguments)
    lens = torch.tensor([1])
    with pytest.raises(ValueError, match="one dtype"):
        ops.store_kv(PagedCache(k.bfloat16(), v), torch.zeros(1, 1, 8), torch.zeros(1, 1, 8),
                     torch.zeros(1, 1, dtype=torch.int32), lens, lens)


def test_page_sizes_and_dtypes_are_checked():
    for arguments in ((2, 1, 15, 8), (2, 1, 0, 8), (2, 1, 16, 8, torch.float64)):
        with pytest.raises(ValueError, match="page_size|dtype"):
            PagedCache.empty(*arguments)
