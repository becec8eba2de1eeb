"""What nvcc makes of the CUDA kernels, executed: right numbers, every access inside of a tensor, no race between warps."""
import re

import cuda_shim
import nvcc
import pytest
import torch
from cuda_executors import Shim, running_cuda
from cuda_machine import octets_of, running_machine_code
from ptx_machine import PtxError
from test_cuda_paged import CACHES, Case

from fastgpt import ops
from fastgpt.cuda import launch

pytestmark = pytest.mark.skipif(bool(nvcc.MISSING), reason=str(nvcc.MISSING))
LENS = [(1, 1), (1, 200), (2, 3)]


def stored(*arguments, **options):
    """A case whose cache the reference has filled."""
    with ops.backend("reference"):
        return Case(*arguments, **options).store()


@pytest.fixture(params=[80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (75, 90))])
def machine(request):
    with running_machine_code(request.param) as executor:
        yield executor


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_paged_attention(machine, cache):
    stored(16, cache, D=24, lens=LENS).check()
    stored(16, cache, D=64, lens=[(1, 300)], H=2).check()


@pytest.mark.parametrize("D", [80, 256])
def test_wide_heads(machine, D):
    stored(5, torch.float8_e4m3fn, torch.float16, D, H=3, G=1, lens=LENS).check(window=33)


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_store_kv(machine, cache):
    """The bits that the same source stores on the CPU."""
    ours, theirs = (Case(5, cache, D=37, lens=[(3, 7)]) for _ in range(2))
    ours.store()
    with running_cuda(Shim()):
        theirs.store()
    for name in ("k", "v", "k_scale", "v_scale"):
        a, b = getattr(ours.cache, name), getattr(theirs.cache, name)
        assert a is None or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_copied_pages(machine):
    for size in (4, 48):
        pages = torch.randint(0, 99, (3, 5, size), dtype=torch.uint8)
        expected, pairs = pages.clone(), torch.tensor([[4, 0], [1, 3]], dtype=torch.int32)
        expected[:, 0], expected[:, 3] = pages[:, 4], pages[:, 1]
        launch.run("copy_pages", pages.device, pages.data_ptr(), 3, 5 * size, size, pairs.data_ptr(), 2)
        assert torch.equal(pages, expected)


# What newer processors have an instruction for, and the same of sm_80: test_ptx_opcodes.py compares their results.
NEWER = [(r"cvt\.f32\.bf16 (%f\d+), (%rs\d+);", r"mov.b32 \1, {0,\2};"),
         (r"\{ sub\.bf16x2 (%r\d+),(%r\d+),(%r\d+); \}",
          r"{.reg .b32 c;\n  mov.b32 c, 0xbf80bf80U;\n  fma.rn.bf16x2 \1,\3,c,\2;}")]


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (89, 100, 120))])
@pytest.mark.parametrize("source", cuda_shim.kernel_sources(), ids=lambda path: path.stem)
def test_what_is_executed_for_sm_80_is_what_newer_processors_get(source, arch):
    """Instruction by instruction, so that one execution speaks for all."""
    text = nvcc.ptx(source, arch).replace(f".target sm_{arch}", ".target sm_80")
    for newer, older in NEWER:
        text = re.sub(newer, older, text)
    assert text.splitlines() == nvcc.ptx(source, 80).splitlines()


PLANTED = {"a barrier removed": (r"bar\.sync[^;]*;", "", "race in shared memory"),
           "copies waited for too late": (r"(cp\.async\.wait_group\s+)\d;", r"\g<1>7;", "NaN"),
           "a sum across the wrong lanes": (r"shfl\.sync\.bfly", "shfl.sync.down", "norm-relative error")}


@pytest.mark.parametrize("fault", PLANTED)
def test_faults_are_seen(fault):
    pattern, replacement, message = PLANTED[fault]

    def edit(symbol, ptx):
        return re.sub(pattern, replacement, ptx) if "paged_attention" in symbol else ptx
    with running_machine_code(80, edit=edit), pytest.raises((PtxError, AssertionError), match=message):
        stored(16, torch.bfloat16, D=64, lens=[(1, 300), (1, 20)]).check()


def test_the_memory_of_a_view():
    """From its first element to its last, and the padding of the last row."""
    rows = torch.zeros(3, 2, 16, dtype=torch.int8)
    assert len(octets_of(rows[..., :10])) == 96 and len(octets_of(rows[1:2, :, :10])) == 32
    assert len(octets_of(torch.zeros(7, 5)[2:4, 1:3])) == 36 and len(octets_of(torch.zeros(5))) == 20
