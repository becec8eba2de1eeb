"""An in-order issue model of a quarter of a multiprocessor, driven by the control words in the machine code."""
import collections
import dataclasses
import re

WARPGROUP_PRODUCTS = ("HGMMA", "QGMMA", "IGMMA")
LATENCY = {"smem": 30, "mufu": 22, "shfl": 24, "gmem": 500, "local": 40, "cvt": 14, "tma": 700, "alu": 12, "fma": 12,
           "uni": 12, "sync": 14, "mma": 34, "ctl": 6, "tmem": 40}
OTHER_LATENCY, BARRIER_LATENCY, OPERAND_LATENCY = 10, 20, 20
SCOREBOARDS, NO_SCOREBOARD = 6, 7
QUARTERS = 4
GROUPS_KEPT = 8
PASSES = 15


@dataclasses.dataclass(slots=True)
class Operation:
    """An instruction of the loop as the model sees it. pipe: the one it occupies for so many cycles, or None."""
    kind: str
    base: str
    pipe: str | None
    cycles: float
    enabled: bool
    ends_group: bool
    copies_allowed: int | None
    products_allowed: int | None
    stall: int
    sets_when_done: int
    sets_when_read: int
    waits: list


def operation(instruction, kind, pipe, cycles):
    control, operands = instruction.control, instruction.operands
    copies = instruction.base == "DEPBAR" and "SB0" in operands
    products = instruction.base == "WARPGROUP" and "DEPBAR" in instruction.opcode
    return Operation(
        kind, instruction.base, pipe, cycles, enabled=instruction.predicate != "@!PT",
        ends_group="gsb0" in operands, copies_allowed=_allowed("SB0", operands) if copies else None,
        products_allowed=_allowed("gsb0", operands) if products else None, stall=max(control & 15, 1),
        sets_when_done=control >> 5 & 7, sets_when_read=control >> 8 & 7,
        waits=[board for board in range(SCOREBOARDS) if control >> 11 >> board & 1])


def _allowed(counter, operands):
    """How many groups may be unfinished after a wait on a counter."""
    found = re.search(counter + r", (0x[0-9a-f]+)", operands)
    return int(found[1], 16) if found else 0


class _Warp:
    """Where a warp is, and the times at which what it has started will be done."""

    def __init__(self, number, block):
        self.number, self.block = number, block
        self.position, self.next_time, self.last_issue, self.at_barrier = 0, 0.0, -1.0, False
        self.scoreboards = [0.0] * SCOREBOARDS
        self.copies, self.copy_groups, self.products, self.product_groups = [], [], [], []
        self.passes = []


class IssueModel:
    """Warps of the resident blocks that go round and round one loop, each cycle one instruction of one of them."""

    def __init__(self, operations, warps_per_block, blocks):
        self.operations = operations
        quarter = max(1, warps_per_block // QUARTERS)
        self.warps = [_Warp(i, i // quarter) for i in range(quarter * max(1, blocks))]
        self.pipes, self.port = collections.Counter(), 0.0

    def cycles_per_pass(self):
        """Predicted cycles for one pass by all warps, or None if they come to a standstill."""
        while any(len(warp.passes) < PASSES for warp in self.warps):
            ready = [(self._earliest(warp), warp.last_issue, warp.number) for warp in self.warps if not warp.at_barrier]
            if not ready:
                return None
            time, _, number = min(ready)
            self._issue(self.warps[number], time)
        return self._steady_state()

    def _steady_state(self):
        """Without the first third of the passes. The faster warps go on looping meanwhile, and that counts."""
        start = max(warp.passes[PASSES // 3 - 1] for warp in self.warps)
        end = max(warp.passes[PASSES - 1] for warp in self.warps)
        finished = sum(start < time <= end for warp in self.warps for time in warp.passes)
        return len(self.warps) * (end - start) / finished

    def _earliest(self, warp):
        """When the warp's next instruction could be issued."""
        op = self.operations[warp.position]
        time = max(warp.next_time, self.port)
        for board in op.waits:
            time = max(time, warp.scoreboards[board])
        for allowed, groups in ((op.copies_allowed, warp.copy_groups), (op.products_allowed, warp.product_groups)):
            if allowed is not None:
                time = max([time, *groups[:len(groups) - allowed]])
        if op.enabled and op.pipe and op.base not in WARPGROUP_PRODUCTS:
            time = max(time, self.pipes[op.pipe])
        return time

    def _issue(self, warp, time):
        op = self.operations[warp.position]
        warp.last_issue, self.port = time, time + 1
        latency = LATENCY.get(op.kind, OTHER_LATENCY)
        done = self._occupy(warp, op, time, latency) if op.enabled else time + latency
        self._set(warp, op.sets_when_done, done)
        self._set(warp, op.sets_when_read, time + min(latency, OPERAND_LATENCY))
        warp.next_time = time + op.stall
        if op.base == "BAR":
            self._arrive(warp, time)
        warp.position += 1
        if warp.position == len(self.operations):
            warp.position = 0
            warp.passes.append(time)

    def _occupy(self, warp, op, time, latency):
        """Takes the pipe; returns when the result is there."""
        done = time + latency
        if op.base in WARPGROUP_PRODUCTS:
            self._issue_product(warp, op, time, latency)
        elif op.pipe:
            self.pipes[op.pipe] = time + op.cycles
            done += op.cycles
        if op.base == "LDGSTS":
            warp.copies.append(done)
        if op.base == "LDGDEPBAR":
            warp.copy_groups = [*warp.copy_groups, max(warp.copies, default=time)][-GROUPS_KEPT:]
            warp.copies = []
        return done

    def _issue_product(self, warp, op, time, latency):
        """Products queue up for the tensor cores without holding the warp."""
        self.pipes["tensor"] = max(time, self.pipes["tensor"]) + op.cycles
        warp.products.append(self.pipes["tensor"] + latency)
        if op.ends_group:
            warp.product_groups = [*warp.product_groups, max(warp.products)][-GROUPS_KEPT:]
            warp.products = []

    @staticmethod
    def _set(warp, board, time):
        if board != NO_SCOREBOARD:
            warp.scoreboards[board] = max(warp.scoreboards[board], time)

    def _arrive(self, warp, time):
        warp.at_barrier = True
        mates = [other for other in self.warps if other.block == warp.block]
        if all(mate.at_barrier for mate in mates):
            for mate in mates:
                mate.at_barrier = False
                mate.next_time = max(mate.next_time, time + BARRIER_LATENCY)
