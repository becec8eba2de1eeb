"""The share of the machine's limit that a kernel should reach: of its tensor cores or of its device memory."""
QUARTERS = 4
# Published figures of A100 80 GB SXM and H100 80 GB SXM: bytes of device memory and clocks a second, multiprocessors.
# H100's clock is the lower of its two, the one for tensor work (the other is 1.98 GHz): it asks for more bytes a clock.
MACHINES = {80: (2039e9, 1.41e9, 108), 90: (3350e9, 1.83e9, 132)}


def memory_bytes_per_clock(arch):
    """What device memory delivers in a clock to a quarter of a multiprocessor.

    sm_80: 2039 / (1.41 * 108 * 4) = 3.35; sm_90: 3350 / (1.83 * 132 * 4) = 3.47.
    """
    bytes_a_second, clock, processors = MACHINES[arch]
    return bytes_a_second / (clock * processors * QUARTERS)


def predicted_efficiency(description, arch, useful_bytes=0, moved_bytes=0):
    """Of a kernel with tensor work: its share of the half-precision peak by the issue model (None if it has none).

    Of another, given the bytes that a program must move and those that it does: the share of device memory's rate at
    which it moves useful bytes, if its busiest pipe and memory were all that it waits for. description: `describe`'s.

    What it cannot tell: what the L2 cache saves (a row read again counts in full) or loses; the latency of memory, of
    barriers and of sums across warps, where too few bytes are in flight; lanes that a mask turns off, which
    bytes_per_clock counts as if they moved; launches; the last, partly empty wave of programs.
    """
    if description["tensor"] or not useful_bytes:
        return description["efficiency"]
    return min(1.0, description["bytes_per_clock"] / memory_bytes_per_clock(arch)) * useful_bytes / moved_bytes
