"""One training variant in a process of its own: python -m benchmarks.training VARIANT DTYPE MODEL BATCH LENGTH THREADS

VARIANT: fastgpt, nanogpt, transformers, or one of these with +compile. Started by bench_train. Every variant begins
with the same weights and sees the same random tokens, so that their losses can be compared step by step.
"""
import contextlib
import sys

import torch

from benchmarks.peers import pytorch
from benchmarks.processes import Parent, memory_mb, reset_peak
from benchmarks.threads import use_threads
from fastgpt import GPT, GPTConfig
from fastgpt.allocator import keep_freed_memory

MODELS = {
    "gpt2": GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768),
    "small": GPTConfig(block_size=256, vocab_size=8192, n_layer=4, n_head=8, n_embd=256),
    "tiny": GPTConfig(block_size=64, vocab_size=101, n_layer=2, n_head=2, n_embd=32),
}
# How far the losses of the same step may lie apart, relatively: rounding in another order, which the steps carry on.
LOSS_TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-3}
LEARNING_RATE, WEIGHT_DECAY, BETAS = 3e-4, 0.1, (0.9, 0.95)


class FastGPT(GPT):
    """fastgpt.GPT under the peers' forward too: idx, targets -> loss."""

    def forward(self, idx, targets=None):
        logits, loss = super().forward(idx, targets, return_logits=False)
        return logits if targets is None else loss


KINDS = {"fastgpt": FastGPT, "nanogpt": pytorch.NanoGPT, "transformers": pytorch.Transformers}


def build(variant, config):
    """-> (model, optimizer), with weights that depend on the config alone."""
    kind, _, compiled = variant.partition("+")
    torch.manual_seed(0)
    reference = FastGPT(config)
    if kind == "fastgpt":
        keep_freed_memory()  # as `fastgpt train` does
        model = reference
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, "cpu")
    else:
        model = KINDS[kind](config)
        model.load_state_dict(reference.state_dict())
        optimizer = pytorch.adamw(model, LEARNING_RATE, WEIGHT_DECAY, BETAS)
    if compiled:
        model.compile()
    return model.train(), optimizer


def stepper(model, optimizer, dtype, batch, length):
    """A callable that trains on the next random tokens: -> {"loss": nats}."""
    generator = torch.Generator().manual_seed(1)
    vocab = model.transformer.wte.num_embeddings if hasattr(model, "transformer") else model.model.config.vocab_size
    autocast = (contextlib.nullcontext if dtype == "float32"
                else lambda: torch.autocast("cpu", dtype=getattr(torch, dtype)))

    def step():
        tokens = torch.randint(vocab, (batch, length + 1), generator=generator)
        with autocast():
            loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item()}

    return step


def main(variant, dtype, size, *numbers):
    parent = Parent()
    batch, length, threads = map(int, numbers)
    with use_threads(threads):
        base = memory_mb("VmRSS")  # PyTorch and the libraries alone
        try:
            model, optimizer = build(variant, MODELS[size])
            step = stepper(model, optimizer, dtype, batch, length)
            reset_peak()
            first = step()["loss"]  # allocates, and compiles
        except (RuntimeError, ImportError) as error:  # no compiler, or no transformers
            parent.refuse(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            return
        parent.serve(lambda: {**step(), "peak_mb": memory_mb()}, base_mb=base, first_loss=first)


if __name__ == "__main__":
    main(*sys.argv[1:])
