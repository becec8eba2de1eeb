"""Kernels that answer every op through something that takes the GPU's place."""
import contextlib

from fastgpt import ops


@contextlib.contextmanager
def answering(package, backend, executor, device):
    """Within this context the kernels of `package` answer every op, for tensors of `device`, and `executor` runs them."""
    launch = package.launch
    before = launch.executor, package.missing, list(package.devices)
    launch.executor, package.missing, package.devices[:] = executor, lambda index: None, [device]
    try:
        with ops.backend(backend):
            yield executor
    finally:
        launch.executor, package.missing, package.devices[:] = before
