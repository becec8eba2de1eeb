"""The CUDA kernels of the paged KV cache, simulated and with -m gpu on one: every dtype, odd heads, permuted pages."""
import cuda_shim
import pytest
import torch
from cuda_executors import Shim, on_gpu, running_cuda
from numerics import assert_accurate
from versions import simulable

from fastgpt import ops, reference
from fastgpt.cuda import launch, paged
from fastgpt.paged import LARGEST, PagedCache

pytestmark = pytest.mark.skipif(bool(cuda_shim.missing()), reason=str(cuda_shim.missing()))

CACHES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
LENS = [(1, 1), (1, 200), (1, 257), (3, 3), (2, 600), (0, 40)]  # (new tokens, with those before)


class Case:
    """Sequences whose earlier tokens are in the cache, which has three times the pages that they need; the others hold NaN."""

    def __init__(self, page_size=16, cache=torch.bfloat16, dtype=None, D=24, H=4, G=2, lens=LENS, order=0):
        torch.manual_seed(2)
        dtype = dtype or (torch.bfloat16 if cache in LARGEST else cache)
        self.query_lens, self.context_lens = (torch.tensor(column, device="cpu") for column in zip(*lens))
        N, most = int(self.query_lens.sum()), -(-int(self.context_lens.max()) // page_size)
        past = int((self.context_lens - self.query_lens).sum())
        self.q = torch.randn(N, H, D).to(dtype)
        self.new, self.past = (torch.randn(2, count, G, D).to(dtype) for count in (N, past))
        pages = 3 * len(lens) * most
        order = torch.randperm(pages, generator=torch.Generator("cpu").manual_seed(order), device="cpu")
        self.tables = order[:len(lens) * most].view(len(lens), most).int()
        self.cache = PagedCache.empty(pages, G, page_size, D, cache, lanes=1)
        self.spoil()

    def spoil(self):
        """What is not written must not be read: NaN in rows and scales, 99 in bytes, and in the tables no page."""
        for name in ("k", "v", "k_scale", "v_scale"):
            tensor = getattr(self.cache, name)
            if tensor is not None:
                tensor.copy_(torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 99, dtype=torch.float32))
        used = -(-self.context_lens // self.cache.page_size)
        self.tables[torch.arange(self.tables.shape[1], device="cpu") >= used[:, None]] = -7

    def store(self):
        before = self.context_lens - self.query_lens
        tables = self.tables.clamp(min=0)
        ops.store_kv(self.cache, *self.past, tables, before, before)
        ops.store_kv(self.cache, *self.new, tables, self.query_lens, self.context_lens)
        return self

    def run(self, **options):
        sequences = paged.Sequences.of(self.tables, self.query_lens, self.context_lens, self.q.device)
        return paged.attend(self.q, self.cache, sequences, **options)

    def truth(self, dtype=torch.float64, window=None):
        """Attention over the rows that were stored, made in dtype."""
        wide = PagedCache(*(t if t is None else t.to(dtype) for t in (self.cache.k, self.cache.v, self.cache.k_scale,
                                                                      self.cache.v_scale)))
        return reference.paged_attention(self.q.to(dtype), wide, self.tables.clamp(min=0), self.query_lens, self.context_lens,
                                         window=window)

    def check(self, **options):
        found = self.run(**options)
        window = options.get("window")
        plain = self.truth(torch.float32, window).to(found.dtype)
        assert_accurate("paged attention", found, self.truth(window=window), plain)


@pytest.fixture(params=["fifo", "rand:1", pytest.param("gpu", marks=pytest.mark.gpu)])
def shim(request):
    copies = "late" if request.param == "fifo" else "early"
    with on_gpu() if request.param == "gpu" else running_cuda(Shim(request.param, copies)) as executor:
        yield executor


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize(("D", "page_size"), [(24, 1), (59, 16), (64, 24), (80, 64), (128, 7), (256, 256), (200, 16)])
def test_equals_attention(shim, cache, D, page_size):
    Case(page_size, cache, D=D).store().check()


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_stores_what_the_reference_stores(shim, cache, dtype):
    """All of a cache's bits, and nothing beside the rows that were given."""
    ours, theirs = (Case(cache=cache, dtype=dtype, D=D, page_size=5) for D in (37, 37))
    ours.store()
    with ops.backend("reference"):
        theirs.store()
    for name in ("k", "v", "k_scale", "v_scale"):
        a, b = getattr(ours.cache, name), getattr(theirs.cache, name)
        if a is None:
            continue
        a, b = a.float(), b.float()
        if cache == torch.int8 and "scale" not in name:  # a product with the inverse may round the other way
            assert (a - b).abs().max() <= 1 and (a != b).float().mean() < 0.01
        elif cache == torch.float8_e4m3fn and "scale" not in name:
            assert ((a != b) & ~(a.isnan() & b.isnan())).float().mean() < 0.01
        else:
            torch.testing.assert_close(a, b, rtol=3e-7 if "scale" in name else 0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("H", "G"), [(1, 1), (6, 6), (8, 2), (7, 1)])
def test_groups_of_heads(shim, H, G):
    Case(H=H, G=G, lens=[(1, 300), (2, 17)]).store().check()
    Case(H=H, G=G, lens=[(1, 30), (1, 17)]).store().check()


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("window", [1, 5, 64, 256, 300])
def test_a_window(shim, window, cache):
    Case(cache=cache, lens=[(1, 1), (1, 700), (5, 513)]).store().check(window=window)


@pytest.mark.parametrize("scales", [1e-30, 1e-3, 1e5, 1e30])
@pytest.mark.parametrize("cache", LARGEST, ids=str)
def test_bytes_of_any_scale(shim, cache, scales):
    """Values whose scales lie far apart and queries of any size, as exact as float32: sums of float16 alone would be neither."""
    case = Case(cache=cache, dtype=torch.float32, D=64, H=8, G=1, lens=[(1, 200), (2, 70)])
    for values in (case.new[1], case.past[1]):
        values *= scales * 10 ** torch.randint(-4, 4, (len(values), 1, 1))
    case.q *= scales ** 0.5
    for keys in (case.new[0], case.past[0]):
        keys /= scales ** 0.5
    case.store().check()


@pytest.mark.parametrize("cache", LARGEST, ids=str)
def test_large_values_behind_a_key_that_takes_all_the_weight(shim, cache):
    """The last key leads by 82 nats, with a value of 0: what the others add is small, and their scales times their units are not."""
    case = Case(cache=cache, dtype=torch.float32, D=64, H=8, G=1, lens=[(1, 50)])
    case.q.fill_(1.0)
    for number, (keys, values) in enumerate((case.past, case.new)):
        keys.fill_(82 / 8 * number)
        values.fill_(1e7 * (1 - number))
    case.store().check()


def test_a_later_token_that_is_not_finite_does_not_reach_the_earlier(shim):
    for cache in LARGEST:
        case = Case(cache=cache, lens=[(3, 50)])
        case.new[:, 2, :, 3] = float("nan")
        found = case.store().run()
        assert found[:2].isfinite().all() and found[2].isnan().all()


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(shim, cache):
    """Alone or in a batch, token by token or several at once, in pages of any size and order, with any walk of the chunks."""
    def last_rows(**options):
        case = Case(cache=cache, **options).store()
        ends = case.query_lens.cumsum(0) - 1
        return case.run()[ends]
    lens = [(1, 900), (1, 300)]
    expected = last_rows(lens=lens)
    for options in ({"page_size": 64}, {"order": 5}, {"page_size": 3}):
        assert torch.equal(last_rows(lens=lens, **options), expected), options
    for processors in (1, 1000):
        shim.count = processors
        assert torch.equal(last_rows(lens=lens), expected), processors


def test_bits_of_tokens_together_are_those_of_each_alone(shim):
    case = Case(lens=[(5, 600)]).store()
    together = case.run()
    for i in range(5):
        one = paged.Sequences.of(case.tables, torch.tensor([1]), torch.tensor([596 + i]), case.q.device)
        assert torch.equal(paged.attend(case.q[i:i + 1], case.cache, one), together[i:i + 1])
    short = paged.Sequences.of(case.tables, torch.tensor([1]), torch.tensor([200]), case.q.device)
    one_chunk = paged.attend(case.q[:1], case.cache, short)
    short.max_context = 1000  # room for chunks that are not there
    assert torch.equal(paged.attend(case.q[:1], case.cache, short), one_chunk)


def test_pages_that_are_not_there_are_seen(shim):
    """Their rows are NaN, the others as ever; nothing is read outside of the cache."""
    case = Case(lens=[(1, 100), (1, 300), (1, 20)])
    k, v = (torch.zeros(len(x) + 2, *x.shape[1:], dtype=x.dtype) for x in (case.cache.k, case.cache.v))
    case.cache = PagedCache(k[1:-1], v[1:-1])  # what lies around it could be read without being noticed
    case.store()
    expected = case.run()
    for bad in (-1, 10 ** 9, len(case.cache.v)):
        table = case.tables.clone()
        case.tables[1, 2] = bad
        found = case.run()
        case.tables = table
        assert found[1].isnan().all() and torch.equal(found[[0, 2]], expected[[0, 2]])


def test_slots_that_no_page_has_are_left_out(shim):
    case = Case(D=16)
    before = case.cache.v.clone()
    k = torch.ones(3, 2, 16, dtype=torch.bfloat16)
    paged.write(case.cache, k, k, torch.tensor([-1, len(before) * 16, 5]))
    changed = (case.cache.v == 1).nonzero()[:, [0, 2]].unique(dim=0)
    assert changed.tolist() == [[0, 5]]


def test_numbers_that_are_not_finite_are_seen_in_scaled_caches(shim):
    for cache in (torch.int8, torch.float8_e4m3fn):
        case = Case(cache=cache, lens=[(1, 50), (1, 50)])
        case.new[1, 0, 0, 3] = float("inf")
        found = case.store().run()
        assert found[0, :2].isnan().all() and found[0, 2:].isfinite().all() and found[1].isfinite().all()


def test_rows_may_lie_apart(shim):
    """q, k and v as views of one tensor."""
    case = Case(H=2, G=2, D=32, lens=[(1, 9), (4, 70)])
    qkv = torch.randn(5, 3, 2, 32).to(torch.bfloat16)
    case.q, case.new = qkv[:, 0], qkv[:, 1:].transpose(0, 1)
    assert not case.new[0].is_contiguous()
    case.store().check()


@pytest.mark.parametrize("page_bytes", [16 * 5, 4 * 7])
def test_copies_of_pages(shim, page_bytes):
    tensors = torch.randint(0, 255, (3, 6, page_bytes), dtype=torch.uint8)
    expected = tensors.clone()
    expected[:, 4], expected[:, 0] = tensors[:, 1], tensors[:, 5]
    pairs = torch.tensor([[1, 4], [5, 0]], dtype=torch.int32)
    launch.run("copy_pages", tensors.device, tensors.data_ptr(), 3, tensors.stride(0), page_bytes, pairs.data_ptr(), 2)
    assert torch.equal(tensors, expected)


def test_the_default_device_is_not_asked(shim):
    case = Case().store()
    expected, kept = case.run(), case.cache.v.clone()
    with torch.device("meta"):
        case.store()
        assert torch.equal(case.run(), expected) and torch.equal(case.cache.v.nan_to_num(), kept.nan_to_num())


def test_nothing_to_do(shim):
    case = Case(lens=[(0, 40), (0, 3)])
    assert case.store().run().shape == (0, 4, 24)


def test_the_op_takes_it(shim):
    case = Case(cache=torch.float16).store()
    found = ops.paged_attention(case.q, case.cache, case.tables.clamp(min=0), case.query_lens, case.context_lens, window=100)
    assert_accurate("paged attention", found, case.truth(window=100), case.truth(torch.float32, 100).half())


def test_a_division_by_the_page_size_is_exact(shim):
    keys = torch.cat([torch.arange(100_000), torch.randint(0, paged.LONGEST, (100_000,)), torch.tensor([paged.LONGEST - 1])])
    for size in range(2, 1025):
        assert torch.equal(keys * shim.library.reciprocal(size) >> 32, keys // size), size
    assert shim.library.reciprocal(1) == 0


def test_launch_rules(shim):
    rules = shim.library
    assert [rules.rows_of_block(*sizes) for sizes in ((1, 1), (1, 4), (2, 1), (16, 8))] == [1, 4, 4, 4]
    # A block walks over more chunks only while 8 blocks a processor remain, and never over more than there are, twice
    for blocks, chunks, processors in ((12, 4, 132), (12 * 64, 4, 132), (12 * 256, 4, 132), (10 ** 6, 100, 1), (1, 1, 1)):
        walk = rules.chunks_of_block(blocks, chunks, processors)
        assert walk < 2 * chunks and walk in (1, 2, 4)
        assert walk == 1 or blocks * -(-chunks // (walk // 2)) > 8 * processors
        assert walk in (4, chunks) or blocks * -(-chunks // walk) <= 8 * processors
    assert rules.partial_floats(3, 4, 64, rules.CHUNK) == 0
    assert rules.partial_floats(3, 4, 64, rules.CHUNK + 1) == 3 * 4 * 2 * 66


@pytest.mark.skipif(not simulable(), reason="needs the triton that the interpreter knows")
def test_the_op_tiles_long_prompts(monkeypatch):
    """By the Triton kernel, where there is one: beside sequences of one token, too."""
    from executors import Interpreter, running
    tiled = []
    monkeypatch.setattr(paged, "prefill", lambda *args, prefill=paged.prefill, **options: tiled.append(1) or prefill(*args, **options))
    with running(Interpreter()), running_cuda(Shim()):
        case = Case(lens=[(paged.MOST_DECODE_ROWS + 1, 40), (1, 9)]).store()
        found = ops.paged_attention(case.q, case.cache, case.tables.clamp(min=0), case.query_lens, case.context_lens)
    assert tiled
    assert_accurate("paged attention", found, case.truth(), case.truth(torch.float32).bfloat16())


def test_caches_that_the_kernels_would_misread(cuda):
    """Each would be read or written outside of its memory, or shifted."""
    def refused(change, match):
        case = Case(cache=torch.int8, D=16)
        change(case.cache)
        with pytest.raises(ValueError, match=match):
            paged.write(case.cache, *case.new, torch.arange(len(case.new[0])))

    refused(lambda c: setattr(c, "k_scale", c.k_scale.half()), "float32")
    refused(lambda c: setattr(c, "v", torch.zeros(*c.v.shape[:3], 32, dtype=torch.int8)[..., ::2]), "side by side")
    refused(lambda c: setattr(c, "v", torch.zeros(c.v.numel() + 1, dtype=torch.int8)[1:].view(c.v.shape)), "aligned")
    cache = PagedCache.empty(1, 1, 2048, 16, lanes=1)
    with pytest.raises(ValueError, match="1024"):
        paged.write(cache, *torch.zeros(2, 1, 1, 16), torch.tensor([0]))
    with pytest.raises(ValueError, match="heads of up to 256"):
        cache, q = PagedCache.empty(1, 1, 16, 264, lanes=1), torch.zeros(1, 1, 264)
        paged.attend(q, cache, paged.Sequences.of(torch.zeros(1, 1, dtype=torch.int32), *[torch.ones(1, dtype=int)] * 2, q.device))
    case = Case()
    for name, tensor in (("v", case.new[1].to("meta")), ("cache.k", None)):
        if tensor is None:
            case.cache.k = case.cache.k.to("meta")
        with pytest.raises(ValueError, match=f"{name} is on"):
            ops.store_kv(case.cache, case.new[0], case.new[1] if tensor is None else tensor, case.tables.clamp(min=0),
                         case.query_lens, case.context_lens)


def test_the_default_dtype_is_not_asked(cuda):
    torch.set_default_dtype(torch.float16)
    try:
        case = Case(cache=torch.int8, dtype=torch.float32, lens=[(1, 600)])
        assert case.cache.k_scale.dtype == torch.float32
        case.store().check()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("H", "G", "cache"), [(H, G, cache) for H, G in ((2, 2), (4, 1), (8, 1)) for cache in CACHES
                                               if H == G or H / G <= 4 or cache in LARGEST], ids=str)
def test_keys_and_values_are_read_once(H, G, cache):
    """For 4 query heads, of caches of bytes for 8. And with the partial results, written and read, no more than 5 % beyond them moves, where heads share no keys."""
    D, lens = 64, [(1, 1024), (1, 700), (1, 257)]
    with running_cuda(Shim()) as executor:
        case = Case(64, cache, D=D, H=H, G=G, lens=lens).store()
        before = executor.library.copied_bytes()
        case.run()
        copied = executor.library.copied_bytes() - before
    least = 2 * G * D * cache.itemsize * sum(length for _, length in lens)
    assert copied == least
    chunks = sum(-(-length // executor.library.CHUNK) for _, length in lens)
    partial = 2 * H * chunks * (D + 2) * 4
    assert partial <= 0.05 * least * H / G  # each query head has partial results of its own
