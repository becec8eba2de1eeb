"""What glibc's malloc, from which PyTorch's tensors on the CPU come, does with memory that is freed."""
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory():
    """Lets the process keep what it frees, for its next tensors, rather than hand it back to the system.

    Otherwise every large result is made of new pages, 0.25 to 2 us for each 4 KB, in every step again. It applies to the
    whole process and for good; without glibc it does nothing.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
