"""The CUDA kernels of a decoding step alone, a part of bench_gpu, at GPT-2 124M's sizes.

Attention over the paged cache beside flash-attn's and PyTorch's over whole keys, products with weights of few bits beside
PyTorch's in bfloat16, drawing tokens beside fastgpt/torch_sampling.py, which sorts. A row's share is of the bandwidth that a
copy reaches: of the bytes that this contestant must read once, however often it reads them.
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import timing
from benchmarks.accuracy import check_results
from benchmarks.gpu_timing import DTYPE, FLASH, OURS, PYTORCH, Contestant, compare, guarded, imported, row
from fastgpt import SamplingParams, reference, torch_sampling
from fastgpt.cuda import paged, sampling, weight_only
from fastgpt.paged import PagedCache, row_size
from fastgpt.sampling import uniform

CACHES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "float8": torch.float8_e4m3fn}
PAGE, FLASH_PAGE = 64, 256  # tokens: the engine's default, and of what flash-attn takes multiples
FORMATS = ("int8", "int4")
DRAWS = {"top 50": {"temperature": 0.8, "top_k": 50}, "top-p 0.9": {"top_p": 0.9}, "all": {}}
# How far the number that drew a token may lie outside of its part of the mass, of all: what float32 weights are off by.
ROUNDING = 2.0 ** -16


@dataclass(frozen=True)
class Sizes:
    """linears: name -> (N, K, activation); draws: rows of logits."""

    heads: int
    D: int
    context: int
    batches: tuple
    linears: dict
    rows: tuple
    vocabulary: int
    draws: tuple


GPT2 = Sizes(12, 64, 1024, (8, 64), {"qkv": (2304, 768, None), "proj": (768, 768, None), "fc": (3072, 768, "gelu_tanh"),
                                     "out": (768, 3072, None), "head": (50257, 768, None)}, (1, 8, 16), 50257, (1, 64))
TINY = Sizes(2, 16, 40, (3,), {"fc": (24, 40, "gelu_tanh"), "head": (33, 40, None)}, (2,), 65, (4,))


@dataclass
class Case:
    """calls: name -> (a function without arguments, the bytes that it must move). check(name, result) raises an
    AssertionError where that is wrong. failures: name -> why it is not there. setup() comes before each call."""

    spec: str
    what: str
    shape: str
    calls: dict
    check: Callable
    failures: dict = field(default_factory=dict)
    setup: Callable | None = None
    dtype: str = "bfloat16"


def rows(timer, tops, device="cuda", gpt2=True):
    for make in cases(GPT2 if gpt2 else TINY, device):
        yield from measure(make(), timer, tops)


def cases(sizes, device):
    """Functions that make a Case, so that the tensors of one are there at a time."""
    for batch in sizes.batches:
        for cache in CACHES:
            yield partial(attention_case, sizes, batch, cache, device)
    for form in FORMATS:
        for name in sizes.linears:
            for M in sizes.rows:
                yield partial(linear_case, sizes, form, name, M, device)
    for R in sizes.draws:
        for name in DRAWS:
            yield partial(draw_case, sizes, R, name, device)


def measure(case, timer, tops):
    """A row for each contestant; one that is wrong has no figures."""
    failures = {**case.failures, **_wrong(case)}
    right = [Contestant(name, run, timer, case.setup) for name, (run, _) in case.calls.items() if name not in failures]
    result = compare(right, timer)
    failures.update(result.failures)
    known = {"spec": case.spec, "op": case.spec.partition(",")[0], "what": case.what, "dtype": case.dtype,
             "shape": case.shape, "flops": 0}
    return [row({**known, "bytes": case.calls[name][1] if name in case.calls else None}, name, result, failures.get(name), tops)
            for name in (OURS, PYTORCH, FLASH) if name in case.calls or name in failures]


def _wrong(case):
    """Name -> why a contestant's result is wrong, or why there is none."""
    failures = {}
    for name, (run, _) in case.calls.items():
        try:
            if case.setup is not None:
                guarded(case.setup)
            case.check(name, guarded(run))
        except (timing.Failure, AssertionError) as error:
            failures[name] = str(error)
    return failures


def _numbers(op, truth, plain):
    """A check of ours by the accuracy rule, with truth() in float64 and plain() in DTYPE, of all to half of the digits."""
    truth, plain = functools.cache(truth), functools.cache(plain)

    def check(name, result):
        if name == OURS:
            check_results([op], [result], [truth()], [plain()])
        error = float((result.double() - truth()).norm() / truth().norm())
        assert error <= torch.finfo(DTYPE).eps ** 0.5, f"{op}: norm-relative error {error:.3g}"
    return check


# ---- attention

def attention_case(sizes, batch, name, device):
    """A token of each sequence over all the keys of its own, in pages of any order."""
    H, D, S, dtype = sizes.heads, sizes.D, sizes.context, CACHES[name]
    used = -(-S // PAGE)
    lens, ones = torch.full((batch,), S), torch.ones(batch, dtype=torch.int64)
    tables = torch.randperm(batch * used).view(batch, used).int()
    cache = PagedCache.empty(batch * used, H, PAGE, D, dtype, device, lanes=1)
    k, v = torch.randn(2, batch * S, H, D, dtype=DTYPE, device=device)
    paged.write(cache, k, v, paged.slots_of(PAGE, tables, lens, lens).to(device))
    q = torch.randn(batch, H, D, dtype=DTYPE, device=device)
    sequences = paged.Sequences.of(tables, ones, lens, q.device)
    keys, values = (torch.stack([cache.rows(part, table, S) for table in tables]).to(DTYPE) for part in "kv")  # (B, H, S, D)

    def by_reference(wide):
        parts = (None if t is None else t.to(wide) for t in (cache.k, cache.v, cache.k_scale, cache.v_scale))
        return reference.paged_attention(q.to(wide), PagedCache(*parts), tables, ones, lens)
    row_bytes = row_size(D, dtype) * dtype.itemsize + (0 if cache.k_scale is None else 4)
    calls = {OURS: (lambda: paged.attend(q, cache, sequences), 2 * batch * H * S * row_bytes),
             PYTORCH: (lambda: F.scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0], 2 * keys.nbytes)}
    failures = {}
    try:
        calls[FLASH] = _flash(q, keys, values, name), 2 * keys.nbytes
    except timing.Failure as failure:
        failures[FLASH] = str(failure)
    check = _numbers("paged_attention", lambda: by_reference(torch.float64), lambda: by_reference(torch.float32).to(DTYPE))
    return Case(f"paged_attention, {name}", f"{batch} of {S}", f"{batch}x{H}x{S}x{D}", calls, check, failures)


def _flash(q, keys, values, name):
    """flash-attn over the same keys, in pages of its own."""
    if name != "bfloat16":
        raise timing.Failure(f"flash-attn has no cache of {name}")
    attend = imported("flash_attn").flash_attn_with_kvcache
    B, H, S, D = keys.shape
    k, v = (F.pad(x, (0, 0, 0, -S % FLASH_PAGE)).transpose(1, 2).reshape(-1, FLASH_PAGE, H, D) for x in (keys, values))
    tables = torch.arange(len(k), dtype=torch.int32, device=q.device).view(B, -1)
    lens = torch.full((B,), S, dtype=torch.int32, device=q.device)
    return lambda: attend(q[:, None], k, v, cache_seqlens=lens, block_table=tables, causal=True)[:, 0]


# ---- products

def linear_case(sizes, form, name, M, device):
    """PyTorch's has the same weights as numbers of DTYPE."""
    N, K, activation = sizes.linears[name]
    bias = None if name == "head" else torch.randn(N, device=device)
    packed = weight_only.pack(torch.randn(N, K, device=device) * 0.02, form, bias)
    x, weight = torch.randn(M, K, dtype=DTYPE, device=device), packed.dequantised(DTYPE)

    def by_reference(wide, weight):
        return reference.linear(x.to(wide), weight, None if bias is None else bias.to(wide), activation=activation)
    pytorch, moved = partial(by_reference, DTYPE, weight), (M * K + M * N) * DTYPE.itemsize
    packed_bytes = packed.data.nbytes + packed.scales.nbytes
    calls = {OURS: (lambda: weight_only.weight_only_linear(x, packed, activation), packed_bytes + moved),
             PYTORCH: (pytorch, weight.nbytes + moved)}
    check = _numbers("weight_only_linear", lambda: by_reference(torch.float64, packed.dequantised(torch.float64)), pytorch)
    return Case(f"weight_only, {form} {name}", f"M={M}", f"{M}x{K}, {N}x{K}", calls, check)


# ---- tokens

def draw_case(sizes, R, name, device):
    """The same seeds for both, from float32 logits, over which ours writes."""
    V, params = sizes.vocabulary, SamplingParams(**DRAWS[name])
    logits = torch.randn(R, V, device=device) * 3
    work, drawn = torch.empty_like(logits), [sampling.Row(params, seed, 0, 100) for seed in range(R)]
    draws = sampling.draws_of(drawn, logits.device)
    numbers = torch.tensor([uniform(r.seed, r.sample, r.position) for r in drawn], dtype=torch.float64, device=device)

    def check(name, tokens):
        probs = torch_sampling.distribution(logits.double(), params)
        ends = probs.cumsum(1)
        mass, ids = ends[:, -1], tokens.long().clamp(min=0)[:, None]
        end, own = ends.gather(1, ids)[:, 0], probs.gather(1, ids)[:, 0]
        off = torch.maximum(end - own - numbers * mass, numbers * mass - end) / mass
        wrong = (tokens < 0) | (off > ROUNDING)
        assert not wrong.any(), f"sample: {int(wrong.sum())} of {R} rows drew other tokens than their numbers say"
    calls = {OURS: (lambda: sampling.sample(work, draws), logits.nbytes),
             PYTORCH: (lambda: torch_sampling.choose(logits, params, uniforms=numbers), logits.nbytes)}
    return Case(f"sample, {name}", f"R={R}", f"{R}x{V}", calls, check, setup=lambda: work.copy_(logits), dtype="float32")
