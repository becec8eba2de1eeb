"""Launches of the CUDA kernels under a sanitizer, in every order. Run by cuda_sanitizers.py with the path of the sanitizer's
module and that of the launches; imports no torch, whose own threads a sanitizer would complain of."""
import pickle
import sys

import numpy as np
from cuda_module import Pointer, load

ORDERS = [(random, early) for random in (False, True) for early in (False, True)]


def own_memory(contents, remainder):
    """The bytes in a block of memory that ends with them, so that nothing lies behind."""
    memory = np.empty(len(contents) + remainder, np.uint8)[remainder:]
    memory[:] = np.frombuffer(contents, np.uint8)
    return memory


def resolved(argument, buffers):
    if isinstance(argument, tuple):
        return tuple(resolved(part, buffers) for part in argument)
    if isinstance(argument, Pointer):
        return buffers[argument.buffer].ctypes.data
    return argument


def main(path, calls):
    module = load(path)
    with open(calls, "rb") as file:
        calls = pickle.load(file)
    for call in calls:
        for random, early in ORDERS:
            order, copies = "random" if random else "first to last", "early" if early else "late"
            print(f"{call.name}, {order}, copies {copies}", flush=True)
            module.set_order(random, 1)
            module.set_copies_early(early)
            buffers = [own_memory(*buffer) for buffer in call.buffers]
            getattr(module, call.name)(*resolved(call.arguments, buffers))
    print("clean")


if __name__ == "__main__":
    main(*sys.argv[1:])
