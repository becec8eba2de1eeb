"""Prefill over a paged cache: its source interpreted, its compiled code executed, against the reference in float64."""
import pytest

pytest.importorskip("triton")

import torch
from executors import Interpreter, MachineCode, Recorder, running
from interpreter import strict
from numerics import THREE_TF32, assert_accurate
from prediction import record, row, specs

from fastgpt import reference
from fastgpt.kernels.paged_attention import INFERENCE_SPECS, prefill
from fastgpt.paged import PagedCache

pytestmark = pytest.mark.usefixtures("one_thread")

LENS = [(70, 70), (1, 1), (5, 133), (0, 40), (33, 150)]  # (queries, keys): a whole prompt, a token, parts behind a prefix
SHORT = [(1, 1), (67, 230)]  # tiles before the diagonal of any width
ALL_NEW = [(n, n) for _, n in LENS]


class Case:
    """Sequences in a cache with three times the pages that they need, in any order, NaN where nothing was stored.

    The tokens are the same for all pages, page sizes and orders.
    """

    def __init__(self, dtype, cache_dtype=None, page_size=64, D=64, heads=(2, 1), window=0, scale=None, lens=LENS, order=0,
                 v_size=1.0):
        torch.manual_seed(1)
        (H, G), contexts = heads, [keys for _, keys in lens]
        self.window, self.scale, self.queries = window, scale, [queries for queries, _ in lens]
        k, v = torch.randn(2, sum(contexts), G, D).to(dtype)
        v *= v_size
        starts = torch.tensor([0, *contexts]).cumsum(0).tolist()
        qkv = torch.randn(sum(contexts), H + 2 * G, D).to(dtype)  # q is a part of a product's rows
        self.q = torch.cat([qkv[end - queries:end] for queries, end in zip(self.queries, starts[1:])])[:, :H]
        self.context_lens = torch.tensor(contexts)
        P = -(-max(contexts) // page_size)
        pages = 3 * len(lens) * P
        self.tables = torch.randperm(pages, generator=torch.Generator().manual_seed(order))[:len(lens) * P].view(-1, P).int()
        self.cache = PagedCache.empty(pages, G, page_size, D, cache_dtype or dtype, lanes=1)
        for x in (self.cache.k, self.cache.v):  # the scales are NaN as it is
            x.copy_(torch.full_like(x, 99 if x.dtype == torch.int8 else float("nan"), dtype=torch.float32))
        reference.store_kv(self.cache, k, v, self.tables, self.context_lens, self.context_lens)

    def run(self, **changes):
        starts = torch.tensor([0, *self.queries]).cumsum(0).int()
        given = {"window": self.window, "scale": self.scale, "max_query": max(self.queries), **changes}
        most, tables = given.pop("max_query"), given.pop("tables", self.tables)
        return prefill(self.q, self.cache.k[..., 0], self.cache.v, self.cache.k_scale, self.cache.v_scale, tables, starts,
                       self.context_lens.int(), most, **given)

    def expected(self, q, cache):
        return reference.paged_attention(q, cache, self.tables, torch.tensor(self.queries), self.context_lens,
                                         scale=self.scale, window=self.window or None)

    def check(self):
        wide = PagedCache(*(t if t is None else t.double() for t in vars(self.cache).values()))
        assert_accurate("prefill", self.run(), self.expected(self.q.double(), wide), self.expected(self.q, self.cache),
                        unit=THREE_TF32 if self.q.dtype == torch.float32 else None)


def named(name):
    return getattr(torch, {"float8": "float8_e4m3fn"}.get(name, name))


# Queries, cache, page size, D, (heads, those of the keys), others
INTERPRETED = [
    ("float32", "float32", 1, 24, (2, 1), {}),
    ("bfloat16", "bfloat16", 1, 80, (1, 1), {"scale": -0.3}),
    ("float16", "float16", 16, 24, (4, 2), {}),
    ("bfloat16", "bfloat16", 16, 64, (4, 2), {"window": 20}),
    ("float32", "float32", 24, 80, (2, 2), {"window": 70}),
    ("bfloat16", "float16", 24, 24, (6, 2), {}),
    ("float16", "bfloat16", 24, 19, (2, 1), {"window": 1}),
    ("bfloat16", "bfloat16", 24, 24, (2, 1), {"window": 20, "lens": [(33, 100)]}),  # tiles end behind the table
    ("float32", "bfloat16", 64, 64, (2, 1), {}),
    ("bfloat16", "bfloat16", 64, 80, (2, 1), {}),
    ("float16", "float32", 64, 64, (2, 2), {}),
    ("bfloat16", "bfloat16", 256, 24, (2, 1), {"window": 70}),
    ("float32", "float32", 256, 1, (2, 1), {}),
    ("bfloat16", "int8", 16, 24, (4, 2), {}),
    ("float16", "int8", 64, 80, (2, 1), {"window": 70, "v_size": 1e-3}),
    ("float32", "int8", 24, 80, (2, 1), {}),
    ("bfloat16", "float8", 64, 24, (2, 1), {"scale": -0.3}),
    ("float16", "float8", 24, 80, (4, 2), {}),
    ("float32", "float8", 256, 59, (2, 1), {"window": 20}),
]
COMPILED = [
    ("bfloat16", "bfloat16", 64, 80, (2, 1), {"window": 180}, 80),
    ("bfloat16", "bfloat16", 64, 64, (2, 1), {}, 90),
    ("bfloat16", "bfloat16", 16, 24, (2, 1), {}, 80),
    ("float16", "int8", 24, 24, (2, 1), {}, 90),
    ("bfloat16", "float8", 64, 64, (2, 1), {}, 80),
    ("float32", "float32", 64, 24, (2, 1), {}, 90),
]
PART = [(70, 150)]  # queries 80 .. 149
# Page size, entry of the table, window
BAD_PAGES = [(16, 2, 0), (16, 7, 0), (16, 9, 0), (16, 7, 20), (16, 0, 20), (64, 0, 0), (64, 2, 0), (64, 1, 20), (1, 140, 0)]


@pytest.mark.parametrize("dtype, cache_dtype, page_size, D, heads, others", INTERPRETED)
def test_interpreted(dtype, cache_dtype, page_size, D, heads, others):
    with running(Interpreter()), strict(shuffle=1):
        Case(named(dtype), named(cache_dtype), page_size, D, heads, **others).check()


@pytest.mark.parametrize("dtype, cache_dtype, page_size, D, heads, others, arch", COMPILED)
def test_compiled(dtype, cache_dtype, page_size, D, heads, others, arch):
    with running(MachineCode(arch)):
        Case(named(dtype), named(cache_dtype), page_size, D, heads, lens=SHORT, **others).check()


def test_sizes_of_one():
    """A launcher makes a constant of an argument that is 1."""
    with running(MachineCode(90)):
        Case(torch.bfloat16, page_size=1, D=1, heads=(1, 1), lens=[(1, 1)]).check()


def test_nothing_to_do():
    case = Case(torch.float32, lens=[(1, 5)])
    none, starts = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with running(Interpreter()):
        out = prefill(case.q[:0], case.cache.k[..., 0], case.cache.v, None, None, none, starts, none[:, 0], 0)
    assert out.shape == (0, 2, 64)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_bits_depend_on_no_page_and_no_cut(cache_dtype):
    def run(lens, **pages):
        case = Case(torch.bfloat16, named(cache_dtype), lens=lens, **pages)
        return torch.cat([rows[len(rows) - queries:] for rows, (queries, _) in zip(case.run().split(case.queries), LENS)])
    with running(Interpreter()):
        first = run(LENS)
        for lens, pages in ((ALL_NEW, {}), (LENS, {"page_size": 1}), (LENS, {"page_size": 24, "order": 1}),
                            (ALL_NEW, {"page_size": 256, "order": 2})):
            assert torch.equal(run(lens, **pages), first), pages


def test_compiled_bits_depend_on_no_page():
    with running(MachineCode(80)):
        assert torch.equal(*[Case(torch.bfloat16, page_size=size, D=24, lens=SHORT).run() for size in (16, 64)])


def spoilt(case, entry, number):
    """The results with one number in the table of the only sequence, and as they were."""
    tables = case.tables.clone()
    tables[0, entry] = number
    return case.run(tables=tables), case.run()


def check_spoilt(case, rows, right, see):
    """Rows that see a missing key are NaN, the others as they were. see: of queries and keys, both by their place."""
    queries = torch.arange(case.context_lens[0] - len(rows), case.context_lens[0])
    assert torch.equal(rows.isnan().all(2).all(1), see(queries)) and torch.equal(rows.isnan().any(2).any(1), see(queries))
    assert torch.equal(rows[~see(queries)], right[~see(queries)]) and not right.isnan().any()


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("page_size, entry, window", BAD_PAGES)
def test_a_page_that_does_not_exist(page_size, entry, window, cache_dtype):
    """Is not read, and makes NaN of the rows that see its keys; of a window no row sees the keys before."""
    case = Case(torch.bfloat16, named(cache_dtype), page_size, 24, window=window, lens=PART)
    keys = range(entry * page_size, (entry + 1) * page_size)
    number = {16: -1, 64: len(case.cache.v), 1: 2 ** 31 - 1}[page_size]
    with running(Interpreter()), strict():
        check_spoilt(case, *spoilt(case, entry, number), lambda queries: (queries >= keys[0]) & (
            queries < keys[-1] + (window or 2 ** 30)))


def test_a_page_that_does_not_exist_far_in_a_table():
    """Entries are looked at 512 at a time."""
    case = Case(torch.bfloat16, page_size=1, D=24, lens=[(70, 700)])
    with running(Interpreter()), strict():
        check_spoilt(case, *spoilt(case, 540, -1), lambda queries: queries >= 540)


@pytest.mark.parametrize("entry", [0, 1])
def test_a_page_that_does_not_exist_for_rows_in_chunks(entry):
    """Heads whose products are made a chunk of columns at a time."""
    case = Case(torch.float32, D=136, scale=-0.1, lens=[(67, 70)])
    with running(Interpreter()), strict():
        check_spoilt(case, *spoilt(case, entry, -1), lambda queries: queries >= 64 * entry)


@pytest.mark.parametrize("entry", [0, 1])
def test_compiled_a_page_that_does_not_exist(entry):
    case = Case(torch.bfloat16, lens=[(67, 70)])
    with running(MachineCode(90)):
        check_spoilt(case, *spoilt(case, entry, -2 ** 31), lambda queries: queries >= 64 * entry)


def test_keys_behind_the_table():
    """A length that the table has no pages for, as a caller's fault: the table's other sequences' pages are not taken."""
    case = Case(torch.float32, lens=PART)
    with running(Interpreter()):
        right = case.run()
        check_spoilt(case, case.run(tables=case.tables[:, :2]), right, lambda queries: queries >= 128)
        assert case.run(tables=case.tables[:, :0]).isnan().all()
        case.cache = PagedCache.empty(0, 1, 64, 64, lanes=1)
        assert case.run().isnan().all()


def test_output_into_a_view():
    """Of rows and heads that lie apart; and max_query is only a bound."""
    case = Case(torch.float32, D=24)
    wide = torch.full((len(case.q) + 2, 5, 24), 7.0)
    with running(Interpreter()):
        out = case.run(out=wide[1:-1, 1:3], max_query=200)
        assert torch.equal(wide[1:-1, 1:3], case.run())
    assert out.data_ptr() == wide[1:-1, 1:3].data_ptr()
    wide[1:-1, 1:3] = 7
    assert (wide == 7).all()


def test_caches_of_other_strides_are_refused():
    case = Case(torch.float32)
    case.cache.k = case.cache.k[:-1]
    case.cache.v = torch.zeros(1, 64, 64, len(case.cache.k)).movedim(3, 0)
    with pytest.raises(ValueError, match="same strides"):
        case.run()


def test_pages_beyond_offsets_of_32_bits(tmp_path):
    """Pages 2**30 elements apart: in a file that has no blocks but those that are written."""
    pages, page_size, D, apart = 4, 16, 16, 2 ** 30
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=pages * apart, dtype=torch.float16)
    k, v = (memory[start:].as_strided((pages, 1, page_size, D), (apart, page_size * D, D, 1)) for start in (0, apart // 2))
    rows = torch.randn(3, 1, 1, 40, D).half()  # q, k and v
    table = torch.tensor([[3, 0, 2]], dtype=torch.int32)
    for to, tokens in ((k, rows[1]), (v, rows[2])):
        for page, part in zip(table[0].tolist(), tokens[0, 0].split(page_size)):
            to[page, 0, :len(part)] = part
    with running(Interpreter()), strict(races=False):
        out = prefill(rows[0, 0].transpose(0, 1), k, v, None, None, table, torch.tensor([0, 40], dtype=torch.int32),
                      torch.tensor([40], dtype=torch.int32), 40)
    torch.testing.assert_close(out, reference.attention(*rows)[0].transpose(0, 1), rtol=2e-3, atol=2e-3)


def test_nothing_is_read_on_the_host():
    """What a captured graph needs: tensors without data will do."""
    with running(Recorder(90), "meta") as recorder:
        for spec in INFERENCE_SPECS:
            spec.launcher(**spec.inputs(torch.bfloat16, "meta", False)[1])
    assert len(recorder.launches) == len(INFERENCE_SPECS)


def test_loads_go_to_the_end_of_padded_rows():
    """So that they are of 16 bytes; without a pad, as far as there is a row."""
    case = Case(torch.bfloat16, D=19, page_size=16, lens=[(1, 1)])
    with running(Recorder(90)) as recorder:
        case.run()
        case.cache = PagedCache(torch.zeros(1, 1, 16, 19, 1).bfloat16(), torch.zeros(1, 1, 16, 19).bfloat16())
        case.run()
    assert [launch[3]["WIDTH"] for launch in recorder.launches] == [24, 19]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["paged prefill", pytest.param("paged prefill D=128", marks=pytest.mark.slow)])
def test_machine_code(name, arch):
    """No spills, wide loads, and the tensor cores nearly as busy as attention's forward keeps them."""
    spec = next(spec for spec in specs() if spec.name == name)
    found = row(spec, *record(spec, arch), arch)
    assert found["spills"] == 0 and found["efficiency"] >= 0.5
    assert not {width for width in found["widths"] if width.endswith((".16", ".8"))}
