"""Executes PTX on the CPU: an independent check of what a compiler made (Triton's or nvcc's, for sm_80 and sm_90a).

    Kernel(ptx_text).launch(grid, threads, [tensor | int | float | bytes, ...], shared=bytes)

The threads run in numpy lock step, the lowest program counter first, those of many blocks together.
PtxError: an address outside every tensor argument or misaligned, shared memory that two warps touch without a barrier
between, a load of what another block has stored, lanes missing from a shuffle or a matrix product, a barrier that not all
threads reach together, an unwaited wgmma, any opcode that is not modelled (TMA, mbarrier, tcgen05, calls). cp.async data
lands at its wait. Approximate functions are exact here, and the order of memory operations is not modelled.
"""
import itertools
import math
import struct
from typing import NamedTuple

import numpy as np
import ptx_access
import ptx_convert
import ptx_matrix
import ptx_scalar
import ptx_warp
import ptx_wgmma
import torch
from ptx_flow import ControlFlow
from ptx_memory import AsynchronousCopies, GlobalMemory, Parameters, SharedMemory
from ptx_operands import PREDICATE, WARP, Registers
from ptx_parser import PtxError, parse

__all__ = ["Kernel", "PtxError"]
OF_REGISTERS = ptx_scalar.BUILDERS | ptx_convert.BUILDERS | ptx_warp.BUILDERS
OF_MACHINE = ptx_access.BUILDERS | ptx_matrix.BUILDERS | ptx_wgmma.BUILDERS
WITHOUT_EFFECT = ("fence", "membar", "griddepcontrol", "nanosleep", "prefetch", "prefetchu", "discard")
REGISTER_BYTES = 1 << 26  # of the blocks that run together
REDUCTIONS = {"and": lambda flags, of: (flags | ~of).all(1), "or": lambda flags, of: (flags & of).any(1),
              "popc": lambda flags, of: np.count_nonzero(flags & of, axis=1)}
FLOAT_FORMATS = {16: "<e", 32: "<f", 64: "<d"}


class Kernel:
    """One entry of a PTX text, by default the first. memory: tensors that its threads may access beside the arguments."""

    def __init__(self, ptx_text, name=None, memory=()):
        self.program, self.memory = parse(ptx_text, name), list(memory)

    def launch(self, grid, threads, args, shared=0, races=True):
        """Runs every block. threads: a number, or the block's shape. args: CPU tensors and numbers, or bytes as they lie in
        a parameter; parameters past them (Triton's scratch) are 0."""
        memory = self.memory + [arg for arg in args if isinstance(arg, torch.Tensor)]
        launch = Launch(_shape(grid), _shape(threads), memory, shared, races)
        _Machine(self.program, launch, _parameters(self.program, args)).run()


def blocks_together(program, blocks, threads):
    """How many blocks of a launch run together: as many as there are, or as have few enough registers, in equal parts."""
    of_a_block = threads * sum(kind.bits // 8 for kind in program.registers.values())
    return math.ceil(max(1, blocks) / max(1, math.ceil(blocks * of_a_block / REGISTER_BYTES)))


class Launch(NamedTuple):
    """grid: blocks along x, y, z; block: its threads; memory: tensors; shared: bytes of dynamic shared memory."""
    grid: tuple
    block: tuple
    memory: list
    shared: int
    races: bool


def _shape(sizes):
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return sizes + (1,) * (3 - len(sizes))


class _Machine:
    """The state of one launch, as the builders of instructions see it."""

    def __init__(self, program, launch, parameters):
        threads = math.prod(launch.block)
        if threads % WARP:
            raise PtxError(f"{threads} threads are no whole number of warps")
        self.program, self.grid, self.parameters = program, launch.grid, Parameters(parameters)
        self.blocks = blocks_together(program, math.prod(launch.grid), threads)
        self.threads = self.blocks * threads
        self.warps = np.arange(self.threads) // WARP
        self.places = np.zeros(self.threads, np.int32)  # the number of each thread's block in the grid
        self.tables = {name: torch.tensor(list(table), dtype=torch.uint8) for name, table in program.tables.items()}
        self.global_memory = GlobalMemory([*launch.memory, *self.tables.values()])
        size = max(program.dynamic_offset + launch.shared, program.static_shared)
        self.shared = SharedMemory(size, self.blocks, threads // WARP, launch.races, fine=_accesses_single_bytes(program))
        self.copies = AsynchronousCopies(self.shared, self.threads // WARP)
        self.unfinished = ptx_wgmma.Unfinished(self.shared, self.blocks * max(1, threads // ptx_wgmma.WARPGROUP))
        tables = {name: table.data_ptr() for name, table in self.tables.items()}
        symbols = program.shared | self.parameters.addresses | tables
        self.registers = Registers(program, launch.block, launch.grid, self.blocks, symbols)
        self.steps = [self._step(instruction) for instruction in program.instructions]
        self.steps.append(_Step(None, ControlFlow.exit))

    def run(self):
        places = [place[::-1] for place in itertools.product(*map(range, reversed(self.grid)))]
        with np.errstate(all="ignore"):
            for first in range(0, len(places), self.blocks):
                self.places[:] = first + np.arange(self.threads) // (self.threads // self.blocks)
                self._run_blocks(places[first:first + self.blocks])

    def _run_blocks(self, places):
        """Runs the blocks at these places of the grid together; the threads of blocks that are too many are gone."""
        for part in (self.shared, self.copies, self.unfinished):
            part.reset()
        idle = self.blocks - len(places)
        self.registers.reset(places + places[-1:] * idle)
        alive = self.registers.everyone
        if idle:
            alive = np.repeat(np.arange(self.blocks) < len(places), self.threads // self.blocks)
        flow = ControlFlow(alive, self.blocks, self.shared.next_epoch)
        counter = 0
        try:
            while place := flow.current():
                counter, mask = place
                self.steps[counter].execute(flow, mask)
        except PtxError as error:
            text = self.program.instructions[counter].text
            which = f"block {places[0]}" if len(places) == 1 else f"blocks {places[0]} to {places[-1]}"
            raise PtxError(f"{error}; {which}, instruction {counter}: {text[:120]}") from None

    def _step(self, instruction):
        guard = None
        if instruction.predicate:
            guard = self.registers.source(("!" if instruction.negated else "") + instruction.predicate, PREDICATE)
        action = self._action(instruction)
        if instruction.opcode != "wgmma":
            action = ptx_wgmma.guarded(self.unfinished, instruction, self.registers.types, action)
        return _Step(guard, action)

    def _action(self, instruction):
        """What an instruction does: a function of the flow, the threads that are at it, and those that execute it."""
        opcode = instruction.opcode
        if opcode == "bra":
            target = self.program.labels[instruction.operands[0]]
            return lambda flow, mask, active: flow.branch(mask, active, target)
        if opcode in ("ret", "exit"):
            return ControlFlow.exit
        if opcode in ("bar", "barrier") and not instruction.has("warp"):
            return _barrier(self.registers, instruction)
        return _then_advance(self._effect(opcode, instruction))

    def _effect(self, opcode, instruction):
        """A function of the active threads, or None for an instruction without an effect."""
        if opcode == "trap":
            return _trap
        if opcode in WITHOUT_EFFECT or instruction.modifiers == ("warp", "sync"):
            return None
        if opcode in OF_REGISTERS:
            return OF_REGISTERS[opcode](self.registers, instruction)
        if opcode in OF_MACHINE:
            return OF_MACHINE[opcode](self, instruction)
        raise PtxError(f"opcode not modelled: {instruction.text}")


class _Step:
    """An instruction made executable. guard: a function giving its predicate, or None."""

    def __init__(self, guard, action):
        self.guard, self.action = guard, action

    def execute(self, flow, mask):
        self.action(flow, mask, mask if self.guard is None else mask & self.guard())


def _then_advance(effect):
    if effect is None:
        return lambda flow, mask, active: flow.advance(mask)

    def action(flow, mask, active):
        effect(active)
        flow.advance(mask)
    return action


def _barrier(registers, instruction):
    """bar.sync of the whole block, and bar.red, which also combines a predicate of all its threads."""
    counts = instruction.operands[2:-1] if instruction.has("red") else instruction.operands[1:]
    if (not instruction.has("sync", "red") or instruction.has("cluster")
            or counts and not (counts[0].isdigit() and int(counts[0]) == math.prod(registers.shape))):
        raise PtxError(f"barrier not modelled: {instruction.text}")
    if instruction.has("sync"):
        return ControlFlow.barrier
    combine = REDUCTIONS[instruction.modifiers[-2]]
    kind = instruction.type
    write, flag = registers.writer(instruction.operands[0], kind), registers.source(instruction.operands[-1], PREDICATE)

    def finish(released):
        by_block = combine(*(flags.reshape(registers.blocks, -1) for flags in (flag(), released)))
        write(np.repeat(by_block, registers.threads // registers.blocks).astype(kind.dtype), released)
    return lambda flow, mask, active: flow.barrier(mask, active, finish)


def _trap(active):
    if active.any():
        raise PtxError("trap")


def _accesses_single_bytes(program):
    return any(instruction.opcode in ("ld", "st") and instruction.type.bits == 8 and instruction.has("shared")
               for instruction in program.instructions)


def _parameters(program, args):
    """Parameter -> its bytes."""
    if len(args) > len(program.parameters):
        raise PtxError(f"{len(args)} arguments for {len(program.parameters)} parameters")
    values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
    values += [0] * (len(program.parameters) - len(values))
    return {name: _parameter_bytes(kind, value) for (name, kind), value in zip(program.parameters.items(), values)}


def _parameter_bytes(kind, value):
    if isinstance(value, bytes):
        if len(value) != kind.bits // 8:
            raise PtxError(f"an argument of {len(value)} bytes for a parameter of {kind.bits // 8}")
        return value
    if kind.kind == "f":
        return struct.pack(FLOAT_FORMATS[kind.bits], value)
    return (int(value) & (2 ** kind.bits - 1)).to_bytes(kind.bits // 8, "little")
