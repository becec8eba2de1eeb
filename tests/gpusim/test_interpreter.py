"""The interpreter computes what a GPU would, and sees each of the faults it claims to see."""
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import planted
from interpreter import SimulationError, simulate, strict
from number_formats import bfloat16_to_float32, float32_to_bfloat16, round_to_tf32, truncate_to_tf32

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def special_values():
    """float32 numbers of every exponent, halfway cases of both parities, zeros, infinities and NaN."""
    bits = torch.randint(-2 ** 31, 2 ** 31, (4096,), dtype=torch.int64).to(torch.int32)
    halfway = bits[:2048] & ~0xFFFF | 0x8000
    named = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.3961775e38, 1e-40])
    return torch.cat([bits.view(torch.float32), halfway.view(torch.float32), named])


def test_bfloat16_rounds_to_nearest_even():
    values = special_values()
    ours = torch.from_numpy(float32_to_bfloat16(values.numpy()).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(ours, values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    back = torch.from_numpy(bfloat16_to_float32(ours.view(torch.int16).numpy().view(np.uint16)))
    torch.testing.assert_close(back, ours.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits, rounded, truncated", [
    (0x3F800FFF, 0x3F800000, 0x3F800000), (0x3F801000, 0x3F802000, 0x3F800000), (0x3F803000, 0x3F804000, 0x3F802000),
    (0xBF801000, 0xBF802000, 0xBF800000), (0x7F800000, 0x7F800000, 0x7F800000)])
def test_tf32_rounds_ties_away_from_zero(bits, rounded, truncated):
    value = np.array([bits], np.uint32).view(np.float32)
    assert round_to_tf32(value).view(np.uint32)[0] == rounded
    assert truncate_to_tf32(value).view(np.uint32)[0] == truncated
    assert np.isnan(round_to_tf32(np.float32([np.nan])))


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_conversions(source, target):
    x = special_values().to(source)
    y = torch.empty(x.shape, dtype=target)
    simulate(planted.convert)[(7,)](x, y, x.numel(), BLOCK=1024)
    torch.testing.assert_close(y, x.to(target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("element", FLOATS)
def test_arithmetic_rounds_after_each_operation(element):
    x, w = torch.randn(2, 256).to(element)
    y = torch.empty_like(x)
    simulate(planted.multiply_add)[(1,)](x, w, y, BLOCK=256)
    assert torch.equal(y, x * w + x)


@pytest.mark.parametrize("element", FLOATS)
def test_reductions(element):
    x, y = torch.randn(64).to(element), torch.empty(6)
    simulate(planted.reductions)[(1,)](x, y, BLOCK=64)
    values = x.float()
    expected = [values.sum(), x.max(), x.min(), x.argmax(), values.cumsum(0).max(), x.max()]
    unit = torch.finfo(element).eps
    torch.testing.assert_close(y, torch.tensor([float(value) for value in expected]), rtol=unit, atol=8 * unit)


def test_integers_wrap_and_device_functions_return_tuples():
    y = torch.empty(64, dtype=torch.int32)
    simulate(planted.hashes)[(1,)](y, 77, BLOCK=64, num_warps=4, num_stages=2)
    total = np.zeros(64, np.uint32)
    for step in range(3):
        raw = ((np.arange(64, dtype=np.uint32) + np.uint32(step)) ^ np.uint32(77)) * np.uint32(0x9E3779B1)
        total += raw ^ (raw >> np.uint32(15)) ^ raw
    assert np.array_equal(y.numpy().view(np.uint32), total)


def test_static_assert_and_unknown_arguments():
    with pytest.raises(AssertionError, match="whole warps"):
        simulate(planted.hashes)[(1,)](torch.empty(16, dtype=torch.int32), 77, BLOCK=16)
    with pytest.raises(TypeError, match="blocks"):
        simulate(planted.hashes)[(1,)](torch.empty(64, dtype=torch.int32), 77, BLOCK=64, blocks=64)
    with pytest.raises(TypeError, match="bound"), strict(bound=False):
        pass


def test_float_argument_is_a_float32_tensor():
    x = torch.randn(64)
    y = torch.empty(64)
    simulate(planted.softplus_scaled)[lambda arguments: (1,)](x, y, 0.1, BLOCK=64)
    torch.testing.assert_close(y, torch.nn.functional.softplus(x) * 0.1)


def matrix_product(a, b, precision, total=torch.float32):
    import triton.language as tl
    c = torch.empty(a.shape[0], b.shape[1], dtype=total)
    grid = a.shape[0] // 32, b.shape[1] // 32
    simulate(planted.product)[grid](a, b, c, b.shape[1], a.shape[1], ROWS=32, COLUMNS=32, DEPTH=32, PRECISION=precision,
                                    SUM={torch.float32: tl.float32, torch.float16: tl.float16}[total])
    return c


def relative_error(actual, truth):
    return ((actual.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("element", FLOATS)
def test_dot_sums_in_float32(element):
    a, b = torch.randn(2, 64, 64).to(element)
    assert relative_error(matrix_product(a, b, "ieee"), a.double() @ b.double()) < 3e-7


def test_dot_in_float16_rounds_its_sum():
    a, b = torch.randn(2, 32, 32).half()
    assert torch.equal(matrix_product(a, b, "ieee", torch.float16), (a.float() @ b.float()).half())


def test_dot_in_tf32_loses_the_low_bits():
    a, b = torch.randn(2, 64, 64)
    truncated = [torch.from_numpy(truncate_to_tf32(m.numpy())).double() for m in (a, b)]
    c = matrix_product(a, b, "tf32")
    assert relative_error(c, truncated[0] @ truncated[1]) < 3e-7
    assert relative_error(c, a.double() @ b.double()) > 3e-4


def test_dot_in_three_tf32_products_keeps_nearly_all_bits():
    a, b = torch.randn(2, 64, 64)
    error = relative_error(matrix_product(a, b, "tf32x3"), a.double() @ b.double())
    assert error < 1e-6
    big = [torch.from_numpy(round_to_tf32(m.numpy())) for m in (a, b)]
    small = [torch.from_numpy(round_to_tf32((m - part).numpy())).double() for m, part in zip((a, b), big)]
    without_smallest = a.double() @ b.double() - small[0] @ small[1]
    assert relative_error(matrix_product(a, b, "tf32x3"), without_smallest) < 4e-7


def test_dot_in_three_tf32_products_keeps_infinities():
    a, b = torch.ones(2, 32, 32)
    a[0, 0] = torch.inf
    c = matrix_product(a, b, "tf32x3")
    assert torch.equal(c[0], torch.full((32,), torch.inf)) and torch.equal(c[1:], torch.full((31, 32), 32.0))


@pytest.mark.parametrize("element", FLOATS)
def test_undefined_lanes_are_nan(element):
    x, y = torch.randn(2, 32).to(element)
    simulate(planted.copy_undefined)[(1,)](x, y, 20, BLOCK=32)
    assert torch.equal(y[:20], x[:20]) and y[20:].isnan().all()


@pytest.mark.parametrize("element", [torch.int32, torch.int8])
def test_undefined_integers_are_odd(element):
    x, y = torch.ones(2, 32, dtype=element)
    simulate(planted.copy_undefined)[(1,)](x, y, 20, BLOCK=32)
    assert (y[20:] > 99).all()
    with strict(poison=False):
        simulate(planted.copy_undefined)[(1,)](x, y, 20, BLOCK=32)
    assert (y[20:] == 0).all()


def test_accesses_inside_the_arguments_pass():
    x, y = torch.randn(2, 100)
    simulate(planted.copy)[(4,)](x, y, 100, BLOCK=32)
    assert torch.equal(x, y)


@pytest.mark.parametrize("flags, message", [
    ({"LOAD_MASKED": False}, r"load outside every argument: program \(3, 0, 0\), 28 of 32 lanes"),
    ({"STORE_MASKED": False}, r"store outside every argument: program \(3, 0, 0\), 28 of 32 lanes")])
def test_accesses_past_the_end_of_a_view_are_seen(flags, message):
    x, y = torch.zeros(128)[:100], torch.zeros(128)[:100]
    with pytest.raises(SimulationError, match=message):
        simulate(planted.copy)[(4,)](x, y, 100, BLOCK=32, **flags)
    with strict(bounds=False):
        simulate(planted.copy)[(4,)](x, y, 100, BLOCK=32, **flags)


def test_two_programs_storing_one_element_are_seen():
    y = torch.zeros(96, dtype=torch.int32)
    simulate(planted.store_chunks)[(3,)](y, STEP=32, BLOCK=32)
    assert torch.equal(y, torch.arange(96, dtype=torch.int32))
    with pytest.raises(SimulationError, match=r"race: program \(1, 0, 0\) stores what another program stored"):
        simulate(planted.store_chunks)[(3,)](y, STEP=16, BLOCK=32)


def test_a_program_loading_what_another_stores_is_seen():
    y = torch.zeros(12)
    simulate(planted.count_on)[(4,)](y, DISTANCE=6)
    assert y.tolist() == [0] * 6 + [1] * 4 + [0] * 2
    with pytest.raises(SimulationError, match=r"race: program \(1, 0, 0\) loads what program number 0 stored"):
        simulate(planted.count_on)[(4,)](y, DISTANCE=1)


def test_a_program_storing_what_another_loaded_is_seen():
    with pytest.raises(SimulationError, match=r"race: program \(1, 0, 0\) stores what another program loaded"):
        simulate(planted.replace_first)[(2,)](torch.zeros(2), OWN=False)
    y = torch.zeros(2)
    simulate(planted.replace_first)[(2,)](y, OWN=True)
    assert y.tolist() == [1, 1]


def test_atomics_are_no_race():
    x, y = torch.ones(4, 32), torch.zeros(32)
    simulate(planted.column_sums)[(4,)](x, y, ATOMIC=True, BLOCK=32)
    assert torch.equal(y, torch.full((32,), 4.0))
    with pytest.raises(SimulationError, match="race: .* loads what program number 0 stored"):
        simulate(planted.column_sums)[(4,)](x, y, ATOMIC=False, BLOCK=32)
    with pytest.raises(SimulationError, match="atomic outside every argument"):
        simulate(planted.column_sums)[(1,)](x, y[:16], ATOMIC=True, BLOCK=32)


def test_atomic_add_of_bfloat16():
    x, y = torch.ones(4, 32, dtype=torch.bfloat16), torch.full((32,), 0.5, dtype=torch.bfloat16)
    simulate(planted.column_sums)[(4,)](x, y, ATOMIC=True, BLOCK=32)
    assert torch.equal(y, torch.full((32,), 4.5, dtype=torch.bfloat16))


def test_two_lanes_storing_to_one_address_are_seen():
    y = torch.zeros(32, dtype=torch.int32)
    simulate(planted.store_modulo)[(1,)](y, MODULUS=32, BLOCK=32)
    with pytest.raises(SimulationError, match="race: two lanes of program"):
        simulate(planted.store_modulo)[(1,)](y, MODULUS=16, BLOCK=32)


def test_shuffled_programs_reveal_that_order_matters():
    results = []
    for seed in (None, 1):
        y = torch.zeros(33)
        with strict(races=False, shuffle=seed):
            simulate(planted.count_on)[(32,)](y, DISTANCE=1)
        results.append(y)
    assert torch.equal(results[0], torch.arange(33.0)) and not torch.equal(*results)


def test_what_strict_changes_ends_with_it():
    y = torch.zeros(33)
    with strict(races=False):
        simulate(planted.count_on)[(32,)](y, DISTANCE=1)
    with pytest.raises(SimulationError):
        simulate(planted.count_on)[(32,)](y, DISTANCE=1)


def test_interpreting_leaves_triton_able_to_compile_and_to_refuse():
    from compiling import compile_kernel
    simulate(planted.row_sums)[(2,)](torch.ones(2, 64), torch.empty(2), BLOCK=64)
    compiled = compile_kernel(planted.row_sums, {"X": "*fp32", "Y": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 64},
                              ["X", "Y"], arch=80)
    assert "shfl.sync" in compiled.asm["ptx"]
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        planted.row_sums(1, 2, 3)
