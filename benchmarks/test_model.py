"""The model's forward, training step and generation, beside nanoGPT's and transformers': one small size and weights."""
import pytest
import torch

from benchmarks import training
from benchmarks.contestants import check_tokens
from benchmarks.generation import random_prompts
from benchmarks.peers import ENGINES
from fastgpt import GPT

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=3)
CONFIG = training.MODELS["small"]
BATCH, LENGTH = 4, 128


@pytest.mark.parametrize("variant", training.KINDS)
def test_forward(benchmark, threads, variant):
    benchmark.group = "forward"
    model, _ = training.build(variant, CONFIG)
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = training.build("nanogpt", CONFIG)[0](tokens, tokens)
        torch.testing.assert_close(model(tokens, tokens), expected)
        benchmark(model, tokens, tokens)


# bfloat16 for ours alone: PyTorch's takes seconds a step where the processor has no such instructions.
STEPS = [*((kind, "float32") for kind in training.KINDS), ("fastgpt", "bfloat16")]


@pytest.mark.parametrize(("variant", "dtype"), STEPS)
def test_training_step(benchmark, threads, variant, dtype):
    benchmark.group = "training step"
    expected = training.stepper(*training.build("nanogpt", CONFIG), "float32", BATCH, LENGTH)()["loss"]
    step = training.stepper(*training.build(variant, CONFIG), dtype, BATCH, LENGTH)
    assert step()["loss"] == pytest.approx(expected, rel=training.LOSS_TOLERANCE[dtype])
    benchmark(step)


@pytest.mark.parametrize("engine", ["fastgpt", "transformers"])
def test_generation(benchmark, threads, engine, tmp_path):
    benchmark.group = "generation"
    model = GPT(CONFIG).eval()
    model.save_pretrained(tmp_path)
    prompts = random_prompts(CONFIG.vocab_size, 2, 16, 0)
    loaded = ENGINES[engine].adapter().Engine(tmp_path, None, "float32", threads)
    check_tokens(model, prompts, loaded.generate(prompts, 16)[0])
    benchmark(loaded.generate, prompts, 16)
