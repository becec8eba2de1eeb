"""Fixtures: every level of the CPU kernels, both dtypes, and outputs that hold NaN until a kernel writes them."""
import pytest
import torch

from fastgpt import extension

LEVELS = [name for name in extension.LEVELS if extension._C and extension.level_refusal(name) is None]


@pytest.fixture(params=LEVELS or ["none"])
def level(request):
    """Runs a test once on each instruction-set level that this machine has."""
    if not LEVELS:
        pytest.skip(extension.MISSING)
    extension.use_level(request.param)
    yield request.param
    extension.use_level(extension.LEVEL)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


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
