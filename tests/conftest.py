"""Fixtures: every implementation of the ops, every dtype, and outputs that hold NaN until a kernel writes them."""
import contextlib

import pytest
import torch
from versions import simulable

from fastgpt import extension, ops

LEVELS = [name for name in extension.LEVELS if extension._C and extension.level_refusal(name) is None]
# The Triton kernels run interpreted; "gpu", with pytest -m gpu, is the same kernels on a GPU.
IMPLEMENTATIONS = [*LEVELS, *(["triton"] if simulable() else []), "gpu"]
DTYPES = ["float32", "bfloat16"]


def pytest_generate_tests(metafunc):
    """Tests that ask for an implementation run once on each, those that ask for a dtype once in each that it has."""
    own = {name for mark in metafunc.definition.iter_markers("parametrize") for name in _names(mark.args[0])}
    wanted = [name for name in ("implementation", "dtype") if name in metafunc.fixturenames and name not in own]
    if wanted == ["dtype"]:
        metafunc.parametrize("dtype", DTYPES, indirect=True)
    elif wanted:
        cases = [(name, dtype) for name in IMPLEMENTATIONS for dtype in _dtypes(name)[:None if "dtype" in wanted else 1]]
        metafunc.parametrize(wanted, [pytest.param(*case[:len(wanted)], marks=[pytest.mark.gpu] if case[0] == "gpu" else [],
                                                   id="-".join(case[:len(wanted)])) for case in cases], indirect=True)


def _names(names):
    return names.replace(",", " ").split() if isinstance(names, str) else names


def _dtypes(implementation):
    return DTYPES if implementation in LEVELS else [*DTYPES, "float16"]


@pytest.fixture(params=LEVELS or ["none"])
def level(request):
    """Runs a test once on each instruction-set level that this machine has."""
    if not LEVELS:
        pytest.skip(extension.MISSING)
    with _level(request.param):
        yield request.param


@contextlib.contextmanager
def _level(name):
    extension.use_level(name)
    try:
        yield
    finally:
        extension.use_level(extension.LEVEL)


@pytest.fixture
def implementation(request):
    """What answers every op within the test: a level of the C++ kernels, or the Triton kernels."""
    with contextlib.ExitStack() as stack:
        if request.param in LEVELS:
            stack.enter_context(_level(request.param))
            stack.enter_context(ops.backend("cpp"))
        elif request.param == "triton":
            from executors import Interpreter, running
            stack.enter_context(running(Interpreter()))
        else:
            stack.enter_context(torch.device("cuda"))
            stack.enter_context(ops.backend("triton"))
        yield request.param


@pytest.fixture
def dtype(request):
    return getattr(torch, request.param)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """torch.empty gives NaN, so that an element which a kernel forgets to write is seen."""
    with torch.device("meta"):
        torch.empty(0)  # torch remembers which functions a device context redirects: the true ones, not ours
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(make):
    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(float("nan")) if type(tensor) is torch.Tensor and tensor.is_floating_point() else tensor
    return poisoned


@pytest.fixture(scope="module")
def one_thread():
    """For tests whose matrices are so small that they only suffer from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


GPU = pytest.param("gpu", marks=pytest.mark.gpu, id="gpu")


@pytest.fixture(params=[pytest.param({}, id="simulated"), GPU])
def cuda(request):
    """The CUDA kernels answer every op: for tensors on the CPU, where their sources run thread by thread, by a Shim of these
    options; or on a GPU, where new tensors then are."""
    import cuda_shim
    if cuda_shim.missing():
        pytest.skip(cuda_shim.missing())
    from cuda_executors import Shim, on_gpu, running_cuda
    with on_gpu() if request.param == "gpu" else running_cuda(Shim(**request.param)) as executor:
        yield executor
