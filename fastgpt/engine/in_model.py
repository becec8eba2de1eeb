"""`GPT.generate` on the decode engine: a model in memory gets an engine of its own, on the CPU for as long as its weights
stay as they were packed, on a GPU for as long as its parameters stay where they are, since the engine reads them there."""
import contextlib
import threading
import weakref

import torch

from fastgpt import cuda, ops, torch_sampling
from fastgpt.engine.llm import LLM, STEP_TOKENS
from fastgpt.engine.sequence import Ending, Request
from fastgpt.engine.weights import shapes
from fastgpt.extension import _C, MISSING
from fastgpt.model import GPT

# Of a model's weights, by the kind of device: what the engine takes there.
DTYPES = {"cpu": {torch.float32: "float32", torch.bfloat16: "bfloat16"},
          "cuda": {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}}
KERNELS = {"cpu": "cpp", "cuda": "triton"}  # what the model's ops run on there
_engines = weakref.WeakKeyDictionary()  # model -> (what its weights were, its engine)
_dtypes = weakref.WeakKeyDictionary()  # model -> the dtype of its engine's weights, where it is not the model's
_lock = threading.Lock()


def use_dtype(model, dtype):
    """From now on `model.generate` multiplies by weights of `dtype`, as `fastgpt.LLM` names them."""
    refusal = why_not(model)
    if refusal:
        raise ValueError(f"dtype {dtype} needs the decode engine, which can't take this model: {refusal}")
    if device_of(model) != "cpu":
        raise ValueError(f"dtype {dtype} is for models on the CPU; on a GPU fastgpt.LLM(model, {dtype!r}, device=\"cuda\") has it")
    _dtypes[model] = dtype


def why_not(model, prompts=(), params=None):
    """Why the engine can't generate with this model, or these prompts, or None."""
    if MISSING:
        return MISSING
    if _is_altered(model):
        return "the model is not a plain fastgpt.GPT of its config: modules, sizes or switches differ, or there are hooks"
    weight, device = model.lm_head.weight, device_of(model)
    kind = None if device is None else device.partition(":")[0]
    if kind not in DTYPES:
        return "its weights are not all on the CPU or on one GPU"
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1 or weight.dtype not in DTYPES[kind]:
        return f"its weights are {', '.join(sorted(map(str, dtypes)))}; it takes {', '.join(DTYPES[kind].values())}"
    if ops.resolve("linear", weight)[0] != KERNELS[kind]:
        return f"the model's ops run on {ops.resolve('linear', weight)[0]}"
    if kind == "cuda":
        if cuda.missing(weight.device.index):
            return cuda.missing(weight.device.index)
        from fastgpt.engine.gpu_backend import too_large
        if too_large(model.config):
            return too_large(model.config)
        if not all(p.is_contiguous() for p in model.parameters()):
            return "its weights are not contiguous"
    if torch.is_autocast_enabled(kind):
        return "autocast is on"
    if any(module.training and getattr(module, name, 0.0) > 0 for module in model.modules() for name in ("p", "dropout")
           if isinstance(getattr(module, name, 0.0), float)):
        return "the model is in training mode, with dropout"
    longest = max((len(prompt) for prompt in prompts), default=0) + (params.max_tokens if params else 0)
    if longest > model.config.block_size + 1:
        return "the text will be longer than the context, which then slides"
    _, engine = _engines.get(model, (None, None))
    if engine is not None and engine.owner == threading.get_ident():
        return "a generation of this model is under way in this thread: its streamer is asking"
    return None


def device_of(model):
    """Where all of a model's parameters are, as text, or None."""
    devices = {str(p.device) for p in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def _is_altered(model):
    """Whether the model computes anything but what its config says, by parameters of the config's shapes."""
    config = model.config
    if type(model) is not GPT or any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)
                                     or not type(m).__module__.startswith(("fastgpt.model", "torch.nn.modules."))
                                     for m in model.modules()):
        return True
    found = {name: tuple(p.shape) for name, p in model.state_dict(keep_vars=True).items()}
    tied = model.lm_head.weight is model.transformer.wte.weight
    if config.tie_word_embeddings and tied:
        del found["lm_head.weight"]
    if tied != config.tie_word_embeddings or found != shapes(config):
        return True
    norms = [model.transformer.ln_f, *(norm for block in model.transformer.h for norm in (block.ln_1, block.ln_2))]
    return (any(norm.eps != config.layer_norm_epsilon for norm in norms)
            or any(block.mlp.c_fc.activation != config.activation or block.mlp.c_proj.activation is not None
                   or block.attn.n_head != config.n_head or block.attn.scale != config.attention_scale(layer)
                   for layer, block in enumerate(model.transformer.h)))


def generate(model, prompts, params, seeds, known, tokenizer):
    """Yields (row, new token): row counts the prompts' samples. known: how many ids may be drawn, None for all."""
    engine = _engine_of(model)
    torch_draws = seeds is None and params.temperature > 0
    if torch_draws and engine.on_gpu:
        # Torch's sampler waits for the device at each step; its generator has its say once, for the whole call.
        seeds, torch_draws = torch.randint(2 ** 63 - 1, (len(prompts),), device="cpu").tolist(), False
    requests = [Request(i, prompt.tolist(), params, 0 if seeds is None else seeds[i], model.config)
                for i, prompt in enumerate(prompts)]
    with engine.turn(known, torch_draws):
        engine.make_room(requests)
        for sequence, token in engine.run(requests, Ending(params, tokenizer)):
            yield sequence.request.order * params.n + sequence.sample, token


class _Engine(LLM):
    """One generation at a time. Without a seed it draws from torch's generator on the CPU, as nanoGPT does."""

    _shares_weights = True

    def __init__(self, model, dtype):
        device = device_of(model)
        super().__init__(model, dtype, kv_cache_tokens=model.config.block_size, device=device, warm_up=0)
        self.on_gpu = device != "cpu"
        self._turn, self.owner = threading.Lock(), None
        self._known, self._torch_draws = None, False

    @contextlib.contextmanager
    def turn(self, known, torch_draws):
        with self._turn:
            self.owner, self._known, self._torch_draws = threading.get_ident(), known, torch_draws
            try:
                yield
            finally:
                self.owner = None

    def make_room(self, requests):
        """All requests fit at once, and their prompts into one step, so that their first tokens are drawn together."""
        self.max_step_tokens = max(STEP_TOKENS, sum(len(request.prompt) for request in requests))
        with self._lock:
            self._close_ended()  # they would keep the cache that they had
        pages = self._reservations.pages
        needed = sum(request.most_pages(pages) for request in requests)
        if needed > pages.num_pages and pages.free_pages == pages.num_pages:
            self._make_cache(needed * pages.page_size)

    def run(self, requests, ending):
        return self._run(requests, dict.fromkeys(requests, ending))

    def known_ids(self):
        return self.config.vocab_size if self._known is None else min(self._known, self.config.vocab_size)

    def choose(self, ready, logits):
        if not self._torch_draws:
            return super().choose(ready, logits)
        rows, params = torch.from_numpy(logits[:, :self.known_ids()]), ready[0].request.params
        return torch_sampling.choose(rows, params, _counts(ready, rows.shape[1]) if params.penalises else None).tolist()


def _counts(sequences, V):
    """How often each sequence has got each id, -1 for those of its prompt alone: (R, V)."""
    counts = torch.zeros(len(sequences), V, dtype=torch.int32, device="cpu")
    for row, sequence in zip(counts, sequences):
        prompt = torch.tensor(sequence.request.prompt, device="cpu")
        row[prompt[prompt < V]] = -1
        new = torch.bincount(torch.tensor(sequence.new_ids, dtype=torch.int64, device="cpu"), minlength=V)[:V]
        row[new > 0] = new[new > 0].int()
    return counts


def _engine_of(model):
    """The model's engine, made anew when a weight has changed since it was packed."""
    with _lock:
        device = device_of(model)
        dtype = _dtypes.get(model, DTYPES[device.partition(":")[0]][model.lm_head.weight.dtype])
        state = device, dtype, _C.active_level(), [_fingerprint(p) for p in model.parameters()]
        before, engine = _engines.get(model, (None, None))
        if before != state:
            _engines.pop(model, None)  # its memory comes free before the new one's is taken
            engine = None
            engine = _Engine(model, dtype)
            _engines[model] = state, engine
        return engine


def forget_moved(model):
    """Lets the model's engine go, and its memory, where the weights that it has are no longer the model's place or dtype."""
    with _lock:
        if model in _engines:
            device, *_, weights = _engines[model][0]
            if device != device_of(model) or device != "cpu" and weights != [_fingerprint(p) for p in model.parameters()]:
                del _engines[model]


def _fingerprint(parameter):
    """What says whether an engine is still that of this tensor: on a GPU where it is, since the engine reads it there; on the CPU
    its shape, dtype and a hash of its bits: 25 ms for GPT-2 124M, whatever way its weights were changed."""
    if parameter.is_cuda:
        return parameter.shape, parameter.dtype, parameter.data_ptr()
    dense = parameter.detach().contiguous()
    return parameter.shape, parameter.dtype, _C.fingerprint(dense.data_ptr(), dense.nbytes)
