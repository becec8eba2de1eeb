"""The PTX machine runs compiled kernels to the right numbers, and sees each fault planted in their PTX."""
import re

import pytest
import torch

pytest.importorskip("triton")

import planted
import ptx_machine
import triton.language as tl
from compiling import compile_kernel
from number_formats import truncate_to_tf32
from ptx_machine import Kernel, PtxError
from ptx_snippets import run, run_word

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
THREADS = 128


def edited(ptx, pattern, replacement, occurrence=0):
    """The text with one of the matches of a pattern replaced; there must be that many."""
    match = list(re.finditer(pattern, ptx))[occurrence]
    return ptx[:match.start()] + match.expand(replacement) + ptx[match.end():]


def compiled_row_sums(arch=80):
    signature = {"X": "*fp32", "Y": "*fp32", "BLOCK": "constexpr"}
    return compile_kernel(planted.row_sums, signature, {"BLOCK": 1024}, ["X", "Y"], arch)


def run_row_sums(ptx, races=True):
    x, y = torch.randn(2, 1024), torch.empty(2)
    Kernel(ptx).launch((2,), THREADS, [x, y], shared=compiled_row_sums().metadata.shared, races=races)
    return x, y


def test_row_sums():
    for arch in (80, 90):
        x, y = run_row_sums(compiled_row_sums(arch).asm["ptx"])
        torch.testing.assert_close(y, x.sum(1), rtol=1e-5, atol=1e-5)


def test_removed_barrier_is_a_race():
    ptx = edited(compiled_row_sums().asm["ptx"], r"bar\.sync\s+0;", "")
    with pytest.raises(PtxError, match=r"race in shared memory: .* no barrier between; blocks \(0, 0, 0\) to \(1, 0, 0\), instruction"):
        run_row_sums(ptx)
    run_row_sums(ptx, races=False)


def test_wrong_shuffle_distance_gives_wrong_numbers():
    ptx = edited(compiled_row_sums().asm["ptx"], r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )16", r"\g<1>8")
    x, y = run_row_sums(ptx)
    assert ((y - x.sum(1)).abs() > 1).all()


def compiled_product(arch, dtype=torch.float16, precision="ieee", total=tl.float32, num_stages=3, num_warps=4):
    constexprs = {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "PRECISION": precision, "SUM": total}
    result = "*fp16" if total is tl.float16 else "*fp32"
    signature = {"A": POINTERS[dtype], "B": POINTERS[dtype], "C": result, "columns": "i32", "depth": "i32",
                 **dict.fromkeys(constexprs, "constexpr")}
    return compile_kernel(planted.product, signature, constexprs, ["A", "B", "C", "columns", "depth"], arch,
                          num_warps=num_warps, num_stages=num_stages)


def run_product(compiled, dtype=torch.float16, ptx=None, result=torch.float32):
    a, b, c = torch.randn(64, 256).to(dtype), torch.randn(256, 128).to(dtype), torch.empty(64, 128, dtype=result)
    threads = 32 * compiled.metadata.num_warps
    Kernel(ptx or compiled.asm["ptx"]).launch((1, 2), threads, [a, b, c, 128, 256], shared=compiled.metadata.shared)
    return a, b, c


def relative_error(actual, truth):
    return ((actual.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("arch, instruction", [(80, "mma.sync.aligned.m16n8k16"), (90, "wgmma.mma_async")])
@pytest.mark.parametrize("element", [torch.float16, torch.bfloat16])
def test_products_of_halves(arch, instruction, element):
    compiled = compiled_product(arch, element)
    assert instruction in compiled.asm["ptx"]
    a, b, c = run_product(compiled, element)
    assert relative_error(c, a.double() @ b.double()) < 1e-6


def test_products_summed_in_half_precision():
    compiled = compiled_product(80, total=tl.float16)
    assert ".f16.f16.f16.f16" in compiled.asm["ptx"]
    a, b, c = run_product(compiled, result=torch.float16)
    assert relative_error(c, a.double() @ b.double()) < 3e-3
    with pytest.raises(PtxError, match="wgmma form not modelled"):
        run_product(compiled_product(90, total=tl.float16), result=torch.float16)


@pytest.mark.parametrize("arch, instruction", [(80, "mma.sync.aligned.m16n8k8"), (90, "wgmma.mma_async")])
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_products_in_tf32(arch, instruction, precision):
    compiled = compiled_product(arch, torch.float32, precision, num_stages=2)
    assert instruction in compiled.asm["ptx"] and "tf32.tf32" in compiled.asm["ptx"]
    a, b, c = run_product(compiled, torch.float32)
    if precision == "tf32":
        truth = [torch.from_numpy(truncate_to_tf32(matrix.numpy())).double() for matrix in (a, b)]
        assert relative_error(c, a.double() @ b.double()) > 3e-4
    else:
        truth = a.double(), b.double()
    assert relative_error(c, truth[0] @ truth[1]) < 1e-6


def test_product_of_two_warpgroups():
    compiled = compiled_product(90, num_warps=8)
    a, b, c = run_product(compiled)
    assert relative_error(c, a.double() @ b.double()) < 1e-6


def outcome_of_product(compiled, ptx):
    """"right", "wrong", or the error's text."""
    try:
        a, b, c = run_product(compiled, ptx=ptx)
    except PtxError as error:
        return str(error)
    return "right" if relative_error(c, a.double() @ b.double()) < 1e-6 else "wrong"


@pytest.mark.parametrize("occurrence", range(4))
def test_each_barrier_around_wgmma_is_needed(occurrence):
    """Before the first product, before a tile is copied over, before the result is stored there, before it is read."""
    compiled = compiled_product(90)
    ptx = edited(compiled.asm["ptx"], r"bar\.sync\s+0;", "", occurrence)
    assert "race in shared memory" in outcome_of_product(compiled, ptx)


def test_lax_wait_for_copies():
    compiled = compiled_product(80)
    ptx = re.sub(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;", compiled.asm["ptx"])
    assert ptx != compiled.asm["ptx"]
    assert "race in shared memory: cp.async over what another warp read" in outcome_of_product(compiled, ptx)


@pytest.mark.parametrize("wait, landed", [("wait_group 0", True), ("wait_all", True), ("wait_group 1", False)])
def test_copy_lands_when_it_is_waited_for(wait, landed):
    """Until then there is NaN; a copy of 0 bytes fills its place with zeros."""
    body = f"""mov.u64 %d3, dynamic; mad.wide.u32 %d3, %tid, 16, %d3;
        cp.async.cg.shared.global [%d3], [%d14], 16, %r1; cp.async.commit_group; cp.async.{wait};
        ld.shared.f32 %r31, [%d3];"""
    lengths = torch.tensor([16, 0] * 16, dtype=torch.int32).view(torch.float32)
    inputs = torch.stack([torch.randn(32), lengths], 1)
    result = run_word(body, inputs, shared=512).view(torch.float32)
    if landed:
        assert torch.equal(result[::2], inputs[::2, 0]) and not result[1::2].any()
    else:
        assert result.isnan().all()


def test_unwaited_wgmma_registers():
    compiled = compiled_product(90)
    ptx = compiled.asm["ptx"]
    waits = len(re.findall(r"wgmma\.wait_group", ptx))
    ptx = edited(ptx, r"wgmma\.wait_group\.sync\.aligned 0;", "", waits - 2)
    assert re.search(r"register %r\d+ of a wgmma is used before its wait_group", outcome_of_product(compiled, ptx))


def test_unwaited_wgmma_shared_memory():
    """With one more product left unfinished, a copy overwrites the tile it reads."""
    compiled = compiled_product(90, num_stages=2)
    ptx = edited(compiled.asm["ptx"], r"(wgmma\.wait_group\.sync\.aligned) [01];", r"\g<1> 3;")
    assert "over what an unwaited wgmma reads" in outcome_of_product(compiled, ptx)


def copy_arguments():
    constexprs = {"BLOCK": 512, "LOAD_MASKED": True, "STORE_MASKED": True}
    return {"X": "*fp32", "Y": "*fp32", "n": "i32", **dict.fromkeys(constexprs, "constexpr")}, constexprs


@pytest.mark.parametrize("unmasked, message", [(None, None), ("LOAD_MASKED", "load of 16 bytes outside every argument"),
                                               ("STORE_MASKED", "store of 16 bytes outside every argument")])
def test_addresses_outside_the_arguments(unmasked, message):
    signature, constexprs = copy_arguments()
    compiled = compile_kernel(planted.copy, signature, constexprs | {unmasked: False} if unmasked else constexprs,
                              ["X", "Y", "n"], 80)
    x, y = torch.randn(640)[:608], torch.zeros(640)[:608]
    if unmasked is None:
        Kernel(compiled.asm["ptx"]).launch((2,), THREADS, [x, y, 608])
        assert torch.equal(x, y)
    else:
        with pytest.raises(PtxError, match=message):
            Kernel(compiled.asm["ptx"]).launch((2,), THREADS, [x, y, 608])


def test_misaligned_address():
    signature, constexprs = copy_arguments()
    compiled = compile_kernel(planted.copy, signature, constexprs, ["X", "Y", "n"], 80)
    with pytest.raises(PtxError, match="misaligned load of 16 bytes"):
        Kernel(compiled.asm["ptx"]).launch((1,), THREADS, [torch.randn(513)[1:], torch.zeros(512), 512])


def test_shared_addresses():
    lanes = torch.arange(32, dtype=torch.int32)[:, None]
    body = """mov.u64 %d3, dynamic; mad.wide.u32 %d3, %r0, 4, %d3;
        st.shared.u32 [%d3], %r0; ld.shared.u32 %r31, [%d3+OFFSET];"""
    assert torch.equal(run_word(body.replace("OFFSET", "0"), lanes, shared=128), lanes[:, 0])
    with pytest.raises(PtxError, match="shared load outside the 128 bytes"):
        run_word(body.replace("OFFSET", "4"), lanes, shared=128)
    with pytest.raises(PtxError, match="misaligned shared load"):
        run_word(body.replace("OFFSET", "2"), lanes, shared=256)


def test_unwritten_shared_memory_is_nan():
    body = "mov.u64 %d3, dynamic; ld.shared.f32 %r31, [%d3];"
    assert run_word(body, torch.zeros(32, 1), shared=128).view(torch.float32).isnan().all()


MMA_TF32 = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
MMA_REGISTERS = "{%r8,%r9,%r10,%r11}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6,%r6,%r6,%r6}"
HALF_OF_THE_WARP = "setp.lt.u32 %p0, %laneid, 16; @%p0 bra $half; bra $end; $half: WHAT $end:"


@pytest.mark.parametrize("what, name", [
    ("shfl.sync.bfly.b32 %r31, %r0, 1, 31, -1;", "shfl.sync"), ("vote.sync.any.pred %p1, %p0, -1;", "vote.sync"),
    ("redux.sync.add.u32 %r31, %r0, -1;", "redux.sync"),
    ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r31}, [%d0];", "ldmatrix"),
    (f"{MMA_TF32} {MMA_REGISTERS};", "mma.sync")])
def test_missing_lanes(what, name):
    with pytest.raises(PtxError, match=f"{name} with missing lanes"):
        run_word(HALF_OF_THE_WARP.replace("WHAT", what), torch.zeros(32, 2), shared=128)


def test_shuffle_among_half_of_the_warp():
    shuffle = HALF_OF_THE_WARP.replace("WHAT", "shfl.sync.bfly.b32 %r31, %r0, 1, 31, 0xFFFF;")
    lanes = torch.arange(32, dtype=torch.int32)
    result = run_word("mov.u32 %r31, -1;" + shuffle, lanes[:, None])
    assert torch.equal(result, torch.where(lanes < 16, lanes ^ 1, -1))


def test_divergent_barrier():
    branch = "setp.lt.u32 %p0, %tid, 32; @%p0 bra $first; BARRIER bra $end; $first: bar.sync 0; $end:"
    inputs = torch.zeros(64, 1)
    with pytest.raises(PtxError, match="divergent bar.sync"):
        run_word(branch.replace("BARRIER", "bar.sync 0;"), inputs)
    run_word("bar.sync 0;", inputs)


def test_branches_and_loops():
    """Each thread counts to its own number."""
    lanes = torch.arange(64, dtype=torch.int32)[:, None]
    body = """mov.u32 %r31, 0;
    $loop: setp.ge.u32 %p0, %r31, %r0; @%p0 bra $done; add.u32 %r31, %r31, 1; bra.uni $loop;
    $done: @!%p0 trap;"""
    assert torch.equal(run_word(body, lanes), lanes[:, 0])
    with pytest.raises(PtxError, match="trap"):
        run_word(body.replace("@!", "@"), lanes)


def test_races_through_shared_memory():
    """A store by one warp, then an access by the other; a barrier between them settles it, and so does one warp."""
    inputs = torch.zeros(64, 1)
    first = "mov.u64 %d3, dynamic; setp.lt.u32 %p0, %tid, 32; @%p0 st.shared.u32 [%d3], %tid;"
    for second in ("ld.shared.u32 %r31, [%d3];", "@!%p0 st.shared.u32 [%d3], %tid; mov.u32 %r31, 0;"):
        run_word(f"{first} bar.sync 0; {second}", inputs, shared=128)
        run_word(f"{first} {second}", inputs[:32], shared=128)
        with pytest.raises(PtxError, match="race in shared memory: .* after another warp's store, no barrier between"):
            run_word(f"{first} {second}", inputs, shared=128)
    overwrite = """mov.u64 %d3, dynamic; ld.shared.u32 %r31, [%d3];
        setp.eq.u32 %p0, %tid, 0; @%p0 st.shared.u32 [%d3], 0;"""
    with pytest.raises(PtxError, match="race in shared memory: store over what another warp read"):
        run_word(overwrite, inputs, shared=128)


EXCHANGES = """mov.u32 %r31, 0; mov.u32 %r16, 0; mov.u64 %d3, dynamic; mad.wide.u32 %d4, %tid, 4, %d3;
    sub.u32 %r17, 63, %tid; mad.wide.u32 %d5, %r17, 4, %d3; setp.eq.u32 %p1, %ctaid.x, 1; @%p1 ret;
    $loop: setp.gt.u32 %p0, %r16, %ctaid.x; @%p0 bra $done;
    st.shared.u32 [%d4], %r0; bar.sync 0; ld.shared.u32 %r18, [%d5]; bar.sync 0;
    add.u32 %r31, %r31, %r18; add.u32 %r16, %r16, 1; bra.uni $loop;
    $done:"""


@pytest.mark.parametrize("together", [1, 2, 5])
def test_each_block_by_itself(monkeypatch, together):
    """Blocks that run together: block b adds up what its own threads exchange b + 1 times, and the second leaves at once."""
    monkeypatch.setattr(ptx_machine, "blocks_together", lambda *launch: together)
    inputs = torch.arange(5 * 64, dtype=torch.int32)
    result = run_word(EXCHANGES, inputs[:, None], blocks=5, shared=256).reshape(5, 64)
    assert torch.equal(result, inputs.reshape(5, 64).flip(1) * torch.tensor([1, 0, 3, 4, 5])[:, None])
    votes = run_word("setp.lt.u32 %p0, %tid, %r0; bar.red.popc.u32 %r31, 0, %p0;", inputs[:, None] // 64, blocks=5)
    assert torch.equal(votes, inputs.int() // 64)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("fault, message", [
    ("@%p1 bra $end; @%p0 bra $first; bar.sync 0; bra $end; $first: bar.sync 0; $end:", "divergent bar.sync"),
    ("@%p0 st.shared.u32 [%d3], %tid; @%p1 bar.sync 0; ld.shared.u32 %r31, [%d3];", "race in shared memory"),
    ("@!%p1 ld.shared.u32 %r31, [%d3+128];", "outside the 128 bytes")])
def test_the_fault_of_one_block(monkeypatch, together, fault, message):
    """Of the second, where the first block alone passes."""
    monkeypatch.setattr(ptx_machine, "blocks_together", lambda *launch: together)
    body = f"mov.u64 %d3, dynamic; setp.lt.u32 %p0, %tid, 32; setp.eq.u32 %p1, %ctaid.x, 0; {fault}"
    run_word(body, torch.zeros(64, 1), shared=128)
    with pytest.raises(PtxError, match=rf"{message}.*block.*\(1, 0, 0\), instruction"):
        run_word(body, torch.zeros(128, 1), blocks=2, shared=128)


@pytest.mark.parametrize("together", [1, 2])
def test_a_block_does_not_see_what_another_stores(monkeypatch, together):
    """It loads its own store, or the one behind it."""
    monkeypatch.setattr(ptx_machine, "blocks_together", lambda *launch: together)
    body = "st.global.u32 [%d15], %tid; ld.global.u32 %r31, [%d15AWAY]; st.global.u32 [%d15], %r31;"
    inputs = torch.zeros(64, 1)
    assert torch.equal(run_word(body.replace("AWAY", ""), inputs, blocks=2), torch.arange(32, dtype=torch.int32).repeat(2))
    body = "setp.eq.u32 %p0, %ctaid.x, 1;" + body.replace("ld.", "@%p0 ld.").replace("AWAY", "+-256")
    with pytest.raises(PtxError, match="race between blocks: load of what another one has stored"):
        run_word(body, inputs, blocks=2)


TILE = "mov.u64 %d3, dynamic; mad.wide.u32 %d4, %tid, 4, %d3; st.shared.u32 [%d4], 0; bar.sync 0;"
WGMMA = """shr.u64 %d5, %d3, 4; or.b64 %d5, %d5, 0x800080000;
    mov.u32 %r16, 0; mov.u32 %r17, 0; mov.u32 %r18, 0; mov.u32 %r19, 0; setp.eq.u32 %p0, 0, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r16,%r17,%r18,%r19}, {%r0,%r1,%r2,%r3}, %d5, %p0, 1, 1, 0;
    wgmma.commit_group.sync.aligned;"""
WAIT = "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize("use, message", [
    ("mov.u32 %r31, %r17;", "register %r17 of a wgmma is used before its wait_group"),
    ("mov.u32 %r18, 0;", "register %r18 of a wgmma is used"), ("mov.u32 %r2, 0;", "register %r2 of a wgmma is used"),
    ("st.shared.u32 [%d4], 1;", "over what an unwaited wgmma reads")])
def test_what_an_unwaited_wgmma_owns(use, message):
    inputs = torch.zeros(128, 4)
    run_word(f"{TILE} {WGMMA} {WAIT} bar.sync 0; {use} mov.u32 %r31, 0;", inputs, shared=512)
    with pytest.raises(PtxError, match=message):
        run_word(f"{TILE} {WGMMA} bar.sync 0; {use} {WAIT} mov.u32 %r31, 0;", inputs, shared=512)


def test_wgmma_with_missing_warps():
    with pytest.raises(PtxError, match="wgmma with missing lanes"):
        run_word(f"{TILE} setp.lt.u32 %p1, %tid, 64; @%p1 bra $end; {WGMMA} $end:", torch.zeros(128, 4), shared=512)


def test_tf32_products_ignore_the_low_bits():
    body = f"{MMA_TF32} {MMA_REGISTERS}; mov.b64 %d7, {{%r8, %r11}};"
    inputs = torch.randn(32, 7)
    noisy = (inputs.view(torch.int32) | 0x1FFF).view(torch.float32)
    clean = torch.from_numpy(truncate_to_tf32(inputs.numpy()))
    noisy[:, 6] = clean[:, 6] = 0
    assert torch.equal(run(body, noisy), run(body, clean))
    a, b = torch.empty(16, 8), torch.empty(8, 8)
    for lane, row in enumerate(clean):
        group, thread = divmod(lane, 4)
        a[group, thread], a[group + 8, thread], a[group, thread + 4], a[group + 8, thread + 4] = row[:4]
        b[thread, group], b[thread + 4, group] = row[4:6]
    result = run(body, noisy).view(torch.float32).reshape(8, 4, 2)
    torch.testing.assert_close(result[..., 0], (a @ b)[:8, 0::2])
    torch.testing.assert_close(result[..., 1], (a @ b)[8:, 1::2])


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrix_load_undoes_a_matrix_store(transposed):
    """Two 8x8 matrices, whose rows' addresses lie in the first 16 threads."""
    body = f"""mov.u64 %d3, dynamic; and.b32 %r8, %laneid, 15; mad.wide.u32 %d4, %r8, 16, %d3;
        stmatrix.sync.aligned.m8n8.x2.shared.b16 [%d4], {{%r0, %r1}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x2{transposed}.shared.b16 {{%r30, %r31}}, [%d4]; mov.b64 %d7, {{%r30, %r31}};"""
    inputs = torch.arange(64, dtype=torch.int32).reshape(32, 2) * 65537
    matrices = inputs.T.contiguous().view(torch.int16).reshape(2, 8, 8)
    matrices = matrices.transpose(1, 2).contiguous() if transposed else matrices
    assert torch.equal(run(body, inputs, shared=256), matrices.view(torch.int32).reshape(2, 32).T)


def test_launches_that_cannot_be():
    ptx = compiled_row_sums().asm["ptx"]
    with pytest.raises(PtxError, match="no entry other, only: row_sums"):
        Kernel(ptx, "other")
    with pytest.raises(PtxError, match="arguments for"):
        Kernel(ptx, "row_sums").launch((1,), THREADS, [0] * 9)
    with pytest.raises(PtxError, match="whole number of warps"):
        Kernel(ptx).launch((1,), 33, [])
    Kernel(ptx).launch((0,), THREADS, [])
    product = compiled_product(90)
    with pytest.raises(PtxError, match="no whole number of warpgroups"):
        Kernel(product.asm["ptx"]).launch((1,), 64, [0] * 5, shared=product.metadata.shared)


def test_unknown_opcode_is_named():
    with pytest.raises(PtxError, match="opcode not modelled: frobnicate.sync %r0"):
        run_word("frobnicate.sync %r0;", torch.zeros(32, 1))
