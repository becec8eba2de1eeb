"""PTX matrix instructions of a warp: ldmatrix, stmatrix, mma.sync; and the fragments that wgmma shares with them.

In a fragment, thread 4g+t of a warp holds of row (or, of B, column) g the elements at t. A register holds one tf32
element or two neighbouring 16-bit ones.
"""
import re

import numpy as np
from number_formats import bfloat16_to_float32, truncate_to_tf32
from ptx_operands import WARP
from ptx_parser import PtxError, Type, vector
from ptx_warp import full_warps

WORD = Type("b", 32)
ELEMENT_BYTES = {"f16": 2, "bf16": 2, "tf32": 4}


def elements(words, name):
    """float32 values of the elements in an array of 32-bit words; its last axis grows by their number per word."""
    words = np.ascontiguousarray(words)
    if name == "tf32":
        return truncate_to_tf32(words.view(np.float32))
    halves = words.view(np.uint16)
    return bfloat16_to_float32(halves) if name == "bf16" else halves.view(np.float16).astype(np.float32)


def fragment_a(read, name, threads):
    """The matrices (warps, 16, K) whose rows lie in the registers: rows g and g+8 in turn, then further columns."""
    registers = [_rows(operand(), name, threads) for operand in read]
    upper, lower = (np.concatenate(registers[half::2], axis=2) for half in (0, 1))
    return np.concatenate([upper, lower], axis=1)


def fragment_b(read, name, threads):
    """The matrices (warps, 8, K): B transposed."""
    return np.concatenate([_rows(operand(), name, threads) for operand in read], axis=2)


def _rows(words, name, threads):
    return elements(words.reshape(threads // WARP, 8, 4), name)


class Accumulators:
    """The registers of C or D, 16 rows by 8n columns a warp: of every 8 columns two neighbours in row g, two in g+8."""

    def __init__(self, registers, operands, name):
        if name not in ("f32", "f16"):
            raise PtxError(f"accumulators not modelled: {name}")
        self.is_half, self.threads = name == "f16", registers.threads
        self.kind = WORD if self.is_half else Type("f", 32)
        self.registers, self.operands = registers, operands
        self.columns = 8 * len(operands) // (2 if self.is_half else 4)

    def reader(self):
        """A function giving float32 (warps, 16, columns)."""
        read = self.registers.sources(self.operands, self.kind)

        def values():
            stacked = np.stack([operand() for operand in read], 1)
            stacked = stacked.view(np.float16).astype(np.float32) if self.is_half else stacked
            parts = stacked.reshape(-1, 8, 4, self.columns // 8, 2, 2)  # warp, g, t, group, upper or lower, neighbour
            return parts.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, self.columns)
        return values

    def writer(self):
        write = self.registers.writers(self.operands, self.kind)

        def store(values, active):
            parts = values.reshape(-1, 2, 8, self.columns // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
            stacked = parts.reshape(self.threads, -1)
            if self.is_half:
                stacked = np.ascontiguousarray(stacked.astype(np.float16)).view(np.uint32)
            for column, write_column in enumerate(write):
                write_column(stacked[:, column], active)
        return store


def _multiply(machine, instruction):
    """mma.sync: D = A B + C in float32. modifiers: sync, aligned, shape, row, col, then the types of D, A, B, C."""
    shape = re.fullmatch(r"m16n8k(\d+)", instruction.modifiers[2])
    result, name, second, third = instruction.modifiers[-4:]
    if not shape or name not in ELEMENT_BYTES or second != name or third != result:
        raise PtxError(f"mma form not modelled: {instruction.text}")
    d, a, b, c = map(vector, instruction.operands)
    if len(a) * 4 // ELEMENT_BYTES[name] * 2 != int(shape[1]):
        raise PtxError(f"mma form not modelled: {instruction.text}")
    registers, threads = machine.registers, machine.threads
    read_a, read_b = registers.sources(a, WORD), registers.sources(b, WORD)
    read_c, write_d = Accumulators(registers, c, result).reader(), Accumulators(registers, d, result).writer()

    def execute(active):
        full_warps(active, "mma.sync")
        left, right = fragment_a(read_a, name, threads), fragment_b(read_b, name, threads)
        write_d(left @ right.transpose(0, 2, 1) + read_c(), active)
    return execute


def _load_matrix(machine, instruction):
    """ldmatrix: 8x8 matrices of 16-bit elements, whose rows' addresses lie in the threads 8i to 8i+7 for matrix i."""
    names = _matrix_registers(instruction, instruction.operands[0])
    write = machine.registers.writers(names, WORD)
    address = machine.registers.address(instruction.operands[1])
    transposed = instruction.has("trans")

    def execute(active):
        values = np.zeros((machine.threads // WARP, len(names), WARP), np.uint32)
        warps = full_warps(active, "ldmatrix")
        rows, readers = address().reshape(-1, WARP)[warps, :8 * len(names)].ravel(), np.repeat(warps, 8 * len(names))
        data = machine.shared.read(machine.shared.index(rows, 16, readers, "ldmatrix"), readers, "ldmatrix")
        values[warps] = _exchanged(data.view(np.uint16), transposed).view(np.uint32).reshape(-1, len(names), WARP)
        for number, write_matrix in enumerate(write):
            write_matrix(values[:, number].ravel(), active)
    return execute


def _store_matrix(machine, instruction):
    names = _matrix_registers(instruction, instruction.operands[1])
    read = machine.registers.sources(names, WORD)
    address = machine.registers.address(instruction.operands[0])
    transposed = instruction.has("trans")

    def execute(active):
        warps = full_warps(active, "stmatrix")
        rows, writers = address().reshape(-1, WARP)[warps, :8 * len(names)].ravel(), np.repeat(warps, 8 * len(names))
        index = machine.shared.index(rows, 16, writers, "stmatrix")
        values = np.stack([operand().reshape(-1, WARP)[warps] for operand in read], 1)
        data = _exchanged(values.reshape(-1, 4).view(np.uint16), transposed)
        machine.shared.write(index, data.view(np.uint8), writers, "stmatrix")
    return execute


def _matrix_registers(instruction, operand):
    if not instruction.has("m8n8") or not instruction.has("b16"):
        raise PtxError(f"form not modelled: {instruction.text}")
    return vector(operand)


def _exchanged(rows, transposed):
    """Rows of 8x8 matrices, one after another, with each matrix transposed if so."""
    if not transposed:
        return np.ascontiguousarray(rows)
    return np.ascontiguousarray(rows.reshape(-1, 8, 8).transpose(0, 2, 1)).reshape(-1, 8)


BUILDERS = {"mma": _multiply, "ldmatrix": _load_matrix, "stmatrix": _store_matrix}
