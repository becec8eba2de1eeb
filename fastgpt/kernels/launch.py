"""The one place where a Triton kernel is started: tests put an interpreter or a simulator of machine code there."""
import functools

import torch

ARCHITECTURES = (80, 86, 90, 100, 120)  # that tuning.py knows


class OnDevice:
    """Starts kernels on the GPU that holds their tensors, and knows what tuning.py asks about it."""

    @staticmethod
    def run(kernel, programs, arguments, constants, options):
        """arguments: tensors, numbers and None by position; constants: constexprs; options: num_warps, num_stages."""
        device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants, **options)

    @staticmethod
    @functools.lru_cache
    def architecture(device):
        """The compute capability as tuning.py has it: the newest that is not newer than the device's (8.9: 86)."""
        major, minor = torch.cuda.get_device_capability(device)
        return max(known for known in ARCHITECTURES if known <= major * 10 + minor)

    @staticmethod
    @functools.lru_cache
    def processors(device):
        """How many streaming multiprocessors the device has."""
        return torch.cuda.get_device_properties(device).multi_processor_count


executor = OnDevice


def launch(kernel, programs, arguments, constants, *, num_warps, num_stages=1):
    """Starts `programs` (a number) instances of a @triton.jit function; none when there is nothing to compute."""
    if programs:
        executor.run(kernel, programs, arguments, constants, {"num_warps": num_warps, "num_stages": num_stages})


def architecture(device):
    return executor.architecture(device)


def processors(device):
    return executor.processors(device)


def words(seed):
    """A seed below 2**63 as two signed 32-bit words, low and high: an int, a tensor () or None."""
    seed = 0 if seed is None else int(seed)
    return [(word ^ 0x80000000) - 0x80000000 for word in (seed & 0xFFFFFFFF, seed >> 32)]
