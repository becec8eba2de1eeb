"""Runs a few PTX instructions between the loads of their operands and the store of their result."""
import torch
from ptx_machine import Kernel

TEMPLATE = """
.version 8.4
.target sm_90a
.extern .shared .align 128 .b8 dynamic[];
.visible .entry snippet(.param .u64 inputs, .param .u64 result)
{
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<32>;
    .reg .b64 %d<16>;
    .reg .b32 %tid;
    .reg .b32 %thread;
    mov.u32 %tid, %tid.x;
    mad.lo.u32 %thread, %ctaid.x, %ntid.x, %tid;
    ld.param.u64 %d14, [inputs];
    ld.param.u64 %d15, [result];
    mad.wide.u32 %d14, %thread, 32, %d14;
    mad.wide.u32 %d15, %thread, 8, %d15;
    ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d14];
    ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d14+16];
    mov.b64 %d0, {%r0, %r1};
    mov.b64 %d1, {%r2, %r3};
    mov.b64 %d2, {%r4, %r5};
    mov.b64 %d7, 0;
    BODY
    st.global.b64 [%d15], %d7;
    ret;
}
"""


def run(body, inputs, blocks=1, shared=0, races=True):
    """The result %d7 of each thread as two int32, (threads, 2).

    inputs: int32 or float32 (threads of all blocks, up to 8): the registers %r0 to %r7, of which %d0 to %d2 are pairs.
    """
    threads = inputs.shape[0]
    words = torch.zeros(threads, 8, dtype=torch.int32)
    words[:, :inputs.shape[1]] = inputs.view(torch.int32)
    result = torch.zeros(threads, 2, dtype=torch.int32)
    kernel = Kernel(TEMPLATE.replace("BODY", body))
    kernel.launch((blocks,), threads // blocks, [words, result], shared=shared, races=races)
    return result


def run_word(body, inputs, **options):
    """Like `run`, of a body whose result is the 32 bits of %r31."""
    return run(body + " mov.b64 %d7, {%r31, %r31};", inputs, **options)[:, 0].contiguous()
