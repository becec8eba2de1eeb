"""The same number of threads for PyTorch's ops and for ours."""
import contextlib

import torch

from fastgpt import extension


def thread_counts():
    """What is measured by default: one thread, and all that may be used."""
    return sorted({1, extension.usable_cpus()[0]})


@contextlib.contextmanager
def use_threads(count):
    before = torch.get_num_threads(), extension.get_num_threads()
    torch.set_num_threads(count)
    extension.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        extension.set_num_threads(before[1])
