"""What machine code says about a kernel's speed: registers, spills, occupancy, the hot loop's mix and its bounds.

The machines' rates are public or remembered figures: leads, never measurements. Nothing here knows of device memory, of
bank conflicts or of clocks; differences below a tenth are noise.
"""
import collections
import dataclasses
import re

from sass import disassemble, loops
from sass_issue import IssueModel, operation

KIB = 1024
WARP = 32


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Of one multiprocessor; and per quarter of it and clock: the products that a tensor core adds up in half
    precision, at best and by the instructions of a single warp, and float32 lanes."""
    shared: int
    warps: int
    blocks: int
    tensor: int
    warp_tensor: int
    float_lanes: int
    registers: int = 65536
    reserved: int = KIB  # bytes of shared memory that each block loses to the system


ARCHITECTURES = {
    75: Architecture(shared=64 * KIB, warps=32, blocks=16, tensor=128, warp_tensor=128, float_lanes=16, reserved=0),
    80: Architecture(shared=164 * KIB, warps=64, blocks=32, tensor=256, warp_tensor=256, float_lanes=16),
    86: Architecture(shared=100 * KIB, warps=48, blocks=16, tensor=128, warp_tensor=128, float_lanes=32),
    89: Architecture(shared=100 * KIB, warps=48, blocks=24, tensor=128, warp_tensor=128, float_lanes=32),
    90: Architecture(shared=228 * KIB, warps=64, blocks=32, tensor=512, warp_tensor=320, float_lanes=32),
    100: Architecture(shared=228 * KIB, warps=64, blocks=32, tensor=1024, warp_tensor=256, float_lanes=32),
    120: Architecture(shared=100 * KIB, warps=48, blocks=24, tensor=256, warp_tensor=256, float_lanes=32),
}
REGISTER_UNIT, WARP_UNIT = 256, 4
CLASSES = {
    "mma": "HMMA HGMMA QGMMA IGMMA QMMA IMMA UTCHMMA UTCQMMA UTCIMMA",
    "mufu": "MUFU",
    "fma": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2",
    "gmem": "LDG LD STG ST RED REDG ATOM ATOMG LDGSTS",
    "smem": "LDS STS LDSM STSM ATOMS",
    "local": "LDL STL",
    "tma": "UTMALDG UTMASTG UBLKCP UTMAPF UTMACMDFLUSH",
    "tmem": "LDTM STTM LDT STT UTCCP UTCBAR",
    "sync": "BAR SYNCS WARPSYNC DEPBAR LDGDEPBAR WARPGROUP FENCE MEMBAR ERRBAR",
    "shfl": "SHFL",
    "cvt": "F2F I2F F2I I2FP F2IP F2FP",
    "ctl": "BRA EXIT BSSY BSYNC CALL RET JMP YIELD NANOSLEEP BREAK",
}
CLASS_OF = {base: name for name, bases in CLASSES.items() for base in bases.split()}
PIPES = {"mma": "tensor", "mufu": "mufu", "fma": "fma", "alu": "alu", "cvt": "alu", "smem": "lsu", "gmem": "lsu",
         "local": "lsu", "shfl": "lsu"}
CYCLES = {"mufu": 8.0, "cvt": 2.0, "local": 16.0, "shfl": 4.0}
LOADS = ("LDG", "LD", "LDGSTS")
MMA_DEPTHS = {"1684": 4, "1688": 8, "16816": 16, "16832": 32, "16864": 64}


def classify(opcode):
    """The class of an instruction: what pipe or part of the machine it is for."""
    base = opcode.split(".")[0]
    if base in CLASS_OF:
        return CLASS_OF[base]
    return "uni" if base.startswith("U") and base != "UNDEF" else "alu"


def occupancy(arch, registers, shared, num_warps):
    """(blocks resident on a multiprocessor, their warps, what limits them: registers, shared, warps or blocks)."""
    machine = ARCHITECTURES[arch]
    warp_registers = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    warps = machine.registers // warp_registers // WARP_UNIT * WARP_UNIT
    limits = {"registers": warps // num_warps, "shared": machine.shared // max(1, shared + machine.reserved),
              "warps": machine.warps // num_warps, "blocks": machine.blocks}
    limit = min(limits, key=limits.get)
    return limits[limit], limits[limit] * num_warps, limit


def describe(cubin_bytes, arch, num_warps, shared, flops=0, streams=False):
    """Facts and predictions about the kernel in a cubin. The hot loop has the most tensor work, or without any is the
    largest innermost one; without loops it is the whole kernel.

    shared: bytes that a launch asks for; flops: useful ones of one pass of the hot loop by a program, for `efficiency`:
    their share of the machine's half-precision peak by the issue model. bytes_per_clock: of global accesses, for a
    quarter multiprocessor whose busiest pipe never rests, by `_bytes_per_clock`'s rule where there are several loops;
    bound: that pipe of the hot loop. spills: accesses to local memory. streams: the hot loop is the one that moves most by
    its widest accesses, and bytes_per_clock is of those alone: narrower ones are of indices and scales, which lanes share.
    """
    instructions, resources = disassemble(cubin_bytes)
    shared = max(shared, resources.get("SHARED", 0))
    registers = resources["REG"]
    blocks, warps, limit = occupancy(arch, registers, shared, num_warps)
    found = _loops(instructions, arch, num_warps)
    hot = max(found, key=lambda loop: loop.streamed if streams else loop.rank)
    counts = collections.Counter(classify(instruction.opcode) for instruction in instructions)
    return {
        "registers": registers, "spills": counts["local"], "shared": shared, "blocks": blocks, "warps": warps,
        "limit": limit, "loop": dict(hot.classes), "tensor": dict(hot.tensor_kinds), "widths": _widths(instructions),
        "efficiency": hot.efficiency(blocks, flops),
        "bytes_per_clock": hot.streamed / hot.clocks if streams else _bytes_per_clock(found, hot),
        "bound": hot.bound,
    }


def _loops(instructions, arch, num_warps):
    bodies = find_loops(instructions) or [list(range(len(instructions)))]
    return [_Loop(instructions, body, bodies, arch, num_warps) for body in bodies]


def find_loops(instructions):
    """`sass.loops`, also those that the assembler leaves by a conditional call that never returns."""
    return loops(list(map(_as_branch, instructions)))


def _as_branch(instruction):
    leaves = instruction.predicate and instruction.opcode == "CALL.REL.NOINC"
    return instruction._replace(opcode="BRA") if leaves else instruction


def _bytes_per_clock(found, hot):
    """Of the hot loop when it has tensor work. Else every innermost loop that loads is taken to pass over the row once,
    one after the other: each counts for as many passes as it takes to load the same number of bytes. A loop that only
    stores is for rows that are left out."""
    over_row = [loop for loop in found if loop.is_innermost and loop.loaded]
    if any(hot.tensor_cycles) or not over_row:
        return hot.moved / hot.clocks
    return sum(loop.moved / loop.loaded for loop in over_row) / sum(loop.clocks / loop.loaded for loop in over_row)


class _Loop:
    """A loop's own instructions, without those of the loops inside it, and what they cost a quarter multiprocessor."""

    def __init__(self, instructions, body, bodies, arch, num_warps):
        self.arch, self.num_warps = arch, num_warps
        inner = [other for other in bodies if set(other) < set(body)]
        own = sorted(set(body).difference(*inner))
        self.instructions = [instructions[index] for index in own]
        self.tensor_cycles = [_tensor_cycles(instructions, index, arch, num_warps) for index in own]
        self.kinds = [classify(instruction.opcode) for instruction in self.instructions]
        self.classes = collections.Counter(self.kinds)
        products = [i for i, kind in zip(self.instructions, self.kinds) if kind == "mma"]
        self.tensor_kinds = collections.Counter(instruction.base for instruction in products)
        self.busy = self._pipes()
        self.bound = max(self.busy, key=self.busy.get)
        self.clocks = self.busy[self.bound]
        self.moved = sum(map(_global_bytes, self.instructions))
        self.loaded = sum(_global_bytes(i) for i in self.instructions if i.base in LOADS)
        widths = [_width(i.opcode) for i in self.instructions if i.base in LOADS]
        self.streamed = sum(_global_bytes(i) for i in self.instructions if widths and _width(i.opcode) == max(widths))
        self.is_innermost = not inner
        tensor, size = sum(self.tensor_cycles), len(own)
        self.rank = tensor > 0, tensor, self.is_innermost, -size if tensor else size

    def _pipes(self):
        """Pipe -> cycles of it that one pass of one warp takes; every instruction takes one of "issue"."""
        busy = collections.Counter()
        for index, kind in enumerate(self.kinds):
            if kind in PIPES:
                busy[PIPES[kind]] += self._cycles(index)
        busy["issue"] = len(self.instructions)
        return busy

    def efficiency(self, blocks, flops):
        on_tensor_memory = any(instruction.opcode.startswith("UTC") for instruction in self.instructions)
        if not flops or not blocks or not any(self.tensor_cycles) or on_tensor_memory:
            return None
        operations = [self._operation(index) for index in range(len(self.kinds))]
        cycles = IssueModel(operations, self.num_warps, blocks).cycles_per_pass()
        peak = ARCHITECTURES[self.arch].tensor * 2 * 4  # a product and a sum, in four quarters
        return cycles and flops * blocks / (cycles * peak)

    def _operation(self, index):
        kind = self.kinds[index]
        return operation(self.instructions[index], kind, PIPES.get(kind), self._cycles(index))

    def _cycles(self, index):
        """For how long an instruction holds its pipe."""
        if self.kinds[index] == "mma":
            return self.tensor_cycles[index]
        return pipe_cycles(self.kinds[index], self.instructions[index].opcode, self.arch)


def _tensor_cycles(instructions, index, arch, num_warps):
    """Cycles for which one warp's instruction holds its quarter's tensor core; 0 when it is no matrix product."""
    machine, opcode = ARCHITECTURES[arch], instructions[index].opcode
    if opcode.startswith("UTC") and "MMA" in opcode:
        return _tensor_memory_cycles(instructions, index, machine, num_warps)
    half_rate = 0.5 if "TF32" in opcode else 1
    warpgroup = re.match(r"[HQIB]GMMA\.64x(\d+)x(\d+)", opcode)
    if warpgroup:
        rate = machine.tensor * (2 if opcode[0] in "QI" else 1) * half_rate
        return 16 * int(warpgroup[1]) * int(warpgroup[2]) / rate
    warp = re.match(r"[HIQ]MMA\.(\d+)", opcode)
    if warp:
        rate = machine.warp_tensor * half_rate * (2 if opcode[0] in "IQ" else 1)
        return 16 * 8 * MMA_DEPTHS.get(warp[1], 16) / rate
    return 0.0


def _tensor_memory_cycles(instructions, index, machine, num_warps):
    """A tcgen05 product works for the whole block: its cycles are divided among the warps of a quarter."""
    shape = _tensor_memory_shape(instructions, index)
    if shape is None:
        return 0.0
    rows, columns = shape
    is_half = "HMMA" in instructions[index].opcode
    rate = 4 * machine.tensor * (1 if is_half else 2)
    return max(rows, 128) * columns * (16 if is_half else 32) / rate / max(1, num_warps / 4)


def _tensor_memory_shape(instructions, index):
    """(rows, columns) from the instruction descriptor, when that is an immediate moved into its register."""
    register = re.search(r"idesc\[(UR\d+)\]", instructions[index].operands)
    for instruction in reversed(instructions[:index] if register else []):
        moved = re.match(rf"{register[1]}, (0x[0-9a-f]+)$", instruction.operands)
        if moved and instruction.opcode.startswith("UMOV"):
            descriptor = int(moved[1], 16)
            return (descriptor >> 24 & 31) << 4, (descriptor >> 17 & 63) << 3
    return None


def pipe_cycles(kind, opcode, arch):
    """Cycles for which a warp's instruction holds its pipe."""
    if kind in CYCLES:
        return CYCLES[kind]
    if kind == "fma":
        return 1.0 if opcode.startswith("H") else WARP / ARCHITECTURES[arch].float_lanes
    if kind == "alu":
        return 1.0 if opcode.startswith(("MOV", "IMAD.MOV", "S2R", "CS2R")) else 2.0
    if kind == "gmem":
        return 4.0 * (4 if ".128" in opcode else 2 if ".64" in opcode else 1)
    if kind == "smem":  # the four quarters share one port of 128 bytes
        return 4.0 * (_matrices(opcode) or (4 if ".128" in opcode else 2 if ".64" in opcode else 1))
    return 1.0


def _matrices(opcode):
    """How many matrices of 128 bytes an LDSM or STSM moves, also when it transposes them (MT88); 0 for others."""
    found = re.search(r"\.MT?88(?:\.([24]))?(?!\d)", opcode)
    return int(found[1] or 1) if found else 0


def _global_bytes(instruction):
    return WARP * _width(instruction.opcode) // 8 if classify(instruction.opcode) == "gmem" else 0


def _width(opcode):
    """Bits that one thread moves."""
    for width, pattern in ((128, r"\.128"), (64, r"\.64"), (16, r"\.[US]16"), (8, r"\.[US]8")):
        if re.search(pattern, opcode):
            return width
    return 32


def _widths(instructions):
    """How often each kind and width of global access occurs: {"LDG.128": 4}."""
    accesses = [i for i in instructions if classify(i.opcode) in ("gmem", "tma")]
    names = (i.base if i.base.startswith("U") else f"{i.base}.{_width(i.opcode)}" for i in accesses)
    return dict(collections.Counter(names))
