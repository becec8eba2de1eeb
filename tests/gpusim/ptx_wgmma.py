"""wgmma: matrix products of four warps, with operands in shared memory, that run on while the threads do.

The product is computed when it is issued. What the hardware leaves open until its group is waited for is refused: any
use of its accumulators but by a further wgmma, new values in the registers of A, and stores into the shared memory that
it reads. wgmma.fence and fence.proxy.async are not checked. Sums in half precision are not modelled: Triton unpacks
those before it waits, and leaves it to the assembler to mend that.
"""
import re
from typing import NamedTuple

import numpy as np
from ptx_matrix import ELEMENT_BYTES, WORD, Accumulators, elements, fragment_a
from ptx_operands import ADDRESS, PREDICATE, WARP
from ptx_parser import PtxError, vector

WARPGROUP = 4 * WARP
ROWS = 64
FIRST_READER = 1 << 16
SWIZZLE_SPAN = {0: 16, 1: 128, 2: 64, 3: 32}
SWIZZLE_MASK = {0: 0, 1: 7, 2: 3, 3: 1}
NO_RESULT = ("st", "red", "stmatrix", "bra", "bar", "barrier", "cp")


class Product(NamedTuple):
    """What an unfinished wgmma still uses: names of registers, and granules of shared memory."""
    accumulators: frozenset
    fragments: frozenset
    granules: list


class Unfinished:
    """The products of each warpgroup that have not been waited for."""

    def __init__(self, shared, warpgroups):
        self.shared, self.warpgroups = shared, warpgroups
        self.reset()

    def reset(self):
        self.open = [[] for _ in range(self.warpgroups)]
        self.groups = [[] for _ in range(self.warpgroups)]
        self.any = False

    def add(self, warpgroup, product):
        self.open[warpgroup].append(product)
        self.any = True
        for granules in product.granules:
            self.shared.pin(granules)

    def commit(self, active):
        for warpgroup in _warpgroups(active):
            self.groups[warpgroup].append(self.open[warpgroup])
            self.open[warpgroup] = []

    def wait(self, active, pending):
        for warpgroup in _warpgroups(active):
            while len(self.groups[warpgroup]) > pending:
                for product in self.groups[warpgroup].pop(0):
                    for granules in product.granules:
                        self.shared.unpin(granules)
        self.any = any(self.open) or any(map(any, self.groups))

    def check(self, active, used, written):
        """Raises when an instruction that is no wgmma uses registers which products of its threads own."""
        for warpgroup in np.flatnonzero(active.reshape(self.warpgroups, -1).any(1)):
            for product in (p for group in (*self.groups[warpgroup], self.open[warpgroup]) for p in group):
                taken = used & product.accumulators or written & product.fragments
                if taken:
                    raise PtxError(f"register {min(taken)} of a wgmma is used before its wait_group")


def guarded(unfinished, instruction, registers, action):
    """The action of an instruction that is no wgmma, preceded by the check of the registers that it uses."""
    used, written = _used_registers(instruction, registers)

    def checked(flow, mask, active):
        if unfinished.any:
            unfinished.check(active, used, written)
        action(flow, mask, active)
    return checked


def _used_registers(instruction, registers):
    """(all, written): the names of the registers in an instruction, and of those that it writes."""
    names = re.findall(r"%[\w$@]+", " ".join(instruction.operands))
    written = [] if instruction.opcode in NO_RESULT or not names else re.findall(r"%[\w$@]+", instruction.operands[0])
    used = {name for name in names + [instruction.predicate] if name in registers}
    return used, used.intersection(written)


def build(machine, instruction):
    if instruction.has("fence"):
        return None
    if instruction.has("commit_group"):
        return machine.unfinished.commit
    if instruction.has("wait_group"):
        pending = int(instruction.operands[0])
        return lambda active: machine.unfinished.wait(active, pending)
    return _Multiply(machine, instruction)


def _warpgroups(active):
    groups = active.reshape(-1, WARPGROUP)
    if (groups.any(1) != groups.all(1)).any():
        raise PtxError("wgmma with missing lanes")
    return np.flatnonzero(groups.all(1))


class _Multiply:
    """wgmma.mma_async d, a, b, scale-d, imm-scale-a, imm-scale-b; of 16 bits imm-trans-a (if no registers), -b."""

    def __init__(self, machine, instruction):
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", instruction.modifiers[3])
        result, self.name, second = instruction.modifiers[-3:]
        if not shape or result != "f32" or second != self.name or ELEMENT_BYTES.get(self.name) != 32 // int(shape[2]):
            raise PtxError(f"wgmma form not modelled: {instruction.text}")
        self.machine, self.columns, self.depth = machine, int(shape[1]), int(shape[2])
        d, a, b, scale_d, *immediates = instruction.operands
        registers = machine.registers
        accumulators = Accumulators(registers, vector(d), result)
        self.read_d, self.write_d = accumulators.reader(), accumulators.writer()
        self.keeps_d = registers.source(scale_d, PREDICATE)
        self._read_operands(registers, a, b, [int(immediate) for immediate in immediates])
        fragments = frozenset(vector(a)) if self.a_in_registers else frozenset()
        self.registers = frozenset(vector(d)), fragments

    def _read_operands(self, registers, a, b, immediates):
        self.a_in_registers = a.startswith("{")
        self.a = registers.sources(vector(a), WORD) if self.a_in_registers else registers.source(a, ADDRESS)
        self.b = registers.source(b, ADDRESS)
        self.sign = immediates[0] * immediates[1]
        transposes = immediates[2:] or [0, 0]
        self.b_transposed = bool(transposes[-1])
        self.a_transposed = bool(transposes[0]) and not self.a_in_registers

    def __call__(self, active):
        warpgroups = _warpgroups(active)
        if not warpgroups.size:
            return
        self.machine.unfinished.check(active, self.registers[1], frozenset())
        before, keeps = self.read_d(), self.keeps_d()
        result = np.zeros_like(before)
        left = fragment_a(self.a, self.name, self.machine.threads) if self.a_in_registers else None
        for group in warpgroups:
            first = group * WARPGROUP
            granules = []
            a = left[4 * group:4 * group + 4].reshape(ROWS, -1) if self.a_in_registers else (
                self._tile(self.a()[first], ROWS, self.a_transposed, group, granules))
            b = self._tile(self.b()[first], self.columns, self.b_transposed, group, granules)
            product = (self.sign * (a @ b.T)).reshape(4, 16, self.columns)
            kept = before[4 * group:4 * group + 4] if keeps[first] else 0
            result[4 * group:4 * group + 4] = product + kept
            self.machine.unfinished.add(group, Product(*self.registers, granules))
        self.write_d(result, active)

    def _tile(self, descriptor, rows, rows_contiguous, group, granules):
        """The rows x depth matrix behind a descriptor; the granules it lies in are added to the list."""
        shared, size = self.machine.shared, ELEMENT_BYTES[self.name]
        addresses = _tile_addresses(int(descriptor), rows, self.depth, size, rows_contiguous)
        index = shared.index(addresses.ravel().astype(np.uint64), size, "wgmma")
        data = shared.read(index, np.full(index.shape[0], FIRST_READER + group), "wgmma")
        granules.append(shared.granules(index).ravel())
        words = data.reshape(rows, -1).view(np.uint32)
        return elements(words, self.name)


def _tile_addresses(descriptor, rows, depth, size, rows_contiguous):
    """Where each element of a tile lies. The descriptor: start, leading and stride offset in 16 bytes; the swizzle."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = descriptor >> 62
    span = SWIZZLE_SPAN[swizzle]
    row, column = np.arange(rows)[:, None], np.arange(depth)[None, :]
    across, along = (column, row) if rows_contiguous else (row, column)
    per_span = span // size
    addresses = start + (across % 8) * span + (across // 8) * stride + (along % per_span) * size
    addresses = addresses + (along // per_span) * leading
    return addresses ^ ((addresses >> 7 & SWIZZLE_MASK[swizzle]) << 4)


BUILDERS = {"wgmma": build}
