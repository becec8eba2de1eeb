"""What the launchers share: dtypes as the kernels number them, pointers, contiguous rows."""
import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def pointer(tensor):
    """The address of a tensor's first element; 0 stands for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(x):
    """(rows, columns) of a contiguous tensor seen as a matrix over its last dimension."""
    columns = x.shape[-1]
    return x.numel() // columns if columns else 0, columns


def dense(*tensors):
    """Contiguous tensors of the same values; None stays None."""
    return tuple(t if t is None else t.contiguous() for t in tensors)
