"""What to draw from a model's distribution, under vLLM's names, and the numbers that a seed draws."""
from dataclasses import dataclass, fields

from fastgpt.config import check_int, check_number

GREEDY_BELOW = 1e-5  # logits over a smaller temperature may overflow
MAX_LOGPROBS = 1000
LARGEST = 1e30  # of a number that the kernels take in float32
_MASK64 = 2 ** 64 - 1


@dataclass
class SamplingParams:
    """What to draw from the model's distribution, and when to stop. Wrong values raise an error that names the field.

    max_tokens: new tokens at most. n: sequences per prompt.
    temperature: divides the logits; 0 (or below 1e-5) takes the likeliest token.
    top_k: only the k likeliest tokens; None, 0 or -1 for all.
    top_p: only the fewest likeliest tokens that together have this probability.
    min_p: only tokens at least this likely relative to the likeliest.
    repetition_penalty: divides the positive and multiplies the negative logits of tokens that the sequence holds
    already (Keskar et al. 2019, arXiv:1909.05858).
    presence_penalty, frequency_penalty: taken off the logits of tokens that the sequence has got so far, the latter as
    often as it has got them. logit_bias: {token id: what is added to its logit}.
    logprobs: how many of the likeliest tokens are reported with their log probabilities, beside the chosen one.
    seed: an int in [0, 2**63), a list with one for each prompt, or None. GPT.generate then asks torch's generator: on the CPU
    for the tokens, as in nanoGPT, on a GPU, where that would hold up every step, for a seed for each prompt. `fastgpt.LLM`
    takes a seed from Python's `random`.
    stop: a string or several that end a sequence once its new text holds one; stop_token_ids: ids that do. The
    sequence keeps what ended it. ignore_eos: the tokenizer's end-of-text token does not end it.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict | None = None
    logprobs: int | None = None
    n: int = 1
    seed: int | list | None = None
    stop: str | list | None = None
    stop_token_ids: list | None = None
    ignore_eos: bool = False

    @classmethod
    def from_arguments(cls, max_new_tokens=None, **given):
        """From a call's arguments: nanoGPT's name for max_tokens is good too, and errors name what the caller wrote."""
        names = [f.name for f in fields(cls)]
        for name in given:
            if name not in names:
                raise TypeError(f"generate: no argument {name!r}; the sampling arguments are {', '.join(names)}")
        if (max_new_tokens is None) == ("max_tokens" not in given):
            raise TypeError("generate: give max_new_tokens, the number of tokens to generate at most")
        if max_new_tokens is not None:
            given["max_tokens"] = check_int("max_new_tokens", max_new_tokens, 0)
        return cls(**given)

    def __post_init__(self):
        self.max_tokens = check_int("max_tokens", self.max_tokens, 0)
        self.n = check_int("n", self.n, 1)
        self.top_k = None if self.top_k in (None, 0, -1) else min(check_int("top_k", self.top_k, 1), 2 ** 31 - 1)
        check_number("temperature", self.temperature, lambda t: 0 <= t <= LARGEST, f"from 0 to {LARGEST:g}")
        if self.temperature < GREEDY_BELOW:
            self.temperature = 0.0
        check_number("top_p", self.top_p, lambda p: 0 < p <= 1, "in (0, 1]")
        check_number("min_p", self.min_p, lambda p: 0 <= p <= 1, "in [0, 1]")
        check_number("repetition_penalty", self.repetition_penalty, lambda r: 1 / LARGEST <= r <= LARGEST,
                     f"above 0 and at most {LARGEST:g}")
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name), lambda p: abs(p) <= LARGEST, f"at most {LARGEST:g} in size")
        if self.logprobs is not None:
            self.logprobs = check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_bias()
        if self.seed is not None:
            several = isinstance(self.seed, (list, tuple))
            seeds = [check_int("seed", seed, 0, 2 ** 63 - 1) for seed in (self.seed if several else [self.seed])]
            self.seed = seeds if several else seeds[0]
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a non-empty string or a list of them, got {self.stop!r}")
        self.stop_token_ids = [check_int("stop_token_ids", i, 0) for i in self.stop_token_ids or ()]

    def _check_bias(self):
        if not isinstance(self.logit_bias, (dict, type(None))):
            raise TypeError(f"logit_bias must be a dict from token ids to numbers, got {self.logit_bias!r}")
        biases = {check_int("logit_bias's id", i, 0): bias for i, bias in (self.logit_bias or {}).items()}
        for bias in biases.values():
            check_number("logit_bias", bias, lambda b: abs(b) <= LARGEST, f"at most {LARGEST:g} in size")
        self.logit_bias = biases

    @property
    def penalises(self):
        """Whether the tokens of the sequence change its logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def seeds(self, prompts):
        """The seed of each of so many prompts; None without one."""
        if not isinstance(self.seed, list):
            return [self.seed] * prompts
        if len(self.seed) != prompts:
            raise ValueError(f"seed must be one int or one for each of the {prompts} prompts, got {len(self.seed)}")
        return self.seed


def uniform(seed, sample, position):
    """A number in [0, 1) with 52 random bits: a pure function of the request's seed, which of its n samples, and the
    position of the token in the sequence. The mixing is SplitMix64's (Steele et al. 2014)."""
    state = 0
    for word in (seed, sample, position):
        state = _mix64((state ^ word) + 0x9E3779B97F4A7C15)
    return (state >> 12) * 2.0 ** -52


def _mix64(x):
    x &= _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)

