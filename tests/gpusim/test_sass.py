"""What is read from machine code: access widths, spills, tensor instructions, loops, occupancy."""
import pytest

pytest.importorskip("triton")

import planted
import sass
import triton
import triton.language as tl
from compiling import compile_kernel
from efficiency import memory_bytes_per_clock, predicted_efficiency
from sass_issue import IssueModel, operation
from sass_model import classify, describe, find_loops, occupancy, pipe_cycles


def test_blocks_on_turing():
    """It has 64 KB of shared memory, of which a block loses nothing, and half the warps."""
    assert occupancy(75, 64, 64 * 1024, 4) == (1, 4, "shared") and occupancy(80, 64, 64 * 1024, 4)[0] == 2
    assert occupancy(75, 32, 0, 4) == (8, 32, "warps")


def described_copy(divisible):
    signature = {"X": "*fp16", "Y": "*fp16", "n": "i32", "BLOCK": "constexpr", "LOAD_MASKED": "constexpr",
                 "STORE_MASKED": "constexpr"}
    constexprs = {"BLOCK": 1024, "LOAD_MASKED": True, "STORE_MASKED": True}
    compiled = compile_kernel(planted.copy, signature, constexprs, divisible, arch=80)
    return describe(compiled.asm["cubin"], 80, 4, compiled.metadata.shared)


def test_wide_accesses_need_divisible_arguments():
    assert described_copy(["X", "Y", "n"])["widths"] == {"LDG.128": 1, "STG.128": 1}
    assert described_copy([])["widths"] == {"LDG.16": 8, "STG.16": 8}


def described_product(arch, tile=64, dtype="*fp16", precision="ieee", num_warps=4, num_stages=3, flops=0):
    constexprs = {"ROWS": tile, "COLUMNS": tile, "DEPTH": 32, "PRECISION": precision, "SUM": tl.float32}
    signature = {"A": dtype, "B": dtype, "C": "*fp32", "columns": "i32", "depth": "i32",
                 **dict.fromkeys(constexprs, "constexpr")}
    compiled = compile_kernel(planted.product, signature, constexprs, ["A", "B", "C", "columns", "depth"], arch,
                              num_warps=num_warps, num_stages=num_stages)
    return describe(compiled.asm["cubin"], arch, num_warps, compiled.metadata.shared, flops)


def test_tensor_instructions_of_the_hot_loop():
    """On sm_80 a warp has 32x32x32 products to do, 16x8x16 at a time; on sm_90 four warps have 64x64x32, 64x64x16."""
    ampere, hopper = described_product(80), described_product(90)
    assert ampere["tensor"] == {"HMMA": 16} and ampere["loop"]["mma"] == 16
    assert hopper["tensor"] == {"HGMMA": 2} and hopper["loop"]["mma"] == 2
    assert described_product(80, dtype="*fp32", num_stages=2)["tensor"] == {}


def test_spills():
    fitting, spilling = described_product(80, num_stages=2), described_product(80, tile=128, num_warps=1, num_stages=2)
    assert fitting["spills"] == 0 and fitting["registers"] < 255
    assert spilling["spills"] > 50 and spilling["registers"] == 255
    assert "local" in spilling["loop"] and "local" not in fitting["loop"]


def test_efficiency_is_a_share_of_the_peak():
    flops = 2 * 64 * 64 * 32
    pipelined, simple = described_product(80, flops=flops), described_product(80, num_stages=1, flops=flops)
    assert 0.1 < simple["efficiency"] < pipelined["efficiency"] < 1
    assert described_product(80)["efficiency"] is None
    assert described_product(100, tile=128, flops=flops)["efficiency"] is None


def test_tf32_is_half_as_fast():
    flops = 2 * 64 * 64 * 32
    half = described_product(90, flops=flops)
    single = described_product(90, dtype="*fp32", precision="tf32", flops=flops)
    assert single["tensor"] == {"HGMMA": 4}
    assert single["efficiency"] < 0.7 * half["efficiency"]


@pytest.mark.parametrize("arch, registers, shared, num_warps, expected", [
    (80, 24, 0, 4, (16, 64, "warps")),              # registers for 84 warps
    (80, 128, 0, 4, (4, 16, "registers")),          # 4096 registers a warp: 16 warps
    (80, 129, 0, 4, (3, 12, "registers")),          # in units of 256: 4352 a warp, 15 warps, of which 12 in units of 4
    (80, 255, 0, 8, (1, 8, "registers")),
    (80, 64, 54 * 1024, 4, (2, 8, "shared")),       # 55 KiB with the reserved one: 2 in 164
    (90, 64, 54 * 1024, 4, (4, 16, "shared")),      # 4 in 228
    (80, 16, 0, 1, (32, 32, "blocks")),
    (90, 255, 220 * 1024, 16, (0, 0, "registers")),  # 8192 registers a warp: 8 warps, and no block of 16
    (90, 64, 230 * 1024, 4, (0, 0, "shared"))])
def test_occupancy(arch, registers, shared, num_warps, expected):
    assert occupancy(arch, registers, shared, num_warps) == expected


def test_described_occupancy():
    facts = described_product(80)
    assert (facts["blocks"], facts["warps"], facts["limit"]) == occupancy(80, facts["registers"], facts["shared"], 4)


@pytest.mark.parametrize("opcode, kind", [
    ("HMMA.16816.F32", "mma"), ("MUFU.EX2", "mufu"), ("FFMA", "fma"), ("IMAD.MOV", "alu"), ("LDG.E.128", "gmem"),
    ("LDSM.16.M88.4", "smem"), ("STL", "local"), ("USEL", "uni")])
def test_classes(opcode, kind):
    assert classify(opcode) == kind


@triton.jit
def passes_over_row(X, SUMS, n, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """A loop that reads, which the compiler unrolls, then one with much arithmetic that reads and writes."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if READ:
        for start in range(0, n, BLOCK):
            total += tl.load(X + start + i)
    tl.store(SUMS + i, total)
    if WRITE:
        for start in range(0, n, BLOCK):
            x = tl.load(X + start + i)
            for _ in tl.static_range(40):
                x = x * x + total
            tl.store(X + start + i, x)


def described_passes(arch, read, write):
    constexprs = {"READ": read, "WRITE": write, "BLOCK": 1024}
    signature = {"X": "*fp32", "SUMS": "*fp32", "n": "i32", **dict.fromkeys(constexprs, "constexpr")}
    compiled = compile_kernel(passes_over_row, signature, constexprs, ["X", "SUMS", "n"], arch, num_stages=1)
    return describe(compiled.asm["cubin"], arch, 4, compiled.metadata.shared)


@pytest.mark.parametrize("arch", [80, 90])
def test_bytes_per_clock_of_loops_that_each_pass_over_the_row(arch):
    """The row once at the one loop's rate, twice, in and out, at the other's, however often each is unrolled."""
    reading, writing = (described_passes(arch, *which)["bytes_per_clock"] for which in ((True, False), (False, True)))
    both = described_passes(arch, True, True)
    assert reading == 32 and writing < 0.5 * reading
    assert both["bytes_per_clock"] == pytest.approx(3 / (1 / reading + 2 / writing), rel=0.02)


def test_a_loop_is_left_by_a_call_that_never_returns():
    code = [instruction(0, "LDG.E", "R0, [R2.64]"), instruction(16, "CALL.REL.NOINC", "0x30", "@P0"),
            instruction(32, "BRA", "0x0"), instruction(48, "STG.E", "[R2.64], R0"), instruction(64, "EXIT")]
    assert [len(body) for body in find_loops(code)] == [3]
    code.insert(3, instruction(48, "FADD"))
    looping_on = [*code[:4], instruction(64, "LDG.E", "R0, [R2.64]"), instruction(80, "BRA", "0x40", "@P0"), code[-1]]
    assert [len(body) for body in find_loops(looping_on)] == [3, 2]


@pytest.mark.parametrize("bytes_per_clock, moved, expected", [(100, 200, 1), (100, 300, 2 / 3), (1.5, 200, 1.5 / 3.35)])
def test_predicted_efficiency_of_a_memory_kernel(bytes_per_clock, moved, expected):
    description = {"tensor": {}, "bytes_per_clock": bytes_per_clock, "efficiency": None}
    assert predicted_efficiency(description, 80, 200, moved) == pytest.approx(expected, rel=0.01)


def test_predicted_efficiency_of_a_tensor_kernel():
    description = {"tensor": {"HGMMA": 2}, "bytes_per_clock": 1, "efficiency": 0.6}
    assert predicted_efficiency(description, 90) == predicted_efficiency(description, 90, 1, 1) == 0.6
    assert memory_bytes_per_clock(90) == pytest.approx(3.47, abs=0.005)


@pytest.mark.parametrize("opcode, cycles_of_port", [
    ("LDS", 4), ("LDS.64", 8), ("STS.128", 16), ("LDSM.16.M88", 4), ("LDSM.16.M88.2", 8), ("LDSM.16.M88.4", 16),
    ("LDSM.16.MT88", 4), ("LDSM.16.MT88.2", 8), ("LDSM.16.MT88.4", 16), ("STSM.16.MT88.4", 16)])
def test_shared_memory_costs_by_the_bytes_moved(opcode, cycles_of_port):
    assert pipe_cycles("smem", opcode, 80) == cycles_of_port


def instruction(address, opcode, operands="", predicate="", control=1):
    return sass.Instruction(address, predicate, opcode, operands, control)


def test_loops_are_found_with_those_inside_them():
    code = [instruction(0, "MOV"),
            instruction(16, "FADD"),                                     # outer loop
            instruction(32, "FMUL"),                                     # inner loop
            instruction(48, "BRA", "0x20", "@P0"),
            instruction(64, "BRA", "0x60", "@P1"),                       # skips one instruction
            instruction(80, "FFMA"),
            instruction(96, "BRA", "P2, 0x10"),
            instruction(112, "EXIT")]
    assert sass.loops(code) == [[1, 2, 3, 4, 5, 6], [2, 3]]
    assert sass.loops(code[:3] + code[-1:]) == []


def cycles(operations, warps_per_block=4, blocks=1):
    return IssueModel(operations, warps_per_block, blocks).cycles_per_pass()


def modelled(opcode, operands="", stall=1, sets=7, waits=0, kind="alu", pipe="alu", pipe_cycles=1.0):
    """sets: the scoreboard that the result frees; waits: the mask of those to wait for."""
    control = stall | sets << 5 | 7 << 8 | waits << 11
    return operation(instruction(0, opcode, operands, control=control), kind, pipe, pipe_cycles)


def test_issue_model_by_hand():
    assert cycles([modelled("IADD3")] * 10) == 10                                # one a cycle
    assert cycles([modelled("IADD3", stall=4)] * 10) == 40                       # one warp stalls,
    assert cycles([modelled("IADD3", stall=4)] * 10, blocks=4) == 40             # and others fill its gaps
    assert cycles([modelled("IADD3", pipe_cycles=2.0)] * 10, blocks=2) == 40     # unless the pipe is taken
    load = modelled("LDG.E", sets=0, kind="gmem", pipe="lsu", pipe_cycles=4.0)
    assert cycles([load, modelled("IADD3", waits=1)]) == 505                     # 500 and the pipe's 4, then one more
    assert cycles([load, modelled("IADD3", waits=2)]) == 4                       # another scoreboard


def test_issue_model_of_asynchronous_products():
    product = modelled("HGMMA.64x64x16.F32", "R0, gdesc[UR0], R0, gsb0", kind="mma", pipe="tensor", pipe_cycles=32.0)
    wait_all = modelled("WARPGROUP.DEPBAR.LE", "gsb0, 0x0", kind="sync", pipe=None)
    wait_but_one = modelled("WARPGROUP.DEPBAR.LE", "gsb0, 0x1", kind="sync", pipe=None)
    wait_but_two = modelled("WARPGROUP.DEPBAR.LE", "gsb0, 0x2", kind="sync", pipe=None)
    assert cycles([product, wait_all]) == 32 + 34 + 1                            # a product, its latency, the wait
    assert cycles([product, wait_but_one]) == (32 + 34 + 1) / 2                  # the same for every second one
    assert cycles([product, wait_but_two]) == 32                                 # the tensor cores never rest


def test_only_one_function_is_described(monkeypatch):
    monkeypatch.setattr(sass, "_run", lambda option, path: ["Function : one", "Function : two"])
    with pytest.raises(ValueError, match="2 functions"):
        sass.disassemble(b"")
