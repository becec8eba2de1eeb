"""What the launchers of every device do with tensors."""
MAX_HEAD_SIZE = 256  # of the attention kernels


def dense(*tensors):
    """Contiguous tensors of the same values; None stays None."""
    return tuple(t if t is None else t.contiguous() for t in tensors)


def rows_of(x):
    """(rows, columns) of a contiguous tensor seen as a matrix over its last dimension."""
    columns = x.shape[-1]
    return x.numel() // columns if columns else 0, columns
