"""The CPU's simulation of CUDA: kernels with planted faults are refused, those without run right, and numbers are CUDA's."""
import re
from unittest import mock

import cuda_shim
import pytest
import torch
from cuda_executors import Shim, running_cuda

if cuda_shim.missing():
    pytest.skip(cuda_shim.missing(), allow_module_level=True)

from cuda_module import Pointer, static_shared
from cuda_sanitizers import call, captured, missing, sanitize

from fastgpt.cuda import launch

SOURCES = [cuda_shim.SIMULATOR.with_name("planted.cu"), cuda_shim.SIMULATOR.with_name("planted.cpp")]
ORDERS = [("fifo", "late"), ("fifo", "early"), ("rand:1", "late"), ("rand:2", "early")]
NAN = float("nan")


@pytest.fixture(scope="module")
def planted():
    return cuda_shim.load(cuda_shim.build(sources=SOURCES))


def run(module, name, x=None, n=1, blocks=1, size=256, order="fifo", copies="late"):
    """What the kernel makes of x, of `size` numbers."""
    x = torch.arange(256.0) if x is None else x
    out = torch.full((size,), NAN)
    Shim(order, copies, module=module).library.planted(name, x.data_ptr(), out.data_ptr(), n, blocks)
    return out


@pytest.mark.parametrize("mode", ORDERS, ids="-".join)
def test_kernels_without_faults(planted, mode):
    x = torch.randn(3, 4, 64)
    assert run(planted, "reversed", x, blocks=12, size=768, order=mode[0]).equal(x.view(12, 64).flip(1).flatten())
    out = run(planted, "streamed", x, n=3, order=mode[0], copies=mode[1])
    assert out.equal(x[0].flatten() + x[1].flatten() + x[2].flatten())
    assert run(planted, "copied", x, n=700, size=700, order=mode[0]).equal(x.flatten()[:700])
    filled = run(planted, "zero filled", n=3, order=mode[0], copies=mode[1])
    assert filled.equal(torch.where(torch.arange(256) < 12, torch.arange(256.0), 0))
    assert run(planted, "early end", order=mode[0])[:40].eq(20).all()
    assert run(planted, "counted", order=mode[0])[:64].eq(64).all()


def test_a_missing_barrier_shows(planted):
    assert run(planted, "reversed, no barrier", size=64).isnan().any()
    x = torch.randn(3 * 256)
    for order in ("fifo", "rand:1"):
        sums = x[:256] + x[256:512] + x[512:]
        right, wrong = ([run(planted, name, x, n=3, order=order, copies=copies).equal(sums) for copies in ("late", "early")]
                        for name in ("streamed", "streamed, no barrier"))
        assert all(right) and not all(wrong), order


def test_a_wait_for_too_little_shows_in_late_copies(planted):
    assert run(planted, "streamed, waits for too little", torch.randn(768), n=3).isnan().all()


def test_shared_memory_is_nan_in_every_block(planted):
    for name in ("unwritten static", "unwritten dynamic", "all that is given unasked"):
        assert run(planted, name, torch.ones(64), blocks=3, size=192).isnan().all(), name


def test_random_orders_differ(planted):
    outs = {tuple(run(planted, "last thread", n=4, blocks=4, size=5, order=f"rand:{seed}").tolist()) for seed in range(4)}
    assert len(outs) == 4
    assert run(planted, "last thread", n=4, blocks=4, size=5).tolist() == [63, 63, 63, 63, 3]
    same = [run(planted, "last thread", n=4, blocks=4, size=5, order="rand:7").tolist() for _ in range(2)]
    assert same[0] == same[1]


FAULTS = {"divergent barrier": r"divergent barrier: __syncthreads planted.cu:\d+ and __syncthreads planted.cu:\d+",
          "half a warp at a barrier": r"deadlock in block \(0, 0, 0\), 16 at __syncthreads planted.cu:\d+ .*, 16 at __syncwarp",
          "lanes missing": r"deadlock in block .*, 16 at __shfl_xor_sync",
          "lane outside its mask": "__shfl_xor_sync .* not in its own mask",
          "lane outside the mask read": "__shfl_sync .* reads lane 16, which is not in the mask",
          "masks that disagree": "lanes of a warp disagree on the mask",
          "different shuffles": r"lanes of a warp meet at __shfl_xor_sync planted.cu:\d+ and __shfl_xor_sync planted.cu:\d+",
          "misaligned": r"misaligned access at planted.cu:\d+: 0x.*c is not a multiple of 16",
          "misaligned copy": "cp.async: an address is not a multiple of 16",
          "copy not waited for": "ends with copies that it did not wait for",
          "no dynamic shared": "DYNAMIC_SHARED in a launch without shared bytes",
          "trap": r"__trap \[block \(0, 0, 0\), thread \(40, 0, 0\)\]",
          "too many threads": r"planted\(n=3, blocks=1\): invalid configuration argument",
          "too much shared": r"planted\(n=3, blocks=1\): invalid argument \(1048576 bytes of shared memory, sm_75 has 65536\)",
          "too much with the static": r"invalid argument \(73728 bytes of shared memory, sm_75 has 65536\)",
          "more than is given unasked": r"invalid argument \(53248 bytes of shared memory, 49152 are given unasked\)"}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("order", ["fifo", "rand:1"])
def test_faults_are_exceptions(planted, name, order):
    with pytest.raises(RuntimeError, match=FAULTS[name]):
        run(planted, name, n=3, order=order)
    after = run(planted, "reversed", blocks=2, size=128)
    assert after.view(2, 64).flip(1).flatten().equal(torch.arange(128.0)), "the next launch"


def test_launch_errors(planted):
    with pytest.raises(RuntimeError, match=r"planted\(n=1, blocks=0\): invalid configuration argument"):
        run(planted, "copied", blocks=0)
    planted.fail_next_launch("out of memory")
    with pytest.raises(RuntimeError, match=r"planted\(n=1, blocks=1\): out of memory"):
        run(planted, "copied")
    with pytest.raises(RuntimeError, match=r"null pointer at planted.cu:\d+ \["):
        planted.planted("copied", 0, torch.zeros(64).data_ptr(), 1, 1)
    assert run(planted, "copied", n=5, size=5).equal(torch.arange(5.0))


def test_halves_of_a_warp(planted):
    x = torch.randn(64).round(decimals=1)
    for order in ("fifo", "rand:1"):
        out = run(planted, "halves", x, size=64, order=order)
        torch.testing.assert_close(out, x.view(4, 16).sum(1).repeat_interleave(16))


@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(planted, width):
    x, lane = torch.arange(32.0), torch.arange(32)
    segment = lane // width * width
    out = run(planted, "shuffles", x, n=width, size=224).view(7, 32)
    assert out[0].equal((segment + 3).float())
    assert out[1].equal(torch.where(lane - 2 >= segment, lane - 2, lane).float())
    assert out[2].equal(torch.where(lane + 2 < segment + width, lane + 2, lane).float())
    assert out[3].equal((lane ^ 5).float())
    assert out[4].eq(2 ** 24 - 4).all()
    assert out[5].eq(2).all() and out[6].eq(2).all()


def test_atomics_and_numbers(planted):
    assert run(planted, "atomics", torch.arange(64.0), n=99, size=5, order="rand:3").tolist() == [2016, -7, 63, 9, 255]
    out = run(planted, "numbers", torch.tensor([1.5]), n=7, size=6)
    assert out.tolist() == [pytest.approx(2 ** 1.5, rel=1e-7), 0, torch.tensor(0x44112233).float(), 3, 3108, 7.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matrix_products(planted, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    out = run(planted, f"product of {str(dtype)[6:]}", torch.cat([a.flatten(), b.flatten()]).float(), size=128)
    torch.testing.assert_close(out.view(16, 8), 1 + a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_recorded_launches(planted):
    seen, x = [], torch.arange(256.0)
    with cuda_shim.launches(planted, lambda *launched: seen.append(launched)):
        out = run(planted, "streamed", x, n=3, blocks=2)
    assert out.isnan().all(), "nothing runs"
    (symbol, grid, block, shared, arguments), = seen
    assert symbol.startswith("_ZN7fastgpt4cuda8streamed") and (grid, block, shared) == ((2, 1, 1), (64, 1, 1), 2048)
    assert [int.from_bytes(a, "little") for a in arguments] == [x.data_ptr(), out.data_ptr(), 3]
    assert [len(a) for a in arguments] == [8, 8, 4]
    with pytest.raises(ZeroDivisionError), cuda_shim.launches(planted, lambda *launched: 1 / 0):
        run(planted, "streamed")
    assert not run(planted, "copied", n=5, size=5).isnan().any(), "and runs again"


def test_shared_arrays_are_a_kernels_own():
    """Those of a function that it calls would be counted as nobody's."""
    functions = {symbol for symbol, *_ in static_shared(cuda_shim.build()) if symbol.startswith("_ZN7fastgpt4cuda")}
    assert len(functions) > 20 and all(re.match(r"_ZN7fastgpt4cuda\d+\w*?_kernelI", symbol) for symbol in functions), functions


def calls(*names, n=3):
    return [call("planted", name, torch.arange(768.0), torch.zeros(768), n, 1) for name in names]


SANITIZED = [("address", "copied, one too many", 768, "heap-buffer-overflow.*planted.cu"),
             ("address", "beyond static shared", 1, "global-buffer-overflow.*planted.cu"),
             ("address", "beyond dynamic shared", 1, "heap-buffer-overflow.*planted.cu"),
             ("address", "misaligned", 3, "misaligned access"),
             ("thread", "reversed, no barrier", 3, "data race.*planted.cu"),
             ("thread", "streamed, no barrier", 3, "copies early.*data race.*planted.cu"),
             ("thread", "counted, not atomic", 3, "data race.*planted.cu"),
             ("thread", "trap", 3, "__trap")]


@pytest.mark.parametrize(("kind", "name", "n", "report"), SANITIZED, ids=lambda value: str(value) if value != 3 else "")
def test_sanitizers_report(kind, name, n, report):
    if missing(kind):
        pytest.skip(missing(kind))
    with pytest.raises(AssertionError, match=f"(?s){kind}: planted, .*{report}"):
        sanitize(kind, calls(name, n=n), SOURCES)


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing_where_nothing_is(kind):
    if missing(kind):
        pytest.skip(missing(kind))
    sanitize(kind, calls("reversed", "streamed", "copied", "early end", "halves", "counted", "atomics", "zero filled"), SOURCES)


def test_captured_calls_have_what_they_point_at():
    """To the end of the last row's padding, and no further."""
    padded = torch.arange(160.0).view(10, 16)[2:5, :10]
    with captured() as noted, mock.patch.object(cuda_shim.shim(), "touch", lambda *arguments: arguments, create=True):
        made = torch.zeros(3, dtype=torch.float16)
        launch.run("touch", torch.device("cpu"), (1, padded.data_ptr()), made.data_ptr(), padded[0].data_ptr(), 7)
        with pytest.raises(LookupError, match="touch: 0x.* is not the address of a tensor"):
            launch.run("touch", torch.device("cpu"), padded.data_ptr() + 4)
    (one,) = noted
    (_, first), second, third, seven, stream = one.arguments
    assert (one.name, first, second, third, seven, stream) == ("touch", Pointer(0), Pointer(1), Pointer(0), 7, 0)
    assert [len(contents) for contents, _ in one.buffers] == [4 * (2 * 16 + 12), 6]
    assert torch.frombuffer(bytearray(one.buffers[0][0]), dtype=torch.float32).equal(torch.arange(32.0, 76.0))


def test_what_shim_takes():
    for wrong in ({"order": "lifo"}, {"copies": "never"}):
        with pytest.raises(ValueError, match="expected fifo or rand:SEED, and late or early"):
            Shim(**wrong, module=object())


def test_the_executor_is_put_back():
    before = launch.executor
    with running_cuda(Shim(module=object())):
        assert launch.executor is not before
    assert launch.executor is before
