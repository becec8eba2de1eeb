"""PTX instructions in which the threads of a warp take part together."""
import numpy as np
from ptx_operands import PREDICATE, WARP
from ptx_parser import PtxError, Type

WORD = Type("u", 32)
LANE_BITS = np.uint64(1) << np.arange(WARP, dtype=np.uint64)


def ballot(flags):
    """For each warp the word whose bits are its threads' flags."""
    return (flags.reshape(-1, WARP) * LANE_BITS).sum(1, dtype=np.uint64).astype(np.uint32)


def full_warps(active, what):
    """The numbers of the warps that execute an instruction; all their threads must."""
    warps = active.reshape(-1, WARP)
    if (warps.any(1) != warps.all(1)).any():
        raise PtxError(f"{what} with missing lanes")
    return np.flatnonzero(warps.all(1))


def _require_members(members, active, what):
    present = np.repeat(ballot(active), WARP)
    if (members & ~present)[active].any():
        raise PtxError(f"{what} with missing lanes")


def _shuffle(registers, instruction):
    """shfl.sync: each thread takes the value of the lane that its mode names, inside its segment of the warp."""
    mode = instruction.modifiers[1]
    destinations = instruction.operands[0].split("|")
    write_value = registers.writer(destinations[0], instruction.type)
    write_inside = registers.writer(destinations[1] if len(destinations) > 1 else "_", PREDICATE)
    value = registers.source(instruction.operands[1], instruction.type)
    amount, clamp, members = registers.sources(instruction.operands[2:], WORD)
    lane = np.arange(registers.threads) % WARP
    warp_start = np.arange(registers.threads) - lane

    def execute(active):
        _require_members(members(), active, "shfl.sync")
        source, inside = _shuffle_source(mode, lane, amount().astype(np.int64) & 31, clamp().astype(np.int64))
        write_value(value()[warp_start + np.where(inside, source, lane)], active)
        write_inside(inside, active)
    return execute


def _shuffle_source(mode, lane, amount, control):
    """(source lane, whether it is inside the segment). control: the clamp, and from bit 8 the mask of the segment."""
    segment, clamp = control >> 8 & 31, control & 31
    lowest = lane & segment
    highest = lowest | clamp & ~segment
    if mode == "up":
        return lane - amount, lane - amount >= highest
    source = {"bfly": lane ^ amount, "down": lane + amount, "idx": lowest | amount & ~segment}[mode]
    return source, source <= highest


def _vote(registers, instruction):
    mode = instruction.modifiers[1]
    write = registers.writer(instruction.operands[0], WORD if mode == "ballot" else PREDICATE)
    flag = registers.source(instruction.operands[1], PREDICATE)
    members = registers.source(instruction.operands[2], WORD)

    def execute(active):
        _require_members(members(), active, "vote.sync")
        voters, yes = ballot(active), ballot(flag() & active)
        result = {"ballot": yes, "any": yes != 0, "all": yes == voters, "uni": (yes == 0) | (yes == voters)}[mode]
        write(np.repeat(result, WARP), active)
    return execute


def _match(registers, instruction):
    """match.any: the lanes that have a thread's value; match.all: those, and whether all members have one value."""
    destinations = instruction.operands[0].split("|")
    write, write_all = registers.writer(destinations[0], WORD), registers.writer((destinations + ["_"])[1], PREDICATE)
    value = registers.source(instruction.operands[1], instruction.type)
    members = registers.source(instruction.operands[2], WORD)

    def execute(active):
        _require_members(members(), active, "match.sync")
        values, present = value().reshape(-1, WARP), active.reshape(-1, WARP)
        equal = (values[:, :, None] == values[:, None, :]) & present[:, None, :]
        found = (equal * LANE_BITS).sum(2, dtype=np.uint64).astype(np.uint32).ravel()
        everywhere = found == ballot(active).repeat(WARP)
        write(np.where(everywhere, found, 0) if instruction.has("all") else found, active)
        write_all(everywhere, active)
    return execute


def _reduce(registers, instruction):
    """redux.sync: one integer result for all members, which must be all the active threads of a warp."""
    operation = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                 "xor": np.bitwise_xor}[instruction.modifiers[1]]
    kind = instruction.type
    write = registers.writer(instruction.operands[0], kind)
    value = registers.source(instruction.operands[1], kind)
    members = registers.source(instruction.operands[2], WORD)

    def execute(active):
        _require_members(members(), active, "redux.sync")
        results = np.zeros(registers.threads, kind.dtype)
        for start in range(0, registers.threads, WARP):
            lanes = np.flatnonzero(active[start:start + WARP]) + start
            if lanes.size:
                results[lanes] = operation.reduce(value()[lanes], dtype=kind.dtype)
        write(results, active)
    return execute


def _active_mask(registers, instruction):
    write = registers.writer(instruction.operands[0], WORD)
    return lambda active: write(np.repeat(ballot(active), WARP), active)


def _elect(registers, instruction):
    """elect.sync: true in the first active thread of each warp."""
    lane, chosen = instruction.operands[0].split("|")
    write_lane, write_chosen = registers.writer(lane, WORD), registers.writer(chosen, PREDICATE)

    def execute(active):
        warps = active.reshape(-1, WARP)
        first = np.repeat(warps.argmax(1), WARP)
        write_lane(first, active)
        write_chosen(first == np.arange(registers.threads) % WARP, active)
    return execute


BUILDERS = {"shfl": _shuffle, "vote": _vote, "match": _match, "redux": _reduce, "activemask": _active_mask, "elect": _elect}
