"""The model trains through the Triton kernels: interpreted, step for step as on the reference."""
import copy

import pytest

pytest.importorskip("triton")

import torch
from executors import Interpreter, running

from fastgpt import GPT, GPTConfig, ops

STEPS = 20
CONFIG = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.1, embd_dropout=0.0, bias=True)


def losses(model, dtype, steps=STEPS):
    """Of each step on one batch. By SGD: Adam's first steps make the sign of a gradient of what rounding left of a 0."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found, idx = [], torch.randint(65, (2, 17))
    for _ in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(idx[:, :-1], idx[:, 1:].contiguous(), return_logits=False)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def test_twenty_steps_lose_what_the_reference_loses():
    """Within twice what float32's rounding makes of the reference, which float64 shows, and a unit of the last place."""
    torch.manual_seed(0)
    models = [GPT(CONFIG)]
    models += [copy.deepcopy(models[0]), copy.deepcopy(models[0]).double()]
    with running(Interpreter()):
        ours = losses(models[0], torch.float32)
    with ops.backend("reference"):
        reference, truth = losses(models[1], torch.float32), losses(models[2], torch.float32)
    error, allowed = (ours - truth).abs(), (reference - truth).abs()
    assert error.max() <= 2 * allowed.max() + torch.finfo(torch.float32).eps * truth.max()
    assert ours[-1] < 0.8 * ours[0]


def test_bfloat16_by_autocast_learns():
    torch.manual_seed(0)
    with running(Interpreter()):
        found = losses(GPT(CONFIG), torch.bfloat16, steps=8)
    assert found.isfinite().all() and found[-1] < 0.95 * found[0]
