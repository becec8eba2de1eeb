"""What glibc's malloc, from which PyTorch's tensors on the CPU come, does with memory that is freed."""
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory():
    """Lets the process keep what it frees, for its next tensors, rather than hand it back to the system.

    Otherwise every large result is made of new pages, 0.25 to 2 us for each 4 KB, in every step again. The large results
    of `fastgpt.ops` come from a pool from then on (`fastgpt.memory`). It applies to the whole process and for good; on
    other systems than Linux it does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
    from fastgpt import memory  # imports torch
    memory.start()
