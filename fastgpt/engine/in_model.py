"""`GPT.generate` on the decode engine: a model in memory gets an engine of its own, for as long as its weights stay as
they were packed."""
import threading
import weakref

import torch

from fastgpt import ops, torch_sampling
from fastgpt.engine.llm import LLM
from fastgpt.engine.sequence import Ending, Request
from fastgpt.extension import _C, MISSING

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_engines = weakref.WeakKeyDictionary()  # model -> (what its weights were, its engine)
_dtypes = weakref.WeakKeyDictionary()  # model -> the dtype of its engine's weights, where it is not the model's
_lock = threading.Lock()


def use_dtype(model, dtype):
    """From now on `model.generate` multiplies by weights of `dtype`, as `fastgpt.LLM` names them."""
    refusal = why_not(model)
    if refusal:
        raise ValueError(f"dtype {dtype} needs the decode engine, which can't take this model: {refusal}")
    _dtypes[model] = dtype


def why_not(model, prompts=(), params=None):
    """Why the engine can't generate with this model, or these prompts, or None."""
    from fastgpt.model import GPT
    if MISSING:
        return MISSING
    weight = model.lm_head.weight
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1 or weight.dtype not in DTYPES:
        return f"its weights are {', '.join(sorted(map(str, dtypes)))}; it takes float32 or bfloat16"
    if ops.resolve("linear", weight)[0] != "cpp":
        return f"the model's ops run on {ops.resolve('linear', weight)[0]}"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast is on"
    if model.training and max(model.config.rate(name) for name in ("embd", "attn", "resid")) > 0:
        return "the model is in training mode, with dropout"
    if type(model) is not GPT or _is_altered(model):
        return "the model is not a plain fastgpt.GPT: modules were replaced, or have hooks"
    longest = max((len(prompt) for prompt in prompts), default=0) + (params.max_tokens if params else 0)
    if longest > model.config.block_size + 1:
        return "the text will be longer than the context, which then slides"
    return None


def _is_altered(model):
    from fastgpt.engine.weights import shapes
    names = {name for name, _ in model.named_parameters()} - {"lm_head.weight"}
    expected = shapes(model.config).keys() - {"lm_head.weight"}
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    known = ("fastgpt.model", "torch.nn.modules.")
    return (names - {"transformer.wte.weight"} != expected - {"transformer.wte.weight"}
            or any(getattr(m, hook) for m in model.modules() for hook in hooks)
            or any("forward" in vars(m) or not type(m).__module__.startswith(known) for m in model.modules()))


def generate(model, prompts, params, seeds, known, tokenizer):
    """Yields (row, new token): row counts the prompts' samples. known: how many ids may be drawn, None for all."""
    engine = _engine_of(model)
    requests = [Request(i, prompt.tolist(), params, None if seeds is None else seeds[i], model.config.block_size + 1)
                for i, prompt in enumerate(prompts)]
    with engine.turn(known, torch_draws=seeds is None and params.temperature > 0):
        engine.make_room(requests)
        for sequence, token in engine.run(requests, Ending(params, tokenizer)):
            yield sequence.request.order * params.n + sequence.sample, token


class _Engine(LLM):
    """One generation at a time; without a seed it draws from torch's generator, the numbers that nanoGPT would draw."""

    def __init__(self, model, dtype):
        super().__init__(model, dtype, kv_cache_tokens=model.config.block_size)
        self._turn = threading.RLock()
        self._known, self._torch_draws = None, False

    def turn(self, known, torch_draws):
        self._turn.acquire()
        self._known, self._torch_draws = known, torch_draws
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._turn.release()

    def make_room(self, requests):
        """A KV cache in which all requests fit at once."""
        pages = self._reservations.pages
        needed = sum(request.most_pages(pages) for request in requests)
        if needed > pages.num_pages and pages.free_pages == pages.num_pages:
            self._make_cache(needed * pages.page_size)

    def run(self, requests, ending):
        return self._run(requests, dict.fromkeys(requests, ending))

    def _known_ids(self):
        return self.config.vocab_size if self._known is None else min(self._known, self.config.vocab_size)

    def _choose(self, ready, logits):
        if not self._torch_draws:
            return super()._choose(ready, logits)
        rows, params = torch.from_numpy(logits[:, :self._known_ids()]), ready[0].request.params
        counts = _counts(ready, rows.shape[1]) if params.penalises else None
        return torch_sampling.choose(rows, params, counts).tolist()


def _counts(sequences, V):
    """How often each sequence has got each id, -1 for those of its prompt alone: (R, V)."""
    counts = torch.zeros(len(sequences), V, dtype=torch.int32)
    for row, sequence in zip(counts, sequences):
        prompt = torch.tensor(sequence.request.prompt)
        row[prompt[prompt < V]] = -1
        new = torch.bincount(torch.tensor(sequence.new_ids, dtype=torch.int64), minlength=V)[:V]
        row[new > 0] = new[new > 0].int()
    return counts


def _engine_of(model):
    """The model's engine, made anew when a weight has changed since it was packed."""
    with _lock:
        dtype = _dtypes.get(model, DTYPES[model.lm_head.weight.dtype])
        state = dtype, _C.active_level(), [_fingerprint(p) for p in model.parameters()]
        before, engine = _engines.get(model, (None, None))
        if before != state:
            engine = _Engine(model, dtype)
            _engines[model] = state, engine
        return engine


def _fingerprint(parameter):
    """A tensor's shape, dtype and a hash of its bits: 25 ms for GPT-2 124M, whatever way its weights were changed."""
    dense = parameter.detach().contiguous()
    return parameter.shape, parameter.dtype, _C.fingerprint(dense.data_ptr(), dense.nbytes)
