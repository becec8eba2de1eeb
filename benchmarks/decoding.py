"""What the decode benchmark runs, what each token costs at least, and the targets: tables and arithmetic alone.

A scenario's measure is the time of its own step: to the first token of `prefill`, of each later token elsewhere.
"""
from dataclasses import dataclass

from fastgpt import GPTConfig

# Larger initial weights than GPT-2's 0.02, with which a random model repeats its last token whatever came before: here
# the likeliest token depends on the whole context, so that an engine which computes another model is found out. The
# tanh GELU is GPT-2's own, and the only one that every rival has.
RANDOM = {"activation": "gelu_tanh", "initializer_range": 0.06}
MODELS = {
    "gpt2": GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, **RANDOM),
    "small": GPTConfig(block_size=512, vocab_size=33, n_layer=4, n_head=8, n_embd=512, **RANDOM),
    "tiny": GPTConfig(block_size=64, vocab_size=101, n_layer=2, n_head=2, n_embd=64, **RANDOM),
}


@dataclass(frozen=True)
class Scenario:
    model: str
    batch: int
    prompt: int  # tokens
    new: int

    @property
    def measure(self):
        return "first_seconds" if self.new == 1 else "token_seconds"

    def label(self):
        return f"{self.batch} x {self.prompt} + {self.new}"


SCENARIOS = {
    "decode": Scenario("gpt2", 1, 32, 128),
    "batch": Scenario("gpt2", 16, 128, 64),
    "many": Scenario("gpt2", 64, 128, 64),
    "prefill": Scenario("gpt2", 1, 512, 1),
    "long": Scenario("gpt2", 1, 900, 100),
    "small": Scenario("small", 1, 32, 128),
    "tiny": Scenario("tiny", 2, 5, 4),  # for the tests
}

WEIGHT_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}

# (scenario, whether on one thread) -> dtype -> how many times as fast as the best rival of that dtype ours should be.
BEST_RIVAL = {
    ("decode", False): {"float32": 1.0, "bfloat16": 1.1, "int8": 1.3, "int4": 1.4},
    ("decode", True): {"float32": 1.25, "bfloat16": 1.4, "int8": 1.8, "int4": 2.2},
    ("batch", False): {"float32": 1.3, "bfloat16": 1.5, "int8": 2.0, "int4": 1.7},
    ("prefill", False): {"float32": 1.1, "bfloat16": 1.1, "int8": 1.6, "int4": 1.3},
    ("long", False): {"float32": 1.1, "bfloat16": 1.15, "int8": 1.5, "int4": 1.5},
    ("small", False): {"int8": 1.7},
}
# The same against what most people run, in `decode` on all threads.
BASELINE = "transformers float32"
OVER_BASELINE = {"float32": 2.8, "int8": 8.0}
# Of the read bandwidth of the same rounds, in `decode`.
SHARES = {"float32": 0.95, "bfloat16": 0.92, "int8": 0.88, "int4": 0.8}


def targets(scenario, dtype, threads):
    """What ours should reach: "best rival" and the baseline in times as fast, "share" of the read bandwidth."""
    found = {"best rival": BEST_RIVAL.get((scenario, threads == 1), {}).get(dtype)}
    if scenario == "decode":
        found["share"] = SHARES[dtype]
        found[BASELINE] = OVER_BASELINE.get(dtype) if threads > 1 else None
    return {name: target for name, target in found.items() if target}


def verdicts(wanted, found):
    """name -> "met", "missed" or, where nothing was measured, "unknown". found: name -> a spread or None."""
    return {name: "unknown" if not found.get(name) else "met" if found[name]["median"] >= target else "missed"
            for name, target in wanted.items()}


def matrices(config):
    """(weights of all the layers' matrices, of the head's)."""
    C = config.n_embd
    return config.n_layer * (4 * C * C + 2 * C * config.inner_width), config.vocab_size * C


def matrix_bytes(config, dtype):
    """What a step reads at least, without the scales of int8 and int4."""
    return sum(matrices(config)) * WEIGHT_BITS[dtype] // 8


def cost(config, scenario, dtype, weight_bytes):
    """The least that a token takes: {"bytes", "flops"}. Of `prefill` a token of the prompt, elsewhere a new one.

    A step reads the matrices once for the whole batch, and each row's keys and values, of 4 bytes in float32 and 2 in
    the other dtypes; a prompt's logits are needed at its last token alone.
    """
    C, L = config.n_embd, config.n_layer
    body, head = matrices(config)
    if scenario.new == 1:
        T = scenario.prompt
        return {"bytes": weight_bytes / (T * scenario.batch), "flops": 2 * body + 2 * head / T + 2 * L * C * (T + 1)}
    context = scenario.prompt + scenario.new / 2  # the mean over the new tokens
    kept = 2 * L * C * context * (4 if dtype == "float32" else 2)
    return {"bytes": weight_bytes / scenario.batch + kept, "flops": 2 * (body + head) + 4 * L * C * context}
