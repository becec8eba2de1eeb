"""The settings of a training run, one dataclass: `fastgpt train` makes its flags from it."""
from dataclasses import dataclass, field, fields


def setting(default, text, **more):
    """A field with a help text; choices, or a test and what it expects, are checked when the config is made."""
    return field(default=default, metadata={"help": text, **more})


def positive(default, text):
    return setting(default, text, test=lambda v: v > 0, expected="greater than 0")


def non_negative(default, text):
    return setting(default, text, test=lambda v: v >= 0, expected="0 or more")


def share(default, text):
    return setting(default, text, test=lambda v: 0 <= v < 1, expected="in [0, 1)")


@dataclass
class TrainConfig:
    """How to train. Wrong values raise a ValueError or TypeError that names the field."""

    out: str = setting("out", "folder for checkpoints (last, best), log.jsonl and loss.png")
    steps: int = positive(2000, "optimizer steps in all")
    batch: int = positive(32, "windows in a forward pass")
    accumulate: int = positive(1, "forward passes in a step, their gradients averaged")
    context: int = non_negative(0, "tokens in a window; 0: the model's block size")
    lr: float = positive(1e-3, "highest learning rate; with --init 0.0001 unless given")
    final_lr: float = setting(0.1, "learning rate at the end, as a share of lr", test=lambda v: 0 <= v <= 1,
                              expected="in [0, 1]")
    warmup: int = non_negative(100, "steps of linear warmup, at most a tenth of all; a cosine follows")
    weight_decay: float = non_negative(0.1, "AdamW's decay of matrices and embeddings; vectors have none")
    beta1: float = share(0.9, "AdamW's memory of gradients")
    beta2: float = share(0.99, "AdamW's memory of their squares")
    clip: float = non_negative(1.0, "largest norm of the gradients; 0: any")
    ema: float = share(0.0, "decay of an average of the weights, to be validated and kept as best in their place; 0: none")
    dtype: str = setting("auto", "float32, bfloat16 (autocast), or auto: bfloat16 where the hardware multiplies it",
                         choices=("auto", "float32", "bfloat16"))
    eval_every: int = positive(250, "steps between validations, each with a checkpoint")
    eval_tokens: int = positive(65536, "validation tokens looked at each time, evenly spread")
    patience: int = non_negative(0, "stop after so many validations without a better loss; 0: never")
    sample: int = non_negative(0, "tokens of sample text to print at each validation")
    prompt: str = setting("\n", "what the samples continue")
    seed: int = setting(1337, "decides the initial weights, the order of the text and the dropout",
                        test=lambda v: 0 <= v < 2 ** 32, expected="in [0, 2**32)")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is float and type(value) is int:
                value = float(value)
                setattr(self, f.name, value)
            if type(value) is not f.type:
                raise TypeError(f"{f.name} must be of type {f.type.__name__}, got {value!r}")
            self._check(f, value)

    @staticmethod
    def _check(f, value):
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
        if "test" in f.metadata and not f.metadata["test"](value):
            raise ValueError(f"{f.name} must be {f.metadata['expected']}, got {value}")
