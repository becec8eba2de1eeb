"""B batch, H query heads, G key heads, T queries, S keys, D head size. Tiles have 48 or 64 rows, key blocks 64 or 128 keys."""
import pytest
import torch
from numerics import THREE_TF32, assert_accurate

from fastgpt import extension, ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [  # (B, H, G, T, S, D), queries, options. Of few rows the worst element is chance, in float32 PyTorch's too.
    ((2, 2, 1, 1, 1, 24), (None, None), {}),
    ((2, 4, 2, 5, 5, 59), (None, None), {}),
    ((1, 2, 2, 97, 97, 64), (None, None), {"scale": -0.3}),
    ((3, 4, 2, 5, 257, 111), ([3, 0], [4, 1, 2]), {}),
    ((2, 3, 1, 257, 97, 24), ([1], range(256, 0, -5)), {}),
    ((2, 2, 1, 97, 257, 64), ([1, 0], range(0, 97, 3)), {"causal": False, "key_mask": True}),
    ((2, 4, 2, 1, 257, 59), (None, [0]), {"key_mask": True, "scale": 0.05}),
    ((2, 2, 1, 97, 257, 24), ([1], range(96, 0, -4)), {"window": 7, "key_mask": True}),
    ((1, 2, 1, 257, 257, 24), ([0], range(0, 257, 4)), {"window": 64}),
    ((1, 2, 2, 97, 40, 16), (None, None), {"window": 1}),
    ((1, 2, 1, 70, 70, 64), ([1], None), {"window": 1000}),
    ((1, 2, 1, 5, 70, 256), (None, [4, 0]), {}),
]


def make_inputs(B, H, G, T, S, D, dtype=torch.float32):
    """q and k with the heads of a token side by side, as a model has them."""
    return tuple(torch.randn(B, n, heads, D, dtype=dtype).transpose(1, 2) for heads, n in ((H, T), (G, S)))


def some_keys(B, S):
    """A mask that hides a third of the keys, and all early ones of batch 0."""
    mask = torch.rand(B, S) > 0.3
    mask[0, :S // 4] = False
    return mask


def log_sum(q, k, **options):
    """In float64."""
    return reference.attention(q.double(), k.double(), k.double(), return_lse=True, **options)[1]


def unit_of(q):
    """numerics' unit: the Triton kernels multiply float32 by three products in TF32."""
    triton = ops.resolve("attention_weights", q)[0] == "triton"
    return THREE_TF32 if q.dtype == torch.float32 and triton else torch.finfo(q.dtype).eps / 2


def check(shape, queries, dtype, key_mask=False, **options):
    """The op against the reference in float64, PyTorch being the reference in the dtype, with the same log-sum-exp."""
    q, k = make_inputs(*shape, dtype)
    options["key_mask"] = some_keys(shape[0], shape[4]) if key_mask else None
    lse = log_sum(q, k, **options)
    actual, pytorch = (module.attention_weights(q, k, lse.float(), queries=queries, **options) for module in (ops, reference))
    truth = reference.attention_weights(q.double(), k.double(), lse, queries=queries, **options)
    assert_accurate("weights", actual, truth, pytorch, unit=unit_of(q))
    assert torch.equal(actual != 0, pytorch != 0) or dtype == torch.float16  # which loses the smallest
    return actual


@pytest.mark.parametrize("shape, queries, options", CASES, ids=str)
def test_values(shape, queries, options, dtype, implementation):
    check(shape, queries, dtype, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_the_weights_are_those_of_attention(masked, dtype, implementation):
    """Times the values they are its output, and a row's sum is 1."""
    (q, k), v = make_inputs(2, 2, 1, 60, 130, 24, dtype), torch.randn(2, 1, 130, 24, dtype=dtype)
    mask, wide = some_keys(2, 130) if masked else None, (q.double(), k.double(), v.double())
    lse = ops.attention(q, k, v, key_mask=mask, return_lse=True)[1]
    weights = ops.attention_weights(q, k, lse, key_mask=mask)
    pytorch, theirs = reference.attention(q, k, v, key_mask=mask, return_lse=True)
    theirs = reference.attention_weights(q, k, theirs, key_mask=mask)
    out = weights @ v.repeat_interleave(2, dim=1)
    assert_accurate("output", out, reference.attention(*wide, key_mask=mask), pytorch, unit=unit_of(q))
    sums, pytorch = (x.double().sum(-1) for x in (weights, theirs))
    assert_accurate("sum", sums, torch.ones_like(sums), pytorch, unit=unit_of(q))


def test_chosen_ones_have_the_bits_of_all(dtype, implementation):
    """In any order, more than once, as tensors, alone or with the rest of the batch."""
    q, k = make_inputs(2, 4, 2, 70, 70, 24, dtype)
    mask = some_keys(2, 70)
    lse = log_sum(q, k, key_mask=mask).float()
    whole = ops.attention_weights(q, k, lse, key_mask=mask)
    for heads, rows in (([3, 0, 3], [69, 2, 2, 40]), (torch.tensor([1, 2]), torch.arange(70)[::2]), ((2,), range(5, 60)), ([], [1]),
                        (None, [])):
        part = ops.attention_weights(q, k, lse, queries=(heads, rows), key_mask=mask)
        heads, rows = (slice(None) if x is None else torch.as_tensor(x, dtype=torch.int64) for x in (heads, rows))
        # Interpreted Triton's products are numpy's, whose bits depend on a row's place in a tile
        torch.testing.assert_close(part, whole[:, heads][:, :, rows], rtol=3e-6 if implementation == "triton" else 0, atol=0)
    alone = ops.attention_weights(q[1:2], k[1:2], lse[1:2], key_mask=mask[1:2])
    assert torch.equal(alone, whole[1:2])


def test_any_strides(implementation):
    q, k = torch.randn(2, 16, 3, 9).permute(0, 2, 3, 1), torch.randn(2, 3, 9, 32)[..., ::2]
    lse, mask = log_sum(q, k).float().transpose(0, 1).contiguous().transpose(0, 1), torch.ones(2, 18).bool()[:, ::2]
    expected = ops.attention_weights(q.contiguous(), k.contiguous(), lse.contiguous(), key_mask=mask.contiguous())
    assert torch.equal(ops.attention_weights(q, k, lse, key_mask=mask), expected)


def test_rows_that_see_no_key_are_zero(dtype, implementation):
    q, k = make_inputs(2, 2, 2, 30, 10, 16, dtype)  # causal: the first 20 queries see nothing
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1] = False
    lse = log_sum(q, k, key_mask=mask).float()
    weights = ops.attention_weights(q, k, lse, key_mask=mask)
    assert not weights[0, :, :20].any() and not weights[1].any() and weights[0, :, 20:].any()
    # What attention says of a row is enough
    assert not ops.attention_weights(q, k, lse)[1].any()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_garbage_behind_masks_reaches_nothing(garbage, dtype, implementation):
    q, k = make_inputs(2, 1, 1, 8, 150, 24, dtype)
    mask = torch.rand(2, 150) > 0.3
    for options, hidden in (({"key_mask": mask, "causal": False}, ~mask[:, None, :, None]),
                            ({}, (torch.arange(150) > 142 + 5).view(1, 1, 150, 1))):
        lse, rows = log_sum(q, k, **options).float(), (None, [0, 3, 5])
        clean = ops.attention_weights(q, k, lse, queries=rows, **options)
        dirty = ops.attention_weights(q, k.masked_fill(hidden, garbage), lse, queries=rows, **options)
        assert torch.equal(clean, dirty) and clean.isfinite().all()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores(size, implementation):
    q, k = (size ** 0.5 * x for x in make_inputs(1, 2, 2, 33, 70, 16))
    weights = ops.attention_weights(q, k, ops.attention(q, k, k, return_lse=True)[1])
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 33), rtol=4 * size * 2 ** -22, atol=0)


@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 3, 8), (2, 2, 2, 0, 3, 8), (2, 2, 2, 3, 0, 8), (2, 0, 1, 3, 3, 8)], ids=str)
def test_empty(shape, dtype, implementation):
    B, H, _, T, S, _ = shape
    q, k = make_inputs(*shape, dtype)
    assert ops.attention_weights(q, k, torch.zeros(B, H, T)).shape == (B, H, T, S)


def check_far_apart(folder):
    """Rows of q and heads of k at offsets beyond 32 bits, in a file that has no blocks but those that are written."""
    (rows, q_apart), (heads, k_apart) = (520, 2 ** 22), (4, 2 ** 30)
    memory = torch.from_file(str(folder / "sparse"), shared=True, size=heads * k_apart, dtype=torch.float32)
    q, k = memory.as_strided((1, 1, rows, 8), (0, 0, q_apart, 1)), memory.as_strided((1, heads, 3, 8), (0, k_apart, 8, 1), 64)
    last = torch.randn(2, 8)
    q[0, 0, -2:] = last
    k.copy_(torch.randn(k.shape))
    lse = torch.zeros(1, heads, rows)
    weights = ops.attention_weights(q.expand(1, heads, rows, 8), k, lse, queries=(None, [rows - 2, rows - 1]))
    expected = reference.attention_weights(last.expand(1, heads, 2, 8), k.contiguous(), lse[:, :, :2])
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)


def test_offsets_beyond_32_bits(tmp_path, level):
    check_far_apart(tmp_path)


def test_same_bits_on_any_number_of_threads(level):
    q, k = make_inputs(2, 4, 2, 130, 150, 64)
    before, results, lse = extension.get_num_threads(), [], log_sum(q, k).float()
    try:
        for count in (1, 2, 3, 5):
            extension.set_num_threads(count)
            results.append(ops.attention_weights(q, k, lse))
    finally:
        extension.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_there_is_no_gradient(backend):
    (q, k), lse = make_inputs(1, 2, 2, 5, 5, 8), torch.zeros(1, 2, 5)
    with ops.backend(backend):
        weights = ops.attention_weights(q.requires_grad_(), k.requires_grad_(), lse.requires_grad_())
    assert not weights.requires_grad


def test_compiles_whole_to_the_same_bits(dtype):
    q, k = make_inputs(2, 4, 2, 11, 19, 8, dtype)
    lse = log_sum(q, k).float()

    def last(q, k, lse):
        return ops.attention_weights(q, k, lse, queries=([3, 1], [10]), window=4)
    assert torch.equal(torch.compile(last, fullgraph=True, backend="aot_eager")(q, k, lse), last(q, k, lse))


def test_library_op():
    (q, k), chosen = make_inputs(1, 4, 2, 5, 9, 8), torch.tensor([3, 1])
    arguments = (q, k, torch.zeros(1, 4, 5), chosen, chosen, some_keys(1, 9), True, 0.3, 4)
    torch.library.opcheck(torch.ops.fastgpt.attention_weights.default, arguments)


def test_autocast_and_what_the_kernels_do_not_take():
    (q, k), lse = make_inputs(1, 2, 2, 9, 9, 16), torch.full((1, 2, 9), 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.attention_weights(q, k, lse), ops.attention_weights(q.bfloat16(), k.bfloat16(), lse))
    wide = q.double(), k.double(), lse.double()
    assert torch.equal(ops.attention_weights(*wide), reference.attention_weights(*wide))
    with ops.backend("cpp"), pytest.raises(RuntimeError, match="float32 and bfloat16, not torch.float64"):
        ops.attention_weights(*wide)


@pytest.mark.parametrize("change, message", [
    ({"q": torch.randn(2, 3, 4)}, "q must have 4 dimensions"),
    ({"q": torch.randn(1, 3, 4, 8)}, "q's 3 heads must be a multiple of k's 2"),
    ({"k": torch.randn(1, 2, 4, 9)}, "k must have head size 8 as q"),
    ({"k": torch.randn(1, 2, 4, 8).bfloat16()}, "q is torch.float32, k torch.bfloat16"),
    ({"lse": torch.zeros(1, 2, 5)}, r"lse must be torch.float32 of shape \(1, 2, 4\), got torch.float32 \(1, 2, 5\)"),
    ({"lse": torch.zeros(1, 2, 4).double()}, "lse must be torch.float32"),
    ({"lse": torch.zeros(1, 2, 4, device="meta")}, "lse is on meta"),
    ({"queries": [0]}, r"queries must be \(heads, rows\), got \[0\]"),
    ({"queries": ([2], None)}, r"heads must be ints in \[0, 2\), got 2"),
    ({"queries": ([0, -1], None)}, r"heads must be ints in \[0, 2\), got -1"),
    ({"queries": (None, [4])}, r"rows must be ints in \[0, 4\), got 4"),
    ({"queries": (None, torch.tensor([0, -4]))}, r"rows must be ints in \[0, 4\), got -4"),
    ({"queries": (None, 7)}, r"rows must be ints in \[0, 4\), got 7"),
    ({"queries": ([True], None)}, r"heads must be ints in \[0, 2\), got True"),
    ({"queries": (None, torch.tensor([0.5]))}, r"rows must be ints in \[0, 4\), got 0.5"),
    ({"queries": (torch.tensor([[0, 1]]), None)}, r"heads must be ints in \[0, 2\), got \[0, 1\]"),
    ({"key_mask": torch.ones(1, 4)}, "key_mask must be bool"),
    ({"window": 0}, "window must be an int of at least 1, got 0"),
    ({"window": 3, "causal": False}, "a window needs causal=True"),
])
def test_broken_input_is_named(change, message):
    q, k = make_inputs(1, 2, 2, 4, 4, 8)
    with pytest.raises(ValueError, match=f"attention_weights: {message}"):
        ops.attention_weights(**{"q": q, "k": k, "lse": torch.zeros(1, 2, 4), **change})


def test_who_answers():
    q = torch.randn(1, 1, 1, 8)
    assert ops.resolve("attention_weights", q) == ("cpp", "the first choice on cpu") or extension.MISSING
    assert ops.resolve("attention_weights", q.half())[1].startswith("not cpp: ")
    name, reason = ops.resolve("attention_weights", device="cuda")
    assert name == "triton" or reason.startswith("not triton: ")
