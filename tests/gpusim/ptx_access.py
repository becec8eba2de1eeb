"""PTX instructions that access memory: loads, stores, atomics, asynchronous copies."""
import numpy as np
from number_formats import bfloat16_to_float32, float32_to_bfloat16
from ptx_memory import SHARED_WINDOW
from ptx_parser import PtxError, Type, vector
from ptx_scalar import pack, unpack

OTHER_SPACES = ("local", "tex")
UPDATES = {"add": np.add, "min": np.minimum, "max": np.maximum, "exch": lambda old, new: new, "and": np.bitwise_and,
           "or": np.bitwise_or, "xor": np.bitwise_xor,
           "inc": lambda old, limit: np.where(old >= limit, 0, old + 1).astype(old.dtype),
           "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - 1).astype(old.dtype)}


def _load(machine, instruction):
    kind = instruction.type
    writers = machine.registers.writers(vector(instruction.operands[0]), kind)
    _refuse_spaces(instruction)
    size = kind.bits // 8 * len(writers)
    address = machine.registers.address(instruction.operands[1])
    is_shared, is_parameter = _is_shared(instruction), instruction.has("param")

    def execute(active):
        if not active.any():
            return
        addresses = address()[active]
        if is_parameter:
            data = machine.parameters.read(addresses, size)
        elif is_shared or addresses[0] >= SHARED_WINDOW:
            data = _read_shared(machine, addresses, size, machine.warps[active])
        else:
            data = machine.global_memory.read(addresses, size, machine.places[active])
        values = np.zeros((machine.threads, len(writers)), kind.dtype)
        values[active] = data.view(kind.dtype)
        for column, write in enumerate(writers):
            write(values[:, column], active)
    return execute


def _read_shared(machine, addresses, size, warps):
    return machine.shared.read(machine.shared.index(addresses, size, warps, "load"), warps)


def _store(machine, instruction):
    _refuse_spaces(instruction)
    kind = instruction.type
    read = machine.registers.sources(vector(instruction.operands[1]), kind)
    address = machine.registers.address(instruction.operands[0])
    is_shared = _is_shared(instruction)

    def execute(active):
        if not active.any():
            return
        addresses = address()[active]
        values = np.stack([operand()[active] for operand in read], 1)
        data = _bytes(values, kind)
        if is_shared or addresses[0] >= SHARED_WINDOW:
            warps = machine.warps[active]
            machine.shared.write(machine.shared.index(addresses, data.shape[1], warps, "store"), data, warps)
        else:
            machine.global_memory.write(addresses, data, machine.places[active])
    return execute


def _bytes(values, kind):
    values = float32_to_bfloat16(values) if kind.kind == "bf16" else np.ascontiguousarray(values)
    return values.view(np.uint8).reshape(len(values), -1)


def _is_shared(instruction):
    return any(modifier.startswith("shared") for modifier in instruction.modifiers)


def _refuse_spaces(instruction):
    if instruction.has(*OTHER_SPACES):
        raise PtxError(f"state space not modelled: {instruction.text}")


class _Atomic:
    """atom and red: one lane after another, each element of a vector by itself; not held to the rules on races."""

    def __init__(self, machine, instruction):
        _refuse_spaces(instruction)
        self.machine, self.kind, self.shared = machine, instruction.type, _is_shared(instruction)
        self.packed = next((name for name in ("f16x2", "bf16x2") if instruction.has(name)), None)
        self.name = next((name for name in instruction.modifiers if name in (*UPDATES, "cas")), None)
        if self.name is None:
            raise PtxError(f"atomic not modelled: {instruction.text}")
        raw = Type("b", self.kind.bits)
        operands = instruction.operands
        destinations, operands = (vector(operands[0]), operands[1:]) if instruction.opcode == "atom" else ([], operands)
        self.write = machine.registers.writers(destinations, raw)
        self.address = machine.registers.address(operands[0])
        self.read = machine.registers.sources(vector(operands[1]), raw)
        self.swap = machine.registers.source(operands[2], raw) if self.name == "cas" else None

    def __call__(self, active):
        columns = [np.zeros(self.machine.threads, self.kind.raw) for _ in self.read]
        addresses, swap = self.address(), self.swap() if self.swap else None
        for column, read in enumerate(self.read):
            values = read()
            for lane in np.flatnonzero(active):
                place = addresses[lane:lane + 1] + np.uint64(column * self.kind.bits // 8)
                replacement = swap[lane:lane + 1] if self.swap else None
                columns[column][lane] = self._exchange(lane, place, values[lane:lane + 1], replacement)
        for write, column in zip(self.write, columns):
            write(column, active)

    def _exchange(self, lane, address, value, replacement):
        """Updates the one element at an address and returns its old bits."""
        memory, size = self.machine.global_memory, self.kind.bits // 8
        if self.shared or address[0] >= SHARED_WINDOW:
            index = self.machine.shared.index(address, size, self.machine.warps[lane], "atomic")
            old = self.machine.shared.bytes[index].view(self.kind.raw)[0]
            self.machine.shared.bytes[index] = self._updated(old, value, replacement).view(np.uint8).reshape(1, -1)
        else:
            old = memory.read(address, size, what="atomic").view(self.kind.raw)[0]
            memory.write(address, self._updated(old, value, replacement).view(np.uint8).reshape(1, -1), what="atomic")
        return old[0]

    def _updated(self, old, value, replacement):
        if self.name == "cas":
            return np.where(old == value, replacement, old)
        function = UPDATES[self.name]
        if self.packed:
            numbers = function(unpack(old, self.packed), unpack(value, self.packed))
            return np.ascontiguousarray(pack(numbers, self.packed))
        if self.kind.kind == "bf16":
            return float32_to_bfloat16(function(bfloat16_to_float32(old), bfloat16_to_float32(value)))
        return function(old.view(self.kind.dtype), value.view(self.kind.dtype)).view(self.kind.raw)


def _copy(machine, instruction):
    """cp.async and its groups; TMA and mbarriers are not modelled."""
    if instruction.has("commit_group"):
        return lambda active: machine.copies.commit(np.unique(machine.warps[active]))
    if instruction.has("wait_group"):
        pending = int(instruction.operands[0])
        return lambda active: machine.copies.wait(np.unique(machine.warps[active]), pending)
    if instruction.has("wait_all"):
        return lambda active: _wait_for_all(machine, np.unique(machine.warps[active]))
    if instruction.modifiers[:2] not in (("async", "ca"), ("async", "cg")):
        raise PtxError(f"opcode not modelled: {instruction.text}")
    return _issue_copy(machine, instruction)


def _wait_for_all(machine, warps):
    machine.copies.commit(warps)
    machine.copies.wait(warps, 0)


def _issue_copy(machine, instruction):
    """The last operand, when given, says how many bytes come from global memory; the others are 0."""
    registers = machine.registers
    target, source = map(registers.address, instruction.operands[:2])
    size = int(instruction.operands[2], 0)
    given = registers.source((instruction.operands + [str(size)])[3], Type("u", 32))

    def execute(active):
        if not active.any():
            return
        fetched = given()[active]
        if not np.isin(fetched, (0, size)).all():
            raise PtxError("cp.async of a part of its bytes is not modelled")
        warps = machine.warps[active]
        index = machine.shared.index(target()[active], size, warps, "cp.async")
        data = np.zeros((index.shape[0], size), np.uint8)
        wanted = fetched == size
        data[wanted] = machine.global_memory.read(source()[active][wanted], size, machine.places[active][wanted], "cp.async")
        machine.copies.issue(index, data, warps)
    return execute


BUILDERS = {"ld": _load, "ldu": _load, "st": _store, "atom": _Atomic, "red": _Atomic, "cp": _copy}
