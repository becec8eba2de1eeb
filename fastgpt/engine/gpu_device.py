"""What only a GPU can show: streams, pinned memory, events, graphs. Everything else of the runner also runs on CPU tensors."""
import threading

import torch

_capturing = threading.Lock()  # one graph at a time in a process


class CudaDevice:
    def __init__(self, name):
        if not torch.cuda.is_available():
            raise RuntimeError(f"device {name!r} was asked for, but PyTorch finds no CUDA device; `fastgpt info` says more")
        self.torch = torch.device(name if ":" in name else f"{name}:{torch.cuda.current_device()}")
        if self.torch.index >= torch.cuda.device_count():
            raise RuntimeError(f"device {name!r} was asked for, but PyTorch finds {torch.cuda.device_count()} CUDA devices")
        self._pool = None  # memory that all graphs share: they never run at once

    def upload(self, array):
        """A numpy array on the device, behind the work that is under way."""
        return torch.from_numpy(array).pin_memory().to(self.torch, non_blocking=True)

    def download(self, tensor):
        """Starts a copy to the CPU: -> a function that waits for it and gives the list of the numbers."""
        with torch.cuda.device(self.torch):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()

        def wait():
            arrived.synchronize()
            return host.tolist()
        return wait

    def capture(self, forward):
        """A CUDA graph of a call: -> (its result, which each replay overwrites, a function that replays it)."""
        with _capturing, torch.cuda.device(self.torch):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries and compilers take their memory now, not in the graph
                forward()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # others may go on allocating
                result = forward()
        return result, graph.replay

    def free_memory(self):
        """Bytes."""
        return torch.cuda.mem_get_info(self.torch)[0]
