"""Attention's weights: the source interpreted in any order of programs, the compiled code executed."""
import pytest

pytest.importorskip("triton")

import torch
from executors import Interpreter, MachineCode, running
from interpreter import strict
from test_attention_weights import check, check_far_apart

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, CHOSEN = (2, 4, 2, 33, 70, 24), ([3, 0, 2], range(32, -1, -1))
COMPILED = [("bfloat16", 80, {}), ("bfloat16", 90, {}), ("bfloat16", 80, {"window": 7, "key_mask": True, "scale": -0.3}),
            ("float32", 90, {"causal": False, "key_mask": True})]


def test_interpreted_with_its_programs_in_any_order():
    with running(Interpreter()), strict(shuffle=1):
        check((1, 2, 1, 130, 150, 24), (None, None), torch.bfloat16)


@pytest.mark.parametrize("dtype, arch, options", COMPILED)
def test_compiled(dtype, arch, options):
    with running(MachineCode(arch)):
        check(SHAPE, CHOSEN, getattr(torch, dtype), **options)


def test_sizes_of_one():
    """A launcher makes a constant of an argument that is 1."""
    with running(MachineCode(90)):
        check((1, 1, 1, 1, 1, 1), (None, None), torch.bfloat16, window=1)


def test_offsets_beyond_32_bits(tmp_path):
    with running(Interpreter()), strict(races=False):
        check_far_apart(tmp_path)
