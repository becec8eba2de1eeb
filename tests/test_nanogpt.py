"""nanoGPT's scripts on our model: the calls that its train.py, sample.py and bench.py make, in their order."""
import contextlib
import math

import pytest
import torch
from plain_gpt import PlainGPT
from torch.nn.parallel import DistributedDataParallel

from fastgpt import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL_ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "bias": False, "vocab_size": None,
              "dropout": 0.0}
VOCAB, BATCH, ACCUMULATION, LEARNING_RATE = 31, 4, 2, 1e-2


def get_batch(generator):
    """Bytes of a text that a small model learns at once: (x, y) int64, y one token ahead."""
    text = torch.arange(1000) * 7 % VOCAB
    at = torch.randint(len(text) - 12, (BATCH,), generator=generator)
    return torch.stack([text[i:i + 12] for i in at]), torch.stack([text[i + 1:i + 13] for i in at])


def plain_optimizer(model):
    """What nanoGPT makes on a CPU: AdamW in two groups, not fused."""
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))


def make(checkpoint=None, **changed):
    """train.py from "model init" to "optimizer"; with a checkpoint, as init_from = 'resume'."""
    args = {**MODEL_ARGS, "vocab_size": VOCAB, **changed}
    if checkpoint is not None:
        for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size"):
            args[key] = checkpoint["model_args"][key]
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**args))
    if checkpoint is not None:
        state = checkpoint["model"]
        for key in list(state):
            if key.startswith("_orig_mod."):
                state[key[len("_orig_mod."):]] = state.pop(key)
        model.load_state_dict(state)
    model.to("cpu")
    optimizer = model.configure_optimizers(0.1, LEARNING_RATE, (0.9, 0.95), "cpu")
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
    return model, optimizer, args


def train(model, optimizer, steps, seed=0):
    """train.py's loop -> the loss of each step."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    context = contextlib.nullcontext()
    generator = torch.Generator().manual_seed(seed)
    losses = []
    x, y = get_batch(generator)
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        for _ in range(ACCUMULATION):
            with context:
                _, loss = model(x, y)
                loss = loss / ACCUMULATION
            x, y = get_batch(generator)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() * ACCUMULATION)
    return losses


def save(path, model, optimizer, args):
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": 3,
                "best_val_loss": torch.tensor(1.0), "config": {"dataset": "char", "out_dir": "out"}}, path)


def test_train_learns_and_its_checkpoint_resumes_exactly(tmp_path):
    model, optimizer, args = make()
    start = train(model, optimizer, 15)
    save(tmp_path / "ckpt.pt", model, optimizer, args)
    expected = train(model, optimizer, 5, seed=1)
    assert abs(start[0] - math.log(VOCAB)) < 0.1 and expected[-1] < 0.7 * start[0]
    model, optimizer, _ = make(torch.load(tmp_path / "ckpt.pt", map_location="cpu"))
    assert train(model, optimizer, 5, seed=1) == expected


def test_the_losses_are_nanogpts():
    model, optimizer, args = make(bias=True)
    torch.manual_seed(1337)
    plain = PlainGPT(GPTConfig(**args))
    torch.testing.assert_close(train(model, optimizer, 15), train(plain, plain_optimizer(plain), 15), rtol=1e-4, atol=0)


def test_nanogpts_checkpoint_with_its_optimizer_resumes(tmp_path):
    """A checkpoint of the plain model, compiled, whose AdamW is not fused."""
    _, _, args = make()
    plain = PlainGPT(GPTConfig(**args))
    optimizer = plain_optimizer(plain)
    train(plain, optimizer, 3)
    save(tmp_path / "ckpt.pt", plain, optimizer, args)
    checkpoint = torch.load(tmp_path / "ckpt.pt", map_location="cpu")
    checkpoint["model"] = {"_orig_mod." + name: tensor for name, tensor in checkpoint["model"].items()}
    model, ours, _ = make(checkpoint)
    torch.testing.assert_close(train(model, ours, 5, seed=1), train(plain, optimizer, 5, seed=1), rtol=1e-4, atol=0)


def test_estimate_loss_in_eval_mode_is_repeatable_under_dropout():
    model, _, _ = make(dropout=0.5)
    x, y = get_batch(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.eval()
        losses = {model(x, y)[1].item() for _ in range(3)}
        model.train()
        noisy = {model(x, y)[1].item() for _ in range(3)}
    assert len(losses) == 1 and len(noisy) == 3


def test_crop_block_size_before_training():
    model, optimizer, _ = make(block_size=40)
    model.crop_block_size(12)
    optimizer = model.configure_optimizers(0.1, LEARNING_RATE, (0.9, 0.95), "cpu")
    assert all(math.isfinite(loss) for loss in train(model, optimizer, 2))


def test_sample_resumes_and_continues_a_prompt(tmp_path):
    model, optimizer, args = make()
    train(model, optimizer, 2)
    save(tmp_path / "ckpt.pt", model, optimizer, args)
    checkpoint = torch.load(tmp_path / "ckpt.pt", map_location="cpu")
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    model.eval()
    model.to("cpu")
    x = torch.tensor([3, 1, 4], dtype=torch.long)[None, ...]
    with torch.no_grad():
        for _ in range(2):
            y = model.generate(x, 30, temperature=0.8, top_k=200)
            assert y.shape == (1, 33) and y[0, :3].tolist() == [3, 1, 4]


def test_bench_trains_on_fixed_data_and_estimates_mfu():
    model = GPT(GPTConfig(block_size=12, n_layer=1, n_head=1, n_embd=8, dropout=0, bias=False, vocab_size=64))
    optimizer = model.configure_optimizers(weight_decay=1e-2, learning_rate=1e-4, betas=(0.9, 0.95), device_type="cpu")
    x = y = torch.randint(64, (2, 12))
    for _ in range(2):
        _, loss = model(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    assert 0 < model.estimate_mfu(2 * 1 * 10, 0.5) < 1


def test_the_compiled_model_trains_samples_and_saves():
    """As `model = torch.compile(model)`, through which the scripts call generate and estimate_mfu too."""
    model, optimizer, _ = make(dropout=0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert all(math.isfinite(loss) for loss in train(compiled, optimizer, 2))
    assert compiled.generate(torch.tensor([[1]]), 3).shape == (1, 4)
    assert compiled.estimate_mfu(1, 1.0) > 0
    assert list(compiled.state_dict()) == ["_orig_mod." + name for name in model.state_dict()]


def test_the_model_in_a_ddp_container_trains_alike(tmp_path):
    model, optimizer, _ = make()
    expected = train(model, optimizer, 3)
    model, optimizer, _ = make()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert train(DistributedDataParallel(model), optimizer, 3) == expected
    finally:
        torch.distributed.destroy_process_group()
