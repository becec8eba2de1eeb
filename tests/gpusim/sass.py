"""Machine code of a compiled kernel: its instructions, its use of registers, and its loops."""
import bisect
import functools
import os
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple

ENCODING = re.compile(r"/\* (0x[0-9a-f]{16}) \*/")
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.x]*)\s*(.*?)\s*;")
CONTROL_SHIFT = 41
NO_CONTROL = 1


class Instruction(NamedTuple):
    """control: the word of stall count and scoreboards that the scheduler goes by."""
    address: int
    predicate: str
    opcode: str
    operands: str
    control: int

    @property
    def base(self):
        return self.opcode.split(".")[0]

    @property
    def target(self):
        """The address that a branch leads to, or None."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.base in ("BRA", "JMP") else None
        return int(found[1], 16) if found else None

    @property
    def ends_thread(self):
        return self.opcode.startswith(("EXIT", "RET", "BRX"))

    @property
    def is_conditional(self):
        return bool(self.predicate) or re.match(r"!?U?P\d", self.operands) is not None


def disassemble(cubin):
    """(instructions without NOPs, {"REG": ..., "STACK": ..., "SHARED": ...}) of the one function in a cubin's bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        lines = _run("-sass", file.name)
        usage = "\n".join(_run("-res-usage", file.name))
    functions = sum("Function : " in line for line in lines)
    if functions != 1:
        raise ValueError(f"{functions} functions in the cubin, expected one")
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return list(_instructions(lines)), resources


def _instructions(lines):
    """The upper half of an instruction's encoding, with the control word, stands in the line after it."""
    for line, following in zip(lines, lines[1:] + [""]):
        found = LINE.match(line)
        if found and not found[3].startswith("NOP"):
            upper = ENCODING.search(following)
            control = int(upper[1], 16) >> CONTROL_SHIFT if upper else NO_CONTROL
            yield Instruction(int(found[1], 16), found[2] or "", found[3], found[4], control)


def _run(option, path):
    command = [_cuobjdump(), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@functools.cache
def _cuobjdump():
    """Triton's wheel brings the tool along."""
    import triton
    bundled = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    path = bundled if os.path.exists(bundled) else shutil.which("cuobjdump")
    if path is None:
        raise FileNotFoundError("cuobjdump")
    return path


def loops(instructions):
    """The natural loops: lists of indices of instructions, in order; nested loops' instructions are in both."""
    graph = _Graph(instructions)
    return [sorted(index for block in body for index in graph.blocks[block]) for body in graph.loop_bodies()]


class _Graph:
    """Basic blocks, as ranges of indices, and how control passes between them."""

    def __init__(self, instructions):
        self.instructions = instructions
        starts = self._starts()
        self.blocks = [range(start, end) for start, end in zip(starts, starts[1:] + [len(instructions)])]
        self.number = {start: number for number, start in enumerate(starts)}
        self.successors = [self._successors(number) for number in range(len(starts))]
        self.predecessors = [[] for _ in starts]
        for block, following in enumerate(self.successors):
            for successor in following:
                self.predecessors[successor].append(block)

    def loop_bodies(self):
        """Sets of blocks, by their head: a loop is where control goes back to a block that dominates."""
        dominators, reachable = self._dominators(), self._reachable()
        bodies = {}
        for block in reachable:
            for head in self.successors[block]:
                if dominators[block] >> head & 1:
                    self._grow(bodies.setdefault(head, {head}), block)
        return [body for _, body in sorted(bodies.items())]

    def _grow(self, body, block):
        waiting = [block]
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting += self.predecessors[block]

    def _starts(self):
        starts = {0}
        for index, instruction in enumerate(self.instructions):
            if instruction.target is not None:
                starts.add(self._index(instruction.target))
            if instruction.target is not None or instruction.ends_thread:
                starts.add(index + 1)
        return sorted(start for start in starts if start < len(self.instructions))

    @functools.cached_property
    def _addresses(self):
        return [instruction.address for instruction in self.instructions]

    def _index(self, address):
        return min(bisect.bisect_left(self._addresses, address), len(self._addresses) - 1)

    def _successors(self, block):
        last = self.instructions[self.blocks[block][-1]]
        following = [] if last.target is None else [self.number[self._index(last.target)]]
        falls_through = last.is_conditional or (last.target is None and not last.ends_thread)
        if falls_through and block + 1 < len(self.blocks):
            following.append(block + 1)
        return following

    def _reachable(self):
        found, waiting = set(), [0]
        while waiting:
            block = waiting.pop()
            if block not in found:
                found.add(block)
                waiting += self.successors[block]
        return found

    def _dominators(self):
        """For each block the set, as bits, of the blocks that every way to it passes."""
        every = (1 << len(self.blocks)) - 1
        dominators = [1] + [every] * (len(self.blocks) - 1)
        changed = True
        while changed:
            changed = False
            for block in range(1, len(self.blocks)):
                common = functools.reduce(int.__and__, (dominators[p] for p in self.predecessors[block]), every)
                changed |= dominators[block] != common | 1 << block
                dominators[block] = common | 1 << block
        return dominators
