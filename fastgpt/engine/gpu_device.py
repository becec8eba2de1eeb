"""What only a GPU can show: streams, pinned memory, events, graphs. Everything else of the runner also runs on CPU tensors."""
import contextlib
import threading

import torch

from fastgpt.cuda.launch import upload

_capturing = threading.Lock()  # one graph at a time in a process


class CudaDevice:
    """torch: the torch.device."""

    def __init__(self, name):
        if not torch.cuda.is_available():
            raise RuntimeError(f"device {name!r} was asked for, but PyTorch finds no CUDA device; `fastgpt info` says more")
        self.torch = torch.device(name if ":" in name else f"{name}:{torch.cuda.current_device()}")
        if self.torch.index >= torch.cuda.device_count():
            raise RuntimeError(f"device {name!r} was asked for, but PyTorch finds {torch.cuda.device_count()} CUDA devices")
        self._stream = torch.cuda.Stream(self.torch)  # its own: threads may have different ones

    @contextlib.contextmanager
    def turn(self):
        """Within this context the work is the engine's, behind what the caller has queued."""
        with torch.cuda.device(self.torch):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                yield

    @staticmethod
    def new_pool():
        """Memory that the graphs of one runner share: they never run at once."""
        return torch.cuda.graph_pool_handle()

    def upload(self, array, to=None):
        """A numpy array on the device, in the tensor `to` if that is given, behind the work that is under way."""
        return upload(array, self.torch, to)

    def download(self, tensor):
        """Starts a copy to the CPU: -> a function that waits for it and gives the array."""
        with torch.cuda.device(self.torch):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()

        def wait():
            arrived.synchronize()
            return host.numpy()
        return wait

    def capture(self, forward, pool):
        """A CUDA graph of a call: -> (its result, which each replay overwrites, a function that replays it)."""
        with _capturing, torch.cuda.device(self.torch):
            forward()  # libraries and compilers take their memory now, not in the graph
            graph = torch.cuda.CUDAGraph()
            # On this device's own stream: PyTorch's default one belongs to the device that captured first. Other threads
            # may go on allocating.
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                result = forward()
        return result, graph.replay

    def free_memory(self):
        """Bytes."""
        torch.cuda.empty_cache()  # what PyTorch keeps of earlier tensors counts as used
        return torch.cuda.mem_get_info(self.torch)[0]
