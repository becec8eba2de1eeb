"""B batch, H query heads, G key heads, T queries, S keys, D head size. Key blocks hold 128 keys: S > 128 has several."""
import math

import pytest
import torch
import torch.nn.functional as F
from numerics import THREE_TF32, assert_accurate, check_op

from fastgpt import extension, ops, reference

SHAPES = [  # B, H, G, T, S, D, causal, with a key mask
    (3, 2, 2, 2, 2, 24, True, False),
    (2, 3, 3, 7, 7, 59, True, False),
    (2, 6, 2, 97, 97, 64, True, False),
    (1, 2, 2, 257, 257, 80, True, True),
    (2, 4, 1, 97, 257, 111, True, False),
    (1, 2, 2, 257, 97, 64, True, True),
    (2, 2, 1, 130, 129, 128, False, True),
    (1, 2, 1, 70, 70, 96, True, False),
    (1, 2, 2, 33, 65, 100, True, False),
    (1, 2, 2, 40, 150, 256, True, False),
    (1, 2, 1, 40, 70, 200, False, True),
    (1, 6, 2, 1, 257, 64, True, True),
    (2, 2, 2, 1, 97, 24, False, False),
    (1, 1, 1, 520, 520, 8, True, False),  # enough keys for two runs in backward
]
ONE_KEY = [(1, 1, 1, 1, 1, 1, True, False), (1, 3, 1, 64, 1, 16, False, False)]
SEEDS = [(0, 0.1), (77, 0.5), (2 ** 40 + 5, 0.9), (2 ** 63 - 2, 0.3)]


def make_inputs(B, H, G, T, S, D, dtype=torch.float32):
    return {"q": torch.randn(B, H, T, D, dtype=dtype), "k": torch.randn(B, G, S, D, dtype=dtype),
            "v": torch.randn(B, G, S, D, dtype=dtype)}


def some_keys(B, S):
    """A mask that hides a third of the keys, and all early ones of batch 0, so that its first causal rows see none."""
    mask = torch.rand(B, S) > 0.3
    mask[0, :S // 4] = False
    return mask


def unit_of(q):
    """numerics' unit: the Triton kernels multiply float32 by three products in TF32."""
    return THREE_TF32 if q.dtype == torch.float32 and ops.resolve("attention", q)[0] == "triton" else None


def check(inputs, **options):
    check_op(lambda q, k, v: ops.attention(q, k, v, **options), inputs,
             lambda q, k, v: reference.attention(q, k, v, **options),
             lambda q, k, v: pytorchs_attention(q, k, v, **options), unit=unit_of(inputs["q"]))


def pytorchs_attention(q, k, v, causal=True, key_mask=None, scale=None, **dropout):
    """PyTorch's own op, but the reference where that has no such thing: our dropout's mask, rows that see no key."""
    visible = reference.attention_mask(q.shape[2], k.shape[2], causal, key_mask)
    if dropout or not visible.any(-1).all():
        return reference.attention(q, k, v, causal=causal, key_mask=key_mask, scale=scale, **dropout)
    return F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)


def outputs_and_gradients(q, k, v, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = ops.attention(*leaves, **options)
    dout = torch.randn(out.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(out.device, out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.fixture
def thread_counts():
    """Sets the number of threads; the fixture puts it back."""
    before = extension.get_num_threads()
    yield extension.set_num_threads
    extension.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, implementation):
    B, H, G, T, S, D, causal, masked = shape
    check(make_inputs(B, H, G, T, S, D, dtype), causal=causal, key_mask=some_keys(B, S) if masked else None)


@pytest.mark.parametrize("shape", ONE_KEY, ids=str)
def test_one_key(shape, dtype, implementation):
    """The weights are 1 and their gradients 0, but for what rounding leaves."""
    B, H, G, T, S, D, causal, _ = shape
    inputs = make_inputs(B, H, G, T, S, D, dtype)
    out, dq, dk, dv = outputs_and_gradients(**inputs, causal=causal)
    unit = unit_of(inputs["q"]) or torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out, inputs["v"].repeat_interleave(H // G, 1).expand_as(out), rtol=unit, atol=0)
    assert max(dq.abs().max(), dk.abs().max()) <= 8 * unit * T * D * max(t.abs().max() for t in inputs.values()) ** 3
    assert dv.any()


def test_scale(implementation):
    check(make_inputs(1, 2, 2, 9, 9, 16), scale=0.7)
    check(make_inputs(1, 2, 2, 9, 9, 16), scale=-0.25)
    zero = ops.attention(**make_inputs(1, 1, 1, 3, 5, 8), scale=0, causal=False)
    assert torch.equal(zero[:, :, 0], zero[:, :, 2])


@pytest.mark.parametrize("seed, dropout_p", SEEDS, ids=str)
def test_dropout(seed, dropout_p, dtype, implementation):
    inputs = make_inputs(2, 4, 2, 37, 150, 24, dtype)
    check(inputs, dropout_p=dropout_p, seed=seed, key_mask=some_keys(2, 150))


@pytest.mark.parametrize("seed, dropout_p", SEEDS, ids=str)
def test_the_dropout_mask_is_the_references(seed, dropout_p, implementation):
    B, H, T, S = 2, 3, 5, 256
    # With equal scores and v the identity, the output is the mask itself.
    v = torch.eye(S).expand(B, H, S, S)
    q, k = torch.zeros(B, H, T, S), torch.randn(B, H, S, S)
    out = ops.attention(q, k, v, causal=False, dropout_p=dropout_p, seed=seed)
    keep = reference.dropout_keep_mask(seed, dropout_p, B, H, T, S)
    assert torch.equal(out > 0, keep)
    assert torch.allclose(out[keep], torch.tensor(1 / S / (1 - dropout_p)))
    count, n = keep.sum(), keep.numel()
    assert abs(count - n * (1 - dropout_p)) < 5 * (n * dropout_p * (1 - dropout_p)) ** 0.5


def test_dropout_draws_a_seed_from_torchs_generator(implementation):
    inputs = make_inputs(1, 2, 2, 20, 20, 8)
    torch.manual_seed(3)
    first, second = (ops.attention(**inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, ops.attention(**inputs, dropout_p=0.5)) and not torch.equal(first, second)


def test_heads_of_one_qkv_tensor_need_no_copies(implementation, dtype):
    B, T, H, D = 2, 70, 3, 32
    qkv = torch.randn(B, T, 3 * H * D, dtype=dtype)
    views = [part.view(B, T, H, D).transpose(1, 2) for part in qkv.split(H * D, dim=2)]
    dense = [view.contiguous() for view in views]
    results = outputs_and_gradients(*views)
    assert all(map(torch.equal, results, outputs_and_gradients(*dense)))
    for result in results:  # laid out so that the heads join for nothing
        joined = result.transpose(1, 2).reshape(B, T, H * D)
        assert joined.data_ptr() == result.data_ptr()


@pytest.mark.parametrize("T, S", [(70, 70), (7, 150), (150, 40)])
@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_window(window, T, S, dtype, implementation):
    inputs = make_inputs(1, 4, 2, T, S, 16, dtype)
    with ops.backend("auto"):  # the C++ kernels leave it to the reference
        check(inputs, window=window)
        if dtype == torch.float32:
            check(inputs, window=window, dropout_p=0.2, seed=3)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 5}, {"dropout_p": 0.3, "seed": 2 ** 40 + 1}], ids=str)
def test_packed_sequences(options, dtype, implementation):
    q, k, v = (torch.randn(n, heads, 24, dtype=dtype) for n, heads in ((150, 4), (160, 2), (160, 2)))
    starts = [torch.tensor(rows, dtype=torch.int32) for rows in ([0, 0, 70, 71, 150], [0, 5, 80, 81, 160])]
    with ops.backend("auto"):
        check_op(lambda q, k, v: ops.packed_attention(q, k, v, *starts, **options), {"q": q, "k": k, "v": v},
                 lambda q, k, v: reference.packed_attention(q, k, v, *starts, **options), unit=unit_of(q))


@pytest.mark.parametrize("q_lengths, k_lengths, D", [([0, 1, 0, 1], [0, 3, 0, 5], 64), ([0, 40, 30, 0], [50, 60, 30, 7], 256),
                                                     ([15, 85, 200], [15, 85, 200], 100)], ids=str)
def test_packed_sequences_without_rows(q_lengths, k_lengths, D, implementation):
    q, k, v = (torch.randn(sum(lengths), heads, D) for lengths, heads in ((q_lengths, 3), (k_lengths, 1), (k_lengths, 1)))
    starts = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (q_lengths, k_lengths)]
    check_op(lambda q, k, v: ops.packed_attention(q, k, v, *starts), {"q": q, "k": k, "v": v},
             lambda q, k, v: reference.packed_attention(q, k, v, *starts), unit=unit_of(q))


@pytest.mark.parametrize("starts, message", [
    ([0, 3], "q_starts must rise from 0 to the 4 rows"), ([1, 4], "q_starts must rise from 0"),
    ([0, 3, 2, 4], "q_starts and k_starts must have one shape"), ([0, 5, 4], "q_starts must rise from 0 to the 4 rows"),
])
def test_wrong_starts_are_named(starts, message):
    q = torch.randn(4, 2, 8)
    k_starts = torch.tensor([0, 4] if len(starts) == 2 else [0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"packed_attention: {message}"):
        ops.packed_attention(q, q, q, torch.tensor(starts, dtype=torch.int32), k_starts)


def test_log_sum_exp(dtype, implementation):
    inputs, mask = make_inputs(2, 4, 2, 37, 150, 24, dtype), some_keys(2, 150)
    mask[1] = False
    out, lse = ops.attention(**inputs, key_mask=mask, return_lse=True)
    _, truth = reference.attention(*(t.double() for t in inputs.values()), key_mask=mask, return_lse=True)
    _, pytorch = reference.attention(**{n: t.float() for n, t in inputs.items()}, key_mask=mask, return_lse=True)
    assert torch.equal(out, ops.attention(**inputs, key_mask=mask)) and (lse[1] == -math.inf).all()
    assert_accurate("lse", lse[0], truth[0], pytorch[0], unit=unit_of(inputs["q"]))


def test_any_strides(implementation):
    q, k, v = torch.randn(2, 16, 3, 9).permute(0, 2, 3, 1), torch.randn(2, 3, 9, 32)[..., ::2], torch.randn(3, 9, 16)
    v = v.expand(2, 3, 9, 16)
    assert torch.equal(ops.attention(q, k, v), ops.attention(q.contiguous(), k.contiguous(), v.contiguous()))
    leaf = q.detach().requires_grad_()
    of_sum, = torch.autograd.grad(ops.attention(leaf, k, v).sum(), leaf)  # a gradient of stride 0
    of_ones, = torch.autograd.grad(ops.attention(leaf, k, v), leaf, torch.ones(q.shape))
    assert torch.equal(of_sum, of_ones)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("T", [1, 40])
def test_garbage_behind_the_key_mask_reaches_nothing(T, garbage, dtype, implementation):
    B, H, S, D = 2, 2, 200, 24
    inputs, mask = make_inputs(B, H, H, T, S, D, dtype), torch.rand(B, S) > 0.3
    clean = outputs_and_gradients(**inputs, key_mask=mask, causal=False)
    for name in ("k", "v"):
        inputs[name] = inputs[name].masked_fill(~mask[:, None, :, None], garbage)
    dirty = outputs_and_gradients(**inputs, key_mask=mask, causal=False)
    assert all(map(torch.equal, clean, dirty))
    for gradient in dirty[2:]:
        assert not gradient.masked_select(~mask[:, None, :, None]).any()


def test_garbage_in_later_keys_does_not_reach_earlier_rows(dtype, level):
    inputs = make_inputs(1, 2, 2, 200, 200, 24, dtype)
    clean = ops.attention(**inputs)
    inputs["k"][:, :, 150:], inputs["v"][:, :, 150:] = float("nan"), float("nan")
    dirty = ops.attention(**inputs)
    assert torch.equal(clean[:, :, :150], dirty[:, :, :150]) and dirty[:, :, 150:].isnan().all()


def test_rows_that_see_no_key_are_zero(dtype, implementation):
    inputs = make_inputs(2, 2, 2, 30, 10, 16, dtype)  # causal: the first 20 queries see nothing
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1] = False
    out, dq, dk, dv = outputs_and_gradients(**inputs, key_mask=mask)
    for rows in (out[:, :, :20], dq[:, :, :20], out[1], dq[1], dk[1], dv[1]):
        assert not rows.any()
    assert out[0, :, 20:].any() and dk[0].any()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores(size, dtype, implementation):
    inputs = make_inputs(1, 2, 2, 150, 150, 16, dtype)
    inputs["q"] *= size ** 0.5
    inputs["k"] *= size ** 0.5
    for gradient in outputs_and_gradients(**inputs):
        assert gradient.isfinite().all()
    truth = reference.attention(*(t.double() for t in inputs.values()))
    pytorch = reference.attention(**inputs)
    error = (ops.attention(**inputs) - truth).norm()
    if pytorch.isfinite().all():  # float16's scores overflow there
        assert error <= (2 if unit_of(inputs["q"]) is None else 8) * (pytorch - truth).norm()


@pytest.mark.parametrize("chunk", [1, 7, 64, 300])
@pytest.mark.parametrize("D", [59, 80])
def test_a_row_has_the_same_bits_in_any_chunk(chunk, D, dtype, level):
    """A query with the keys up to its own gives what it gives in one call with all the others."""
    T = 300
    inputs = make_inputs(1, 2, 2, T, T, D, dtype)
    q, k, v = inputs.values()
    whole = ops.attention(q, k, v)
    starts = range(0, T, chunk) if chunk > 1 else [0, 1, 6, 127, 128, 129, 255, 256, 299]
    for start in starts:
        end = min(T, start + chunk)
        part = ops.attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end])
        assert torch.equal(part, whole[:, :, start:end]), f"queries {start} to {end}"


def test_a_row_has_the_same_bits_in_any_batch(dtype, implementation):
    inputs = make_inputs(3, 6, 2, 70, 200, 64, dtype)
    mask = some_keys(3, 200)
    whole = outputs_and_gradients(**inputs, key_mask=mask)
    for b in range(3):
        alone = {name: t[b:b + 1] for name, t in inputs.items()}
        assert torch.equal(ops.attention(**alone, key_mask=mask[b:b + 1]), whole[0][b:b + 1])
    for h in range(6):  # one query head and its key head
        g = h // 3
        alone = ops.attention(inputs["q"][:, h:h + 1], inputs["k"][:, g:g + 1], inputs["v"][:, g:g + 1], key_mask=mask)
        assert torch.equal(alone, whole[0][:, h:h + 1])


@pytest.mark.parametrize("shape", [(1, 1, 1, 600, 600, 16), (2, 6, 2, 130, 130, 24), (1, 3, 1, 1, 700, 64)], ids=str)
def test_same_bits_on_any_number_of_threads(shape, thread_counts, level):
    inputs, results = make_inputs(*shape), []
    for count in (1, 2, 3, 5):
        thread_counts(count)
        results.append(outputs_and_gradients(**inputs, dropout_p=0.1, seed=5))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_same_bits_in_every_run(thread_counts, level):
    thread_counts(3)
    inputs = make_inputs(2, 3, 3, 65, 257, 24)
    first = outputs_and_gradients(**inputs)
    for _ in range(50):
        assert all(map(torch.equal, first, outputs_and_gradients(**inputs)))


@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 3, 8), (2, 2, 2, 0, 3, 8), (2, 2, 2, 3, 0, 8), (2, 0, 1, 3, 3, 8)],
                         ids=str)
def test_empty(shape, dtype, implementation):
    inputs = make_inputs(*shape, dtype)
    check(inputs)
    out, *gradients = outputs_and_gradients(**inputs, causal=False)
    assert out.shape == inputs["q"].shape and not any(t.any() for t in (out, *gradients))


def test_one_gradient_alone():
    inputs = make_inputs(1, 2, 2, 9, 9, 8)
    _, *gradients = outputs_and_gradients(**inputs)
    for name, expected in zip("qkv", gradients):
        leaves = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        out = ops.attention(**leaves)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        assert torch.equal(torch.autograd.grad(out, leaves[name], dout)[0], expected)


def test_nothing_is_kept_for_a_backward_that_cannot_come(monkeypatch):
    shapes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: shapes.append(a) or empty(*a, **kw))
    inputs = make_inputs(1, 2, 2, 9, 9, 8)
    with torch.no_grad():
        ops.attention(**{n: t.requires_grad_() for n, t in inputs.items()})
    assert shapes == [((0,),)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_library_op(dropout_p):
    inputs = [t.requires_grad_() for t in make_inputs(1, 4, 2, 5, 9, 8).values()]
    seed = torch.tensor(11) if dropout_p else None
    arguments = (*inputs, some_keys(1, 9), seed, True, 0.3, dropout_p, 0)
    torch.library.opcheck(torch.ops.fastgpt.attention.default, (*arguments, True))
    out, lse = torch.ops.fastgpt.attention(*arguments, True)
    torch.library.opcheck(torch.ops.fastgpt.attention_backward.default,
                          [t.detach() if isinstance(t, torch.Tensor) else t
                           for t in (out, *inputs, out, lse, *arguments[3:])])


def test_compiled_with_backward_and_dropout():
    leaves = [t.requires_grad_() for t in make_inputs(2, 4, 2, 11, 19, 8).values()]

    def block(q, k, v):
        y = ops.attention(q, k, v, dropout_p=0.3, seed=12, key_mask=torch.ones(2, 19, dtype=torch.bool))
        return y.transpose(1, 2).reshape(2, 11, 32)
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(map(torch.equal, *results))


def test_compiled_with_a_drawn_seed():
    """Forward and backward drop the same weights, others in each call."""
    S = 32
    q, k = torch.zeros(1, 1, S, S), torch.randn(1, 1, S, S)
    v = torch.eye(S).view(1, 1, S, S).requires_grad_()
    compiled = torch.compile(lambda q, k, v: ops.attention(q, k, v, causal=False, dropout_p=0.5), fullgraph=True,
                             backend="aot_eager")
    first, second = compiled(q, k, v), compiled(q, k, v)
    assert not torch.equal(first, second)
    gradient, = torch.autograd.grad(first, v, torch.eye(S).view(1, 1, S, S))
    assert torch.allclose(gradient, first.transpose(2, 3))


def test_autocast():
    inputs = make_inputs(1, 2, 2, 9, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out, *gradients = outputs_and_gradients(**inputs)
    assert out.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in gradients)
    assert torch.equal(out, ops.attention(*(t.bfloat16() for t in inputs.values())))


def test_what_the_kernels_do_not_take_goes_to_the_reference():
    wide, double = make_inputs(1, 1, 1, 2, 2, 257), make_inputs(1, 1, 1, 2, 2, 8, torch.float64)
    for inputs in (wide, double):
        assert torch.equal(ops.attention(**inputs), reference.attention(**inputs))
    with ops.backend("cpp"), pytest.raises(RuntimeError, match="head sizes up to 256, not 257"):
        ops.attention(**wide)


@pytest.mark.parametrize("change, message", [
    ({"q": torch.randn(2, 3, 4)}, "q must have 4 dimensions"),
    ({"v": torch.randn(1, 2, 5, 8)}, "k and v must have one shape"),
    ({"q": torch.randn(1, 3, 4, 8)}, "q's 3 heads must be a multiple of k's 2"),
    ({"q": torch.randn(1, 2, 4, 9)}, "k must have head size 9 as q"),
    ({"q": torch.randn(1, 2, 4, 8).bfloat16()}, "q is torch.bfloat16, k torch.float32"),
    ({"key_mask": torch.ones(1, 3) > 0}, r"key_mask must be bool of shape \(1, 4\), got torch.bool \(1, 3\)"),
    ({"key_mask": torch.ones(1, 4)}, "key_mask must be bool"),
    ({"dropout_p": 1.0}, r"dropout_p must be a number in \[0.0, 1.0\), got 1.0"),
    ({"dropout_p": 0.1, "seed": -1}, r"seed must be an int in \[0, 2\*\*63\), got -1"),
    ({"scale": "1"}, "scale must be a number"),
    ({"k": torch.randn(2, 2, 4, 8), "v": torch.randn(2, 2, 4, 8)}, "k must have batch 1 and head size 8 as q"),
    ({"window": 0}, "window must be an int of at least 1, got 0"),
    ({"window": 3, "causal": False}, "a window needs causal=True"),
])
def test_broken_input_is_named(change, message):
    with pytest.raises(ValueError, match=f"attention: {message}"):
        ops.attention(**{**make_inputs(1, 2, 2, 4, 4, 8), **change})
