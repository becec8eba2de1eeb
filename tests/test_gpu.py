"""The model on a GPU: pytest -m gpu. The ops' own tests run there too, as does tests/gpusim/test_gpu_benchmarks.py."""
import pytest
import torch

from fastgpt import GPT, GPTConfig, ops

pytestmark = pytest.mark.gpu
CONFIG = GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=2, n_embd=64, dropout=0.1, bias=True)


def make(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(CONFIG), **changes})).cuda()


def train(model, dtype, steps=5):
    """Losses by AdamW on one batch, under autocast, with a gradient scaler for float16."""
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    idx, losses = torch.randint(65, (4, 65), device="cuda"), []
    for _ in range(steps):
        with torch.autocast("cuda", dtype):
            loss = model(idx[:, :-1], idx[:, 1:].contiguous(), return_logits=False)[1]
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training(dtype, checkpointing):
    model = make()
    model.config.gradient_checkpointing = checkpointing
    assert ops.resolve("attention", device="cuda")[0] == "triton"
    losses = train(model, dtype)
    assert losses[-1] < losses[0]


def test_training_compiled():
    losses = train(torch.compile(make(dropout=0.0)), torch.bfloat16)
    assert losses[-1] < losses[0]


def test_generation_is_that_of_the_reference():
    model = make(dropout=0.0).eval()
    idx = torch.randint(65, (2, 7), device="cuda")
    ours = model.generate(idx, 20, temperature=0)
    with ops.backend("reference"):
        assert torch.equal(ours, model.generate(idx, 20, temperature=0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_second_device():
    x, weight = torch.randn(5, 64, device="cuda:1"), torch.randn(64, device="cuda:1")
    assert ops.layer_norm(x, weight).device == x.device
