"""Sums and products of float32 that PTX rounds towards zero, down or up."""
import numpy as np
from ptx_parser import Type

DIRECTIONS = ("rz", "rm", "rp")
# The operands' sum or product as two float64 whose sum it exactly is.
EXACT = {"add": lambda a, b: (a, b), "sub": lambda a, b: (a, -b), "mul": lambda a, b: (a * b, np.zeros_like(a)),
         "fma": lambda a, b, c: (a * b, c)}


def directed(instruction):
    """The function of an instruction's operands, or None where it rounds to the nearest or is not modelled."""
    direction = next((name for name in instruction.modifiers if name in DIRECTIONS), None)
    exact = EXACT.get(instruction.opcode)
    if not direction or not exact or instruction.type != Type("f", 32) or instruction.has("sat"):
        return None
    return lambda *operands: _rounded(*exact(*[operand.astype(np.float64) for operand in operands]), direction)


def _rounded(a, b, direction):
    """float32 of the exact a + b: the nearest one, or its neighbour where that lies on the wrong side."""
    total = a + b
    of_b = total - a
    lost = (a - (total - of_b)) + (b - of_b)  # a + b is exactly total + lost
    nearest = total.astype(np.float32)
    excess = nearest - total
    excess = np.where(excess == 0, -lost, excess)
    above, below = {"rm": (excess > 0, False), "rp": (False, excess < 0),
                    "rz": ((excess > 0) & (total > 0), (excess < 0) & (total < 0))}[direction]
    lower, upper = (np.nextafter(nearest, np.float32(limit)) for limit in (-np.inf, np.inf))
    return np.where(above, lower, np.where(below, upper, nearest))
