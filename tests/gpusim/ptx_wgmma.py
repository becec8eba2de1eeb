"""wgmma: matrix products of four warps, with operands in shared memory, that run on while the threads do.

The product is computed when it is issued. What the hardware leaves open until its group is waited for is refused: any
use of its accumulators but by a further wgmma, new values in the registers of A, and stores into the shared memory that
it reads. wgmma.fence and fence.proxy.async are not checked. Sums in half precision are not modelled: Triton unpacks
those before it waits, and leaves it to the assembler to mend that.
"""
import itertools
import math
import re
from typing import NamedTuple

import numpy as np
from ptx_matrix import ELEMENT_BYTES, WORD, Accumulators, elements, fragment_a
from ptx_operands import ADDRESS, PREDICATE, WARP
from ptx_parser import PtxError, vector

WARPGROUP = 4 * WARP
ROWS = 64
FIRST_READER = 1 << 16
SWIZZLE_SPAN = np.array([16, 128, 64, 32])
SWIZZLE_MASK = np.array([0, 7, 3, 1])
NO_RESULT = ("st", "red", "stmatrix", "bra", "bar", "barrier", "cp")


class Product(NamedTuple):
    """What an unfinished wgmma still uses: names of registers, and granules of shared memory."""
    accumulators: frozenset
    fragments: frozenset
    granules: list

    @property
    def registers(self):
        return self.accumulators | self.fragments


class Unfinished:
    """The products of each warpgroup that have not been waited for. registers: what they all use."""

    def __init__(self, shared, warpgroups):
        self.shared, self.warpgroups = shared, warpgroups
        self.reset()

    def reset(self):
        self.open = [[] for _ in range(self.warpgroups)]
        self.groups = [[] for _ in range(self.warpgroups)]
        self.registers = frozenset()

    def add(self, warpgroup, product):
        self.open[warpgroup].append(product)
        if not product.registers <= self.registers:
            self.registers |= product.registers
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
        self.registers = frozenset().union(*{product.registers for products in self._of_all() for product in products})

    def _of_all(self):
        return itertools.chain(self.open, *self.groups)

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
        if not unfinished.registers.isdisjoint(used):
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
        if math.prod(machine.registers.shape) % WARPGROUP:
            raise PtxError("wgmma in a block that is no whole number of warpgroups")
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
        groups = _warpgroups(active)
        if not groups.size:
            return
        first = groups * WARPGROUP
        self.machine.unfinished.check(active, self.registers[1], frozenset())
        tiles = [self._tiles(self.b()[first], self.columns, self.b_transposed, groups)]
        if self.a_in_registers:
            a = fragment_a(self.a, self.name, self.machine.threads).reshape(-1, ROWS, self.depth)[groups]
        else:
            tiles.append(self._tiles(self.a()[first], ROWS, self.a_transposed, groups))
            a = tiles[1][0]
        before, keeps = self.read_d().reshape(-1, ROWS, self.columns), self.keeps_d()[first]
        result = np.zeros_like(before)
        kept = np.where(keeps[:, None, None], before[groups], 0)
        result[groups] = self.sign * (a @ tiles[0][0].transpose(0, 2, 1)) + kept
        self.write_d(result, active)
        for number, group in enumerate(groups):
            self.machine.unfinished.add(group, Product(*self.registers, [granules[number] for _, granules in tiles]))

    def _tiles(self, descriptors, rows, rows_contiguous, groups):
        """The rows x depth matrix behind each group's descriptor, and the granules that it lies in."""
        shared, size = self.machine.shared, ELEMENT_BYTES[self.name]
        addresses = _tile_addresses(descriptors, rows, self.depth, size, rows_contiguous).reshape(-1)
        readers = np.repeat(groups, rows * self.depth)
        index = shared.index(addresses, size, readers * (WARPGROUP // WARP), "wgmma")
        words = shared.read(index, FIRST_READER + readers, "wgmma").reshape(len(groups), rows, -1).view(np.uint32)
        return elements(words, self.name), shared.granules(index).reshape(len(groups), rows * self.depth, -1)


def _tile_addresses(descriptors, rows, depth, size, rows_contiguous):
    """Where each element of tiles lies. A descriptor: start, leading and stride offset in 16 bytes; the swizzle."""
    descriptors = descriptors.astype(np.int64)[:, None, None]
    start, leading, stride = ((descriptors >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = descriptors >> 62 & 3
    span = SWIZZLE_SPAN[swizzle]
    row, column = np.arange(rows)[:, None], np.arange(depth)[None, :]
    across, along = (column, row) if rows_contiguous else (row, column)
    per_span = span // size
    addresses = start + (across % 8) * span + (across // 8) * stride + (along % per_span) * size
    addresses = addresses + (along // per_span) * leading
    return (addresses ^ ((addresses >> 7 & SWIZZLE_MASK[swizzle]) << 4)).astype(np.uint64)


BUILDERS = {"wgmma": build}
