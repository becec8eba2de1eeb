"""The registers of the threads, and functions that read and write an instruction's operands."""
import math
import re

import numpy as np
from number_formats import bfloat16_to_float32, float32_to_bfloat16
from ptx_parser import PtxError, Type

WARP = 32
ADDRESS = Type("u", 64)
PREDICATE = Type("pred", 1)
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|laneid|warpid|lanemask_(?:eq|[lg][te]))(?:\.([xyz]))?")
GARBAGE = 0xFF


class Registers:
    """One array per register over the threads of the blocks that run together, block after block.

    source(operand, type) gives a function that returns the operand's value; writer(operand, type) one that takes values
    and the mask of the threads that write them.
    """

    def __init__(self, program, shape, grid, blocks, symbols):
        """shape: of a block; blocks: how many run together; symbols: name -> address."""
        self.types, self.symbols, self.shape, self.grid, self.blocks = program.registers, symbols, shape, grid, blocks
        threads = self.threads = blocks * math.prod(shape)
        self.everyone = np.ones(threads, bool)
        self.arrays = {name: np.empty(threads, bool if kind.kind == "pred" else kind.raw)
                       for name, kind in program.registers.items()}
        self.block = np.zeros((3, threads), np.uint64)

    def reset(self, places):
        """places: of each block in the grid. A register holds garbage until it is written."""
        self.block[:] = np.repeat(np.transpose(places), self.threads // self.blocks, axis=1)
        for array in self.arrays.values():
            array.view(np.uint8).fill(0 if array.dtype == bool else GARBAGE)

    def source(self, operand, kind):
        if operand in self.types:
            return self._register(operand, kind)
        if kind.kind == "pred":
            return self._predicate(operand)
        special = SPECIAL.fullmatch(operand)
        if special:
            return self._special(special[1], "xyz".index(special[2] or "x"), kind)
        value = self._constant(operand, kind)
        return lambda: value

    def sources(self, operands, kind):
        return [self.source(operand, kind) for operand in operands]

    def writer(self, operand, kind):
        if operand == "_":
            return lambda values, mask: None
        if operand not in self.types:
            raise PtxError(f"not a destination: {operand}")
        array = self.arrays[operand]
        encode = self._encoder(kind, array.dtype)

        def write(values, mask):
            if mask is self.everyone:
                np.copyto(array, encode(values))
            else:
                np.copyto(array, encode(values), where=mask)
        return write

    def writers(self, operands, kind):
        return [self.writer(operand, kind) for operand in operands]

    def address(self, operand):
        """A function giving the addresses that [base + offset] names."""
        base, offset = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        kind = Type("u", self.types[base].bits) if base in self.types else ADDRESS
        read, shift = self.source(base, kind), np.uint64(int(offset or "0", 0) & (2 ** 64 - 1))
        return lambda: read().astype(np.uint64) + shift

    def _register(self, name, kind):
        array = self.arrays[name]
        if kind.kind == "pred":
            return lambda: array
        if kind.kind == "bf16":
            return lambda: bfloat16_to_float32(array)
        if array.dtype == kind.raw:
            view = array.view(kind.dtype)
            return lambda: view
        return lambda: array.astype(kind.raw).view(kind.dtype)

    def _predicate(self, operand):
        if operand.startswith("!"):
            array = self.arrays[operand[1:]]
            return lambda: ~array
        value = np.full(self.threads, bool(int(operand, 0)))
        return lambda: value

    def _special(self, name, axis, kind):
        threads = np.arange(self.threads) % math.prod(self.shape)
        block = self.block[axis]
        if name == "ctaid":
            return lambda: block.astype(kind.raw).view(kind.dtype)
        lanes = threads % WARP
        inner = math.prod(self.shape[:axis])
        values = {"tid": threads // inner % self.shape[axis], "laneid": lanes, "warpid": threads // WARP,
                  "ntid": threads * 0 + self.shape[axis], "nctaid": threads * 0 + self.grid[axis],
                  "lanemask_eq": 1 << lanes, "lanemask_lt": (1 << lanes) - 1, "lanemask_le": (2 << lanes) - 1,
                  "lanemask_ge": -1 << lanes, "lanemask_gt": -2 << lanes}[name]
        values = values.astype(kind.raw).view(kind.dtype)
        return lambda: values

    def _constant(self, operand, kind):
        """An immediate or the address of an array, the same for each thread."""
        if operand in self.symbols:
            bits = self.symbols[operand]
        elif hexadecimal := re.fullmatch(r"0[fFdD]((?:[0-9a-fA-F]{8}){1,2})", operand):
            bits = int(hexadecimal[1], 16)
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", operand):
            bits = int(operand.rstrip("U"), 0)
        else:
            raise PtxError(f"operand not modelled: {operand}")
        value = np.full(self.threads, bits & (2 ** kind.bits - 1), kind.raw)
        return bfloat16_to_float32(value) if kind.kind == "bf16" else value.view(kind.dtype)

    @staticmethod
    def _encoder(kind, register):
        """A function from computed values to the register's bits; a register wider than the type is extended."""
        if register == bool:
            return lambda values: values
        if kind.kind == "bf16":
            return lambda values: float32_to_bfloat16(values).astype(register)
        dtype, raw = kind.dtype, kind.raw
        extends = np.dtype(raw) != register
        signed = np.dtype(f"int{register.itemsize * 8}")

        def encode(values):
            values = np.ascontiguousarray(values, dtype)
            if not extends:
                return values.view(raw)
            return values.astype(signed).view(register) if kind.kind == "s" else values.view(raw).astype(register)
        return encode
