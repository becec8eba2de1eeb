"""The CUDA kernels on the CPU under AddressSanitizer and ThreadSanitizer, in two orders of their threads, with copies that
land early and late. The numbers are the other tests' concern."""
import cuda_shim
import pytest
import torch

if cuda_shim.missing():
    pytest.skip(cuda_shim.missing(), allow_module_level=True)

from cuda_sanitizers import captured, missing, sanitize

from fastgpt import ops
from fastgpt.cuda import launch, sampling, weight_only
from fastgpt.paged import LARGEST, PagedCache

CACHES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
LENS = [(1, 20), (3, 3), (1, 270), (0, 5)]  # (new tokens, with those before)
SIZES = [(24, 1, 4, 2, None), (59, 16, 2, 1, None), (128, 24, 2, 2, 30), (200, 64, 1, 1, None), (64, 16, 2, 2, None)]


def cached_attention(cache_dtype, D, page_size, H, G, window):
    dtype = torch.bfloat16 if cache_dtype in LARGEST else cache_dtype
    query_lens, context_lens = (torch.tensor(column) for column in zip(*LENS))
    most = -(-int(context_lens.max()) // page_size)
    tables = torch.randperm(len(LENS) * most).view(len(LENS), most).int()
    cache = PagedCache.empty(len(LENS) * most, G, page_size, D, cache_dtype, lanes=1)
    packed = torch.randn(int(query_lens.sum()), H + 2 * G, D).to(dtype)
    ops.store_kv(cache, packed[:, H:H + G], packed[:, H + G:], tables, query_lens, context_lens)
    ops.paged_attention(packed[:, :H], cache, tables, query_lens, context_lens, window=window)


def copied_pages():
    """Words of 16 bytes, and of 4."""
    for width in (8, 7):
        pages, pairs = torch.randn(2, 5, 6, width), torch.tensor([[0, 3], [1, 4]], dtype=torch.int32)
        launch.run("copy_pages", pages.device, pages.data_ptr(), 2, 4 * 30 * width, 4 * 6 * width, pairs.data_ptr(), 2)


def weights_of_few_bits():
    shapes = [("int8", 1, 17, 40, None), ("int4", 9, 33, 129, "gelu"), ("int8", 16, 20, 300, "relu"), ("int4", 3, 16, 64, None)]
    for format, M, N, K, activation in shapes:
        packed = weight_only.pack(torch.randn(N, K), format, torch.randn(N) if activation else None)
        for dtype in (torch.float16, torch.bfloat16):
            weight_only.weight_only_linear(torch.randn(M, K).to(dtype), packed, activation, torch.randn(M, N).to(dtype))


def drawn_tokens():
    params = [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 5}, {"top_p": 0.7, "min_p": 0.01},
              {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {3: 1.0, 90: -2.0}}]
    rows = [sampling.Row(sampling.SamplingParams(**p), 5 + i, i, 4, [1, 2, 90, 2], 2) for i, p in enumerate(params)]
    for dtype, count in ((torch.float32, 4), (torch.float16, 3)):
        sampling.sample(torch.randn(count, 101).to(dtype), sampling.draws_of(rows[:count], torch.device("cpu")))


@pytest.fixture(scope="module")
def calls():
    torch.manual_seed(0)
    with captured() as noted:
        for cache, size in zip(CACHES, SIZES):
            cached_attention(cache, *size)
        copied_pages()
        weights_of_few_bits()
        drawn_tokens()
    return noted


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_kernels_are_clean(kind, calls):
    if missing(kind):
        pytest.skip(missing(kind))
    sanitize(kind, calls)
