"""fastgpt on an NVIDIA GPU: is it right there, and how fast is it beside its rivals?

    pip install -e '.[gpu]' liger-kernel flash-attn transformers; python -m benchmarks.bench_gpu --save gpu

Its parts, each at GPT-2 124M's sizes, each after a check of the results in the same run:
    ops         every SPEC of the Triton kernels in bfloat16 against the reference in float64, by the tests' accuracy
                rule; PyTorch's own loss takes the logits in float32, as under autocast
    training    a training step
    kernels     the CUDA kernels of a decoding step: benchmarks/gpu_kernels.py
    generation  `fastgpt.LLM` beside transformers, torch.compile and vLLM: benchmarks/gpu_decoding.py
What is wrong, missing or without such an op is a row that says why; a part that breaks is one, and the next part goes on.
The last line is one JSON document.
"""
import argparse
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import gpu_decoding, gpu_kernels, results, timing, training
from benchmarks.accuracy import check_results
from benchmarks.cases import BOTH, FORWARD
from benchmarks.gpu_timing import (
    COLUMNS,
    COMPILED,
    DTYPE,
    FLASH,
    LIGER,
    OURS,
    PYTORCH,
    WARM_UPS,
    Contestant,
    CudaTimer,
    ceilings,
    compare,
    guarded,
    imported,
    print_row,
    row,
)
from benchmarks.machine import describe, one_line
from benchmarks.peers import GPU_DTYPES, GPU_RIVALS
from fastgpt import GPTConfig, kernels, ops, reference

LIGER_OPS = "liger_kernel.transformers.functional"
LARGEST = 1 << 30  # bytes of the largest float64 matrix that a check makes; it needs about 8 of them
ROWS = {"attention": ("q", "k", "v", "key_mask"), "cross_entropy": ("x", "targets")}  # what a check may cut
HEAD_SIZES, LONG = (64, 128), 4096
compiled = partial(torch.compile, dynamic=False)


@dataclass(frozen=True, eq=False)
class Case:
    spec: object
    inputs: dict  # the tensors that have gradients, by argument
    others: dict  # the other tensors

    def call(self, module, *tensors):
        """The op, of fastgpt.ops or fastgpt.reference."""
        return getattr(module, self.spec.op)(**dict(zip(self.inputs, tensors)), **self.others, **self.spec.options)

    def cut(self):
        """The case with fewer rows where the reference's matrix in float64 would be larger than LARGEST."""
        if self.spec.op not in ROWS:
            return self
        names, (first, second, *_) = ROWS[self.spec.op], self.inputs.values()
        rows = max(1, LARGEST // (8 * first[0, ..., 0].numel() * second.shape[-2]))  # q and k: H, T, S; x and weight: V
        inputs, others = ({n: t[:rows] if n in names else t for n, t in tensors.items()}
                          for tensors in (self.inputs, self.others))
        return Case(self.spec, inputs, others)

    def flops(self, what):
        """Of the matrix products; 0 where memory is what counts."""
        if self.spec.op == "cross_entropy":
            return 2 * self.inputs["x"].numel() * len(self.inputs["weight"]) * (3 if what == BOTH else 1)
        if "attention" not in self.spec.op:
            return 0
        q, k = self.inputs["q"], self.inputs["k"]
        if self.spec.op == "attention":
            heads, lengths = q.shape[0] * q.shape[1], [(q.shape[2], k.shape[2])]
        else:
            heads, lengths = q.shape[1], zip(*(starts.diff().tolist() for starts in self.others.values()))
        causal, window = self.spec.options.get("causal", True), self.spec.options.get("window")
        pairs = sum(int(reference.attention_mask(T, S, causal, window=window).sum()) for T, S in lengths)
        return int(4 * heads * q.shape[-1] * pairs * (3.5 if what == BOTH else 1))

    def bytes(self, what):
        """That must move at least: inputs are read once a pass, results (of the first input's size) written once."""
        inputs, others = ([t.nbytes for t in tensors.values()] for tensors in (self.inputs, self.others))
        once = sum(inputs + others) + inputs[0] * {"cross_entropy": 0, "add_layer_norm": 2}.get(self.spec.op, 1)
        return once if what == FORWARD else 2 * once + sum(inputs)


def cases(device="cuda", gpt2=True):
    """Each call of the kernels' SPECS once, and attention over LONG tokens; the tensors of one at a time."""
    from fastgpt.kernels.spec import Spec
    specs = [spec for module in kernels.MODULES for spec in getattr(module, "SPECS", ())]
    specs += [Spec(f"attention of {LONG}, D={D}", "attention", partial(_long_inputs, D)) for D in HEAD_SIZES]
    seen = set()
    for spec in specs:
        meta = spec.inputs(DTYPE, "meta", gpt2)
        call = spec.op, str(spec.options), str([(n, t.shape) for tensors in meta for n, t in tensors.items()])
        if call not in seen:
            seen.add(call)
            yield Case(spec, *spec.inputs(DTYPE, device, gpt2))


def _long_inputs(D, dtype, device, gpt2):
    """As GPT-2's: views of one tensor, 8192 tokens in all."""
    B, T, H = (8192 // LONG, LONG, 12) if gpt2 else (1, 20, 1)
    qkv = torch.randn(B, T, 3, H, D, dtype=dtype, device=device)
    return {name: x.transpose(1, 2) for name, x in zip("qkv", qkv.unbind(2))}, {}


class Step:
    """Calls a function of tensors once: -> its outputs and, of BOTH, the gradients of all tensors, as one tuple."""

    def __init__(self, function, tensors, what):
        self.function, self.what, self.gradients = function, what, None
        self.leaves = [t.detach().requires_grad_(what == BOTH) for t in tensors]

    def __call__(self):
        outputs = self.function(*self.leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if self.what == FORWARD:
            return outputs
        self.gradients = self.gradients or _gradients(outputs)
        return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, self.leaves, self.gradients)


def _gradients(outputs):
    """The same numbers for every contestant, laid out as its own outputs are; 1 for a loss, as in training."""
    generator = torch.Generator().manual_seed(1)
    numbers = (torch.randn(o.shape, generator=generator).to(DTYPE) if o.dim() else torch.ones(()) for o in outputs)
    return [torch.empty_like(o).copy_(values) for o, values in zip(outputs, numbers)]


# The rivals: (tensors with gradients, the op's other arguments) -> a function of those tensors alone, with all prepared
# that need not be done in each call. They raise timing.Failure where there is no such thing.

def _add_norm(make_norm):
    """A norm behind PyTorch's own dropout and add."""
    def make(inputs, dropout_p=0.0, seed=None):
        norm = make_norm(inputs)

        def function(x, residual, weight, bias):
            total = (F.dropout(x, dropout_p) if dropout_p else x) + residual
            return norm(total, weight, bias), total
        return function
    return make


def _sdpa(inputs, causal=True, scale=None, dropout_p=0.0, seed=None, key_mask=None, window=None):
    q, k = inputs["q"], inputs["k"]
    (H, T), (G, S) = q.shape[1:3], k.shape[1:3]
    masked = key_mask is not None or window is not None or causal and T != S
    mask = reference.attention_mask(T, S, causal, key_mask, q.device, window) if masked else None
    return partial(F.scaled_dot_product_attention, attn_mask=mask, dropout_p=dropout_p, scale=scale,
                   is_causal=causal and not masked, enable_gqa=H != G)


def _varlen(inputs, q_starts, k_starts):
    attend = imported("torch.nn.attention.varlen").varlen_attn
    max_q, max_k = (int(starts.diff().max()) for starts in (q_starts, k_starts))
    return partial(attend, cu_seq_q=q_starts, cu_seq_k=k_starts, max_q=max_q, max_k=max_k, window_size=(-1, 0),
                   enable_gqa=inputs["q"].shape[1] != inputs["k"].shape[1])


def _flash(inputs, causal=True, scale=None, dropout_p=0.0, seed=None, key_mask=None, window=None):
    if key_mask is not None:
        raise timing.Failure("flash-attn has no key masks")
    attend = partial(imported("flash_attn").flash_attn_func, dropout_p=dropout_p, softmax_scale=scale,
                     causal=causal, window_size=(-1, -1) if window is None else (window - 1, 0))
    return lambda *qkv: attend(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


def _flash_varlen(inputs, q_starts, k_starts):
    attend = imported("flash_attn").flash_attn_varlen_func
    max_q, max_k = (int(starts.diff().max()) for starts in (q_starts, k_starts))
    return partial(attend, cu_seqlens_q=q_starts, cu_seqlens_k=k_starts, max_seqlen_q=max_q, max_seqlen_k=max_k,
                   causal=True)


def _liger_norm(inputs):
    return partial(imported(LIGER_OPS).liger_layer_norm, eps=1e-5)


def _liger_loss(inputs, targets, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    return partial(imported(LIGER_OPS).liger_fused_linear_cross_entropy, target=targets, lse_square_scale=z_loss,
                   label_smoothing=label_smoothing, reduction=reduction)  # of x and weight


# Liger-Kernel has no GELU alone, only GEGLU. What PyTorch has under another name is the reference's.
RIVALS = {
    PYTORCH: {"attention": _sdpa, "packed_attention": _varlen,
              "add_layer_norm": _add_norm(lambda _: reference.layer_norm)},
    FLASH: {"attention": _flash, "packed_attention": _flash_varlen},
    LIGER: {"layer_norm": _liger_norm, "add_layer_norm": _add_norm(_liger_norm), "cross_entropy": _liger_loss},
}


def contestants(case):
    """-> (name -> function of the tensors that have gradients, name -> why there is none)."""
    functions, failures = {OURS: partial(case.call, ops), PYTORCH: partial(case.call, reference)}, {}
    for name, factories in ((name, found) for name, found in RIVALS.items() if case.spec.op in found):
        try:
            functions[name] = factories[case.spec.op](case.inputs, **case.others, **case.spec.options)
        except timing.Failure as failure:
            functions.pop(name, None)  # of PyTorch the reference's, which is not its own op
            failures[name] = str(failure)
    return functions, failures


def check(case):
    """Name -> why a contestant is wrong or missing. Ours is held to the accuracy rule, the others to half of the
    dtype's digits: they need only be the same function. With dropout their masks differ: nothing is compared."""
    case = case.cut()
    call, tensors = partial(case.call, reference), case.inputs.values()
    functions, failures = contestants(case)
    try:
        truth, pytorch = (guarded(Step(call, leaves, BOTH)) for leaves in ([t.double() for t in tensors], tensors))
    except timing.Failure as failure:
        return dict.fromkeys(functions, f"not checked: the reference has no results: {failure}")
    gradients = [f"gradient of {name}" for name in case.inputs]
    names = [f"output {i}" for i in range(len(truth) - len(gradients))] + gradients
    for name, function in functions.items():
        try:
            found = guarded(Step(function, tensors, BOTH))
            if name == OURS:
                check_results(names, found, truth, pytorch)
            elif not case.spec.options.get("dropout_p"):
                for result, theirs, true in zip(names, found, truth, strict=True):
                    error = float((theirs.double() - true).norm() / true.norm())
                    assert error <= torch.finfo(DTYPE).eps ** 0.5, f"{result}: norm-relative error {error:.3g}"
        except (timing.Failure, AssertionError) as error:
            failures[name] = str(error)
    return failures


def measure(case, timer, what=BOTH, *, failures=(), tops=(), compiler=compiled):
    """A row for each contestant of a case. failures: check's; tops: ceilings'."""
    functions, failures = contestants(case)[0], dict(failures)
    if PYTORCH in failures:
        failures[COMPILED] = failures[PYTORCH]
    else:
        functions[COMPILED] = compiler(functions[PYTORCH])
    result = compare([Contestant(name, Step(function, case.inputs.values(), what), timer)
                      for name, function in functions.items() if name not in failures], timer)
    failures.update(result.failures)
    known = {"spec": case.spec.name, "op": case.spec.op, "what": what, "dtype": "bfloat16",
             "shape": ", ".join("x".join(map(str, t.shape)) for t in case.inputs.values()),
             "flops": case.flops(what), "bytes": case.bytes(what)}
    return [row(known, name, result, failures.get(name), tops) for name in (OURS, PYTORCH, COMPILED, FLASH, LIGER)
            if name in functions or name in failures]


class Trainee(Contestant):
    """A variant of a training step of one model: random tokens, the same in every step."""

    def __init__(self, name, make, timer):
        super().__init__(name, None, timer)
        self.make, self.peak, self.losses = make, None, None

    def prepare(self):
        before = self.timer.allocated()
        self.run = guarded(self.make)
        self.losses = guarded(lambda: [float(self.run()) for _ in range(WARM_UPS)])
        self.peak = guarded(partial(self.timer.peak, self.run)) - before


def training_step(kind, backend, compiler, config, batch, device):
    """A callable that does one step under autocast and returns its loss. All kinds have the same weights and tokens."""
    model, optimizer = training.build(kind, config)
    model.to(device)
    forward = compiler(model) if compiler else model
    seeded = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (batch, config.block_size + 1), generator=seeded).to(device)

    def step():
        with ops.backend(backend), torch.autocast(tokens.device.type, dtype=DTYPE):
            loss = forward(tokens[:, :-1], tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return step


def train(timer, config, batch, device="cuda", compiler=compiled):
    """A row for each variant. "reference" is fastgpt's model on the plain ops, "nanogpt" has PyTorch's own attention.
    None has figures whose first losses are not those of the reference."""
    variants = {"reference": ("fastgpt", "reference", None), OURS: ("fastgpt", "triton", None),
                "reference, compiled": ("fastgpt", "reference", compiler), "nanogpt": ("nanogpt", "reference", None),
                "nanogpt, compiled": ("nanogpt", "reference", compiler)}
    entrants = [Trainee(name, partial(training_step, *kind, config, batch, device), timer)
                for name, kind in variants.items()]
    result = compare(entrants, timer)
    first = entrants[0].losses
    for entrant in entrants:
        if entrant.name not in result.failures and not _near(entrant.losses, first):
            reason = f"the first losses are {entrant.losses}, expected {first or 'those of the reference, without any'}"
            result.fail(entrant.name, timing.Failure(reason))
    return [_train_row(entrant, result, batch, config.block_size) for entrant in entrants]


def _near(losses, expected):
    tolerance = training.LOSS_TOLERANCE["bfloat16"]
    return bool(expected) and all(abs(loss - other) <= tolerance * other for loss, other in zip(losses, expected))


def _train_row(entrant, result, batch, length):
    seconds = result.timing(entrant.name)
    return {"spec": "training step", "what": f"{batch}x{length}", "contestant": entrant.name, "seconds": seconds,
            "tokens_per_second": seconds and timing.rate(seconds, batch * length),
            "peak_mb": seconds and entrant.peak / 1e6, "losses": entrant.losses,
            "ratio": None if entrant.name == OURS else result.ratio(OURS, entrant.name),
            "failure": result.failures.get(entrant.name)}


def op_rows(timer, tops, device="cuda", gpt2=True, compiler=compiled):
    for case in cases(device, gpt2):
        torch.compiler.reset()  # so that no shape is taken to vary
        failures = check(case)
        for what in (FORWARD, BOTH):
            yield from measure(case, timer, what, failures=failures, tops=tops, compiler=compiler)


def training_rows(timer, tops, device="cuda", gpt2=True, compiler=compiled):
    yield from train(timer, GPTConfig() if gpt2 else training.MODELS["tiny"], 8 if gpt2 else 1, device, compiler)


PARTS = {"ops": op_rows, "training": training_rows, "kernels": gpu_kernels.rows, "generation": gpu_decoding.rows}


def run(timer, parts, device="cuda", gpt2=True):
    """parts: name -> one of PARTS -> (the ceilings' rows, the parts')."""
    torch.manual_seed(0)
    tops, rows = ceilings(timer, device) if gpt2 else ceilings(timer, device, 1 << 10, 8), []
    for top in tops:
        print(f"{top['ceiling']}: {top['rate']['median']:.3g} {'FLOP' if top['ceiling'] == 'matmul' else 'bytes'}/s")
    print(COLUMNS.format("", "", "", "us", "ours is faster by", "share of its ceiling"))
    for name, part in parts.items():
        for found in _unbroken(name, part(timer, tops, device, gpt2)):
            print_row(found)
            rows.append(found)
    return tops, rows


def _unbroken(name, rows):
    """The rows, and where they break off one that says why."""
    try:
        while found := guarded(partial(next, rows, None)):
            yield found
    except timing.Failure as failure:
        yield {"spec": name, "what": "", "contestant": OURS, "seconds": None, "ratio": None, "failure": str(failure)}


def gpu():
    device = torch.cuda.get_device_properties(0)
    installed = {d.name.replace("_", "-"): d.version for d in importlib.metadata.distributions() if d.name}
    return {"gpu": device.name, "capability": f"{device.major}.{device.minor}", "cuda": torch.version.cuda,
            "processors": device.multi_processor_count, "memory_gb": round(device.total_memory / 2 ** 30, 1),
            "versions": {name: installed.get(name) for name in ("triton", "flash-attn", "liger-kernel")}}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--scenarios", nargs="+", choices=gpu_decoding.SCENARIOS, default=list(gpu_decoding.SCENARIOS),
                        help="of the generation")
    parser.add_argument("--dtypes", nargs="+", choices=GPU_DTYPES, default=list(GPU_DTYPES), help="of the generation")
    parser.add_argument("--python", nargs="+", default=[], metavar="RIVAL=PATH", help="the Python that has a rival of it")
    parser.add_argument("--log", metavar="FILE", default=os.devnull, help="add to it what its engines print")
    parser.add_argument("--save", metavar="NAME", help="also write benchmarks/results/NAME.json")
    options = vars(parser.parse_args(argv))
    options["python"] = dict(item.partition("=")[::2] for item in options["python"])
    if not set(options["python"]) <= set(GPU_RIVALS):
        parser.error(f"--python: expected RIVAL=PATH of {', '.join(GPU_RIVALS)}")
    return options


def main(argv=None):
    options = parse(argv)
    missing = kernels.missing(None)
    if missing:
        sys.exit(f"bench_gpu: {missing}")
    settings = {**options, **gpu()}
    save, pythons, log = (settings.pop(name) for name in ("save", "python", "log"))
    print(f"{settings['gpu']}; {one_line(describe())}")
    parts = {name: PARTS[name] for name in options["parts"]}
    if "generation" in parts:
        parts["generation"] = partial(parts["generation"], scenarios=options["scenarios"], dtypes=options["dtypes"],
                                      pythons=pythons, log=log)
    with ops.backend("triton"):
        tops, rows = run(CudaTimer(options["rounds"]), parts)
    results.finish(results.document("gpu", settings, tops, rows), save)


if __name__ == "__main__":
    main()
