"""The seam: who answers a call and why, what a bad argument is told, the ops as a compiler and autograd see them."""
import re

import pytest
import torch
from processes import run_python
from samples import samples
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import cpu, extension, ops, reference

FLOATS = samples()


# Who answers


def test_every_op_has_a_reference_and_a_sample():
    assert set(ops.OPS) == set(FLOATS)
    assert all(callable(getattr(reference, op)) and callable(getattr(ops, op)) for op in ops.OPS)
    assert set(cpu.KERNELS) <= {*ops.OPS, *ops.INFERENCE_OPS}


@pytest.mark.parametrize("op", ops.OPS)
def test_the_automatic_choice_has_a_reason(op):
    tensors, _ = FLOATS[op]
    name, reason = ops.resolve(op, tensors[0])
    if op in cpu.KERNELS and not extension.MISSING:
        assert (name, reason) == ("cpp", "the first choice on cpu")
    else:
        assert name == "reference" and reason.startswith("not cpp: ")
    name, reason = ops.resolve(op, tensors[0].double())
    assert name == "reference" and reason.startswith("not cpp: ")


@pytest.mark.parametrize("op", ops.OPS)
def test_the_override_is_used_and_ends(op):
    tensors, options = FLOATS[op]
    with ops.backend("reference"):
        assert ops.resolve(op, tensors[0])[0] == "reference"
        forced = getattr(ops, op)(*tensors, **options)
    expected = getattr(reference, op)(*tensors, **options)
    torch.testing.assert_close(forced, expected, rtol=0, atol=0)
    with pytest.raises(KeyError), ops.backend("reference"), ops.backend("auto"):
        raise KeyError
    assert ops.resolve(op, tensors[0], device="xpu") == ("reference", "the first choice on xpu")


@pytest.mark.parametrize("op", ops.OPS)
def test_a_backend_that_cannot_answer_raises(op):
    tensors, options = samples(torch.float64)[op]
    with ops.backend("cpp"), pytest.raises(RuntimeError, match=rf"ops\.{op}: the backend 'cpp' was asked for, but "):
        getattr(ops, op)(*tensors, **options)
    with ops.backend("cpp"), pytest.raises(RuntimeError, match="not for cuda|no C\\+\\+ kernel|can't be imported"):
        ops.resolve(op, device="cuda")


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="backend='fast': expected one of auto, reference, cpp"), ops.backend("fast"):
        pass
    result = run_python("import fastgpt.ops", FASTGPT_BACKEND="fast")
    assert result.returncode and "ValueError: FASTGPT_BACKEND='fast': expected one of auto, reference" in result.stderr


# What importing costs

IMPORTS = """
import sys, torch
class Watch:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("triton", "transformers"), name
sys.meta_path.insert(0, Watch())
import fastgpt, fastgpt.ops, fastgpt.info
[getattr(fastgpt, name) for name in fastgpt.__all__]
assert not {"triton", "transformers"} & set(sys.modules)
"""


def test_import_brings_in_neither_triton_nor_transformers():
    result = run_python(IMPORTS)
    assert result.returncode == 0, result.stderr


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["fastgpt._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastgpt, fastgpt.ops, fastgpt.cpu.layer_norm
    fastgpt.GPT
    import torch
    fastgpt.ops.layer_norm(torch.randn(2, 8, requires_grad=True), torch.ones(8)).sum().backward()
ours = [str(w.message) for w in caught if "fastgpt" in str(w.message)]
assert len(ours) == 1 and "pip install -e" in ours[0] and "FASTGPT_BUILD=auto" in ours[0], ours
assert fastgpt.ops.resolve("gelu", torch.ones(1))[0] == "reference"
assert fastgpt.get_num_threads() == 1
def forced():
    with fastgpt.ops.backend("cpp"):
        fastgpt.ops.gelu(torch.ones(1))
for call in (forced, lambda: fastgpt.set_num_threads(2)):
    try:
        call()
        raise SystemExit("no error")
    except RuntimeError as error:
        assert "fastgpt._C" in str(error)
"""


def test_without_the_extension_all_runs_on_the_reference_with_one_warning():
    result = run_python(WITHOUT_EXTENSION)
    assert result.returncode == 0, result.stderr


# Bad arguments: op, what replaces the sample's arguments (by position or name), the error and a part of its message

X, B, I32 = torch.randn(5, 24), torch.randn(24), torch.ones(5, 24, dtype=torch.int32)
META = torch.randn(24, device="meta")
Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
W = torch.randn(7, 24)
WRONG = [
    *(case for op in ("layer_norm", "add_layer_norm") for weight in [2 if op == "add_layer_norm" else 1] for case in [
        (op, {0: [1.0]}, TypeError, "x must be a dense tensor, got list"),
        (op, {0: I32}, TypeError, "x must have a floating dtype, got torch.int32"),
        (op, {0: torch.tensor(1.0)}, ValueError, "x must have a last dimension C >= 1, got shape ()"),
        (op, {0: torch.ones(5, 0)}, ValueError, "x must have a last dimension C >= 1, got shape (5, 0)"),
        (op, {0: X.to_sparse()}, TypeError, "x must be a dense tensor, got torch.sparse_coo"),
        (op, {weight: None}, TypeError, "weight must be a dense tensor, got NoneType"),
        (op, {weight: B[1:]}, ValueError, "weight must have shape (24,), got (23,)"),
        (op, {weight: B[None]}, ValueError, "weight must have shape (24,), got (1, 24)"),
        (op, {weight: B.int()}, TypeError, "weight must have a floating dtype, got torch.int32"),
        (op, {weight: META}, ValueError, "weight is on meta, the first argument on cpu"),
        (op, {weight + 1: B[1:]}, ValueError, "bias must have shape (24,), got (23,)"),
        (op, {"eps": "a"}, ValueError, "eps must be a number in [0.0, inf), got 'a'"),
        (op, {"eps": float("nan")}, ValueError, "eps must be a number in [0.0, inf), got nan"),
        (op, {"eps": -1e-5}, ValueError, "eps must be a number in [0.0, inf), got -1e-05"),
    ]),
    ("add_layer_norm", {1: None}, TypeError, "residual must be a dense tensor, got NoneType"),
    ("add_layer_norm", {1: X[1:]}, ValueError, "residual must have x's shape (5, 24), got (4, 24)"),
    ("add_layer_norm", {1: I32}, TypeError, "residual must have a floating dtype, got torch.int32"),
    ("add_layer_norm", {1: X.to("meta")}, ValueError, "residual is on meta"),
    *(case for op in ("gelu", "bias_gelu") for case in [
        (op, {0: "x"}, TypeError, "x must be a dense tensor, got str"),
        (op, {0: X + 0j}, TypeError, "x must have a floating dtype, got torch.complex64"),
        (op, {"approximate": "fast"}, ValueError, "approximate must be 'none' or 'tanh', got 'fast'"),
        (op, {"approximate": None}, ValueError, "approximate must be 'none' or 'tanh', got None"),
    ]),
    ("bias_gelu", {0: torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
    ("bias_gelu", {1: None}, TypeError, "bias must be a dense tensor, got NoneType"),
    ("bias_gelu", {1: B[1:]}, ValueError, "bias must have shape (24,), got (23,)"),
    ("bias_gelu", {1: B.int()}, TypeError, "bias must have a floating dtype, got torch.int32"),
    ("bias_gelu", {1: META}, ValueError, "bias is on meta"),
    *(case for op in ("linear", "cross_entropy") for case in [
        (op, {0: I32}, TypeError, "x must have a floating dtype, got torch.int32"),
        (op, {0: X[:, 1:]}, ValueError, "x must have K = 24 (weight's second) in its last dimension, got (5, 23)"),
        (op, {0: torch.tensor(1.0)}, ValueError, "x must have K = 24"),
        (op, {0: X.double()}, ValueError, "x is torch.float64, weight torch.float32; give them one dtype"),
        (op, {1: None}, TypeError, "weight must be a dense tensor, got NoneType"),
        (op, {1: B}, ValueError, "weight must have shape (N, K), got (24,)"),
        (op, {1: W.int()}, TypeError, "weight must have a floating dtype, got torch.int32"),
        (op, {1: W.to("meta")}, ValueError, "weight is on meta"),
        (op, {"bias": B[:6]}, ValueError, "bias must have shape (7,), got (6,)"),
        (op, {"bias": B[:7].double()}, ValueError, "x is torch.float32, bias torch.float64"),
        (op, {"bias": META[:7]}, ValueError, "bias is on meta"),
    ]),
    ("linear", {"activation": "selu"}, ValueError, "activation must be one of (None, 'gelu', 'gelu_tanh', 'relu')"),
    ("linear", {"residual": X}, ValueError, "residual must have shape (5, 7), got (5, 24)"),
    ("linear", {"residual": X[:, :7].bfloat16()}, ValueError, "x is torch.float32, residual torch.bfloat16"),
    ("linear", {"residual": X[:, :7].to("meta")}, ValueError, "residual is on meta"),
    ("cross_entropy", {2: [0, 1, 2, 3, 4]}, TypeError, "targets must be a dense tensor, got list"),
    ("cross_entropy", {2: torch.zeros(5, dtype=torch.int32)}, ValueError, "int64 of shape (5,), got torch.int32 (5,)"),
    ("cross_entropy", {2: torch.zeros(4, dtype=torch.int64)}, ValueError, "int64 of shape (5,), got torch.int64 (4,)"),
    ("cross_entropy", {2: torch.zeros(5, dtype=torch.int64, device="meta")}, ValueError, "targets is on meta"),
    ("cross_entropy", {2: torch.tensor([0, 1, 7, 2, 3])}, (ValueError, IndexError), "7"),
    ("cross_entropy", {2: torch.tensor([0, 1, -1, 2, 3])}, (ValueError, IndexError), "-1"),
    ("cross_entropy", {"ignore_index": 1.5}, ValueError, "ignore_index must be an int, got 1.5"),
    ("cross_entropy", {"reduction": "max"}, ValueError, "reduction must be mean, sum or none, got 'max'"),
    *(case for i, name in enumerate("qkv") for case in [
        ("attention", {i: None}, TypeError, f"{name} must be a dense tensor, got NoneType"),
        ("attention", {i: (Q, K, K)[i].int()}, TypeError, f"{name} must have a floating dtype, got torch.int32"),
        ("attention", {i: (Q, K, K)[i][0]}, ValueError, f"{name} must have 4 dimensions"),
    ]),
    ("attention", {1: K.to("meta")}, ValueError, "k is on meta"),
    ("attention", {2: K[:, :, 1:]}, ValueError, "k and v must have one shape, got (2, 2, 6, 8) and (2, 2, 5, 8)"),
    ("attention", {0: Q[:1]}, ValueError, "k must have batch 1 and head size 8 as q, got (2, 2, 6, 8)"),
    ("attention", {0: Q[..., 1:]}, ValueError, "k must have head size 7 as q"),
    ("attention", {0: Q[:, :3]}, ValueError, "q's 3 heads must be a multiple of k's 2"),
    ("attention", {1: K[:, :0], 2: K[:, :0]}, ValueError, "q's 4 heads must be a multiple of k's 0"),
    ("attention", {0: Q[..., :0], 1: K[..., :0], 2: K[..., :0]}, ValueError, "a head size of at least 1"),
    ("attention", {0: Q.double()}, ValueError, "q is torch.float64, k torch.float32"),
    ("attention", {"scale": "a"}, ValueError, "scale must be a number"),
    ("attention", {"dropout_p": 1.0}, ValueError, "dropout_p must be a number in [0.0, 1.0), got 1.0"),
    ("attention", {"dropout_p": float("nan")}, ValueError, "dropout_p must be a number in [0.0, 1.0), got nan"),
    ("attention", {"dropout_p": 0.5, "seed": -1}, ValueError, "seed must be an int in [0, 2**63), got -1"),
    ("attention", {"dropout_p": 0.5, "seed": 2 ** 63}, ValueError, "seed must be an int in [0, 2**63)"),
    ("attention", {"key_mask": [True] * 6}, TypeError, "key_mask must be a dense tensor, got list"),
    ("attention", {"key_mask": torch.ones(2, 5).bool()}, ValueError, "key_mask must be bool of shape (2, 6)"),
    ("attention", {"key_mask": torch.ones(2, 6)}, ValueError, "bool of shape (2, 6), got torch.float32 (2, 6)"),
    ("attention", {"key_mask": torch.ones(2, 6, device="meta").bool()}, ValueError, "key_mask is on meta"),
]


@pytest.mark.parametrize("op, changes, error, message", WRONG, ids=[f"{w[0]}-{w[3][:40]}" for w in WRONG])
def test_a_bad_argument_is_named(op, changes, error, message):
    tensors, options = FLOATS[op]
    positional = [changes.get(i, tensor) for i, tensor in enumerate(tensors)]
    options = {**options, **{name: value for name, value in changes.items() if isinstance(name, str)}}
    if "bias" in changes and op == "linear":
        positional.pop()
    with pytest.raises(error, match=re.escape(message)) as caught:
        getattr(ops, op)(*positional, **options)
    if error is not IndexError and not isinstance(error, tuple):
        assert str(caught.value).startswith(f"{op}: ")


# As a compiler and autograd see them


def outputs_and_gradients(function, op, dtype):
    tensors, options = samples(dtype, requires_grad=True)[op]
    leaves = [t for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    outputs = function(*tensors, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad([o.float().square().sum() for o in outputs], leaves)
    return outputs + gradients


@pytest.mark.parametrize("op", ops.OPS)
def test_compiles_whole_to_the_same_bits(op, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    eager = outputs_and_gradients(getattr(ops, op), op, dtype)
    for ours, theirs in zip(outputs_and_gradients(compiled, op, dtype), eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class Recorder(TorchDispatchMode):
    """Notes every call of one of our PyTorch ops, and its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastgpt":
            self.calls.setdefault(function, args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [op for op in ops.OPS if op in cpu.KERNELS])
def test_library_ops_keep_pytorchs_contract(op, dtype, monkeypatch):
    if extension.MISSING:
        pytest.skip(extension.MISSING)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Recorder() as recorder:
        outputs_and_gradients(getattr(ops, op), op, dtype)
    monkeypatch.undo()
    assert recorder.calls, f"{op} called no op of the library fastgpt"
    for function, args in recorder.calls.items():
        differentiable = not function._opname.endswith("_backward")
        leaves = [a.detach().requires_grad_(a.requires_grad and differentiable) if isinstance(a, torch.Tensor) else a
                  for a in args]
        torch.library.opcheck(function, leaves)


@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm", "bias_gelu"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_mixed_dtypes_are_taken_by_every_implementation(op, wide, dtype):
    """Memory that one dtype filled must not be read as another."""
    tensors, options = samples(dtype)[op]
    for mixed in ([tensors[0], *(t.to(wide) for t in tensors[1:])], [tensors[0].to(wide), *tensors[1:]],
                  [*tensors[:-1], tensors[-1].to(wide)]):
        ours = getattr(ops, op)(*mixed, **options)
        truth = getattr(reference, op)(*(t.double() for t in mixed), **options)
        ours, truth = (r if isinstance(r, tuple) else (r,) for r in (ours, truth))
        for our, true in zip(ours, truth, strict=True):
            torch.testing.assert_close(our.double(), true, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("op", ops.OPS)
def test_a_call_without_gradients_gives_the_same_values(op, dtype):
    tensors, options = samples(dtype)[op]
    with torch.no_grad():
        plain = getattr(ops, op)(*tensors, **options)
    trained = outputs_and_gradients(getattr(ops, op), op, dtype)
    for ours, theirs in zip(plain if isinstance(plain, tuple) else (plain,), trained, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("op", ops.OPS)
def test_gradcheck_of_the_reference(op):
    tensors, options = samples(torch.float64, requires_grad=True)[op]
    assert torch.autograd.gradcheck(lambda *args: getattr(reference, op)(*args, **options), tensors, fast_mode=True)


@pytest.mark.parametrize("op", ops.OPS)
def test_autocast_gives_its_dtype_to_the_products(op):
    tensors, options = FLOATS[op]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = getattr(ops, op)(*tensors, **options)
    result = result[0] if isinstance(result, tuple) else result
    assert result.dtype == (torch.bfloat16 if op in ("linear", "attention", "packed_attention") else torch.float32)
