"""The model against an independent one and against transformers, and nanoGPT's contract around it."""
import copy
import random
import subprocess
import sys

import pytest
import torch
from numerics import GRADIENTS, assert_accurate
from plain_gpt import PlainGPT

from fastgpt import GPT, GPTConfig, checkpoint, extension
from fastgpt import model as model_module
from fastgpt.autograd import tensors

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"block_size": 19, "vocab_size": 61, "n_layer": 3, "n_head": 3, "n_embd": 33, "initializer_range": 0.2}
SWITCHES = {
    "gpt2": {},
    "no bias": {"bias": False},
    "one of each": {"n_head": 11, "n_layer": 1, "vocab_size": 1, "block_size": 1},
    "all": {"n_inner": 50, "activation": "gelu_new", "layer_norm_epsilon": 1e-3, "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    "relu": {"activation": "relu", "scale_attn_by_inverse_layer_idx": True, "n_head": 1},
}


def make(dtype=torch.float64, **switches):
    """Our model and the plain one with the same weights; norms and biases random too, so that no term is trivial."""
    ours = GPT(GPTConfig(**{**SMALL, **switches})).to(dtype)
    with torch.no_grad():
        for p in ours.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    plain = PlainGPT(ours.config).to(dtype)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def batch(config, B=3, T=None):
    T = config.block_size if T is None else T
    idx, targets = torch.randint(config.vocab_size, (2, B, T))
    if B * T > 1:
        targets[0, 0] = -1
    return idx, targets


def loss_and_gradients(model, idx, targets, **options):
    logits, loss = model(idx, targets, **options)
    return logits, loss, dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters())))


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("return_logits", [True, False])
def test_loss_and_every_gradient_equal_the_reference_model(switches, return_logits):
    ours, plain = make(**switches)
    idx, targets = batch(ours.config)
    logits, loss, grads = loss_and_gradients(ours, idx, targets, return_logits=return_logits)
    true_logits, true_loss, true_grads = loss_and_gradients(plain, idx, targets)
    torch.testing.assert_close(loss, true_loss, rtol=1e-12, atol=1e-13)
    assert grads.keys() == true_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, true_grads[name], rtol=1e-9, atol=1e-13, msg=lambda m, name=name: name + m)
    if return_logits:
        torch.testing.assert_close(logits, true_logits, rtol=1e-11, atol=1e-12)
    else:
        assert logits is None


def train(model, batches, optimizer):
    losses = []
    for idx, targets in batches:
        _, loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def plain_adamw(model):
    decay, rest = [], []
    for p in model.parameters():
        (decay if p.dim() == 2 else rest).append(p)
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), foreach=False, fused=False)


@pytest.mark.parametrize("switches", [SWITCHES["gpt2"], SWITCHES["all"]], ids=["gpt2", "all"])
def test_five_optimizer_steps_equal_the_reference_model(switches):
    ours, plain = make(**switches)
    batches = [batch(ours.config) for _ in range(5)]
    losses = train(ours, batches, ours.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu"))
    true_losses = train(plain, batches, plain_adamw(plain))
    torch.testing.assert_close(losses, true_losses, rtol=1e-10, atol=0)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def forward_backward(model, idx, targets, autocast, **options):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, loss = model(idx, targets, **options)
    return {"logits": logits, "loss": loss.float()}, torch.autograd.grad(loss, model.parameters())


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("switches", ["gpt2", "no bias", "all"])
@pytest.mark.parametrize("return_logits", [True, False])
def test_low_precision_keeps_the_accuracy_rule(switches, mode, return_logits):
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    ours, plain = make(dtype, **SWITCHES[switches])
    idx, targets = batch(ours.config, B=8)
    true_values, true_grads = forward_backward(copy.deepcopy(plain).double(), idx, targets, False)
    values, grads = forward_backward(ours, idx, targets, mode == "autocast", return_logits=return_logits)
    their_values, their_grads = forward_backward(plain, idx, targets, mode == "autocast")
    if return_logits:
        assert_accurate("logits", values["logits"], true_values["logits"], their_values["logits"])
    # A loss is one number, so PyTorch's error may be small by luck: what it owes to the logits' is the yardstick.
    spread = (their_values["logits"].double() - true_values["logits"]).abs().max()
    assert abs(values["loss"] - true_values["loss"]) <= 2 * spread
    for (name, _), *grad in zip(ours.named_parameters(), grads, true_grads, their_grads, strict=True):
        assert_accurate(name, *grad, GRADIENTS)


def test_training_in_float32_keeps_the_accuracy_rule():
    ours, plain = make(torch.float32)
    truth = copy.deepcopy(plain).double()
    batches = [batch(ours.config, B=8) for _ in range(5)]
    losses = train(ours, batches, ours.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu"))
    true_losses, their_losses = (train(model, batches, plain_adamw(model)) for model in (truth, plain))
    assert_accurate("losses", losses, true_losses, their_losses, GRADIENTS)


def random_hf_config(seed):
    from transformers import GPT2Config
    pick = random.Random(seed)
    n_head = pick.choice([1, 3, 5, 7])
    return GPT2Config(
        vocab_size=pick.randint(2, 90), n_positions=pick.randint(1, 40), n_layer=pick.randint(1, 4), n_head=n_head,
        n_embd=n_head * pick.choice([1, 3, 8, 13]), n_inner=pick.choice([None, 1, 37]),
        activation_function=["gelu_new", "gelu", "relu", "gelu_fast", "gelu_pytorch_tanh"][seed % 5],
        layer_norm_epsilon=pick.choice([1e-5, 1e-6, 1e-2]), scale_attn_weights=seed % 3 != 0,
        scale_attn_by_inverse_layer_idx=seed % 2 == 0, tie_word_embeddings=seed % 4 != 1, initializer_range=0.3,
        reorder_and_upcast_attn=seed == 7, bos_token_id=0, eos_token_id=0)


@pytest.mark.parametrize("seed", range(10))
def test_logits_equal_transformers_for_random_configurations(seed, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(random_hf_config(seed)).double().eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.lm_head.weight.dtype == torch.float64
    idx, targets = batch(ours.config)
    with torch.no_grad():
        expected = theirs(idx).logits
        # transformers' upcast to float32 is part of reorder_and_upcast_attn; it is not part of the math
        rtol = 1e-4 if theirs.config.reorder_and_upcast_attn else 1e-9
        torch.testing.assert_close(ours(idx, targets)[0], expected, rtol=rtol, atol=rtol)
        torch.testing.assert_close(ours(idx)[0], expected[:, -1:], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("bias", [True, False])
def test_a_seed_gives_the_weights_that_nanogpt_draws(bias):
    config = GPTConfig(**{**SMALL, "bias": bias, "initializer_range": 0.02})
    torch.manual_seed(1337)
    ours = GPT(config).state_dict()
    torch.manual_seed(1337)
    theirs = PlainGPT(config).state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_initialisation_scales_the_residual_projections():
    config = GPTConfig(block_size=64, vocab_size=300, n_layer=8, n_head=2, n_embd=128)
    for name, p in GPT(config).named_parameters():
        expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
        if p.dim() == 2:
            assert abs(p.std() / expected - 1) < 0.05, name
        else:
            assert torch.all(p == (1.0 if "ln_" in name and name.endswith("weight") else 0.0)), name


def test_state_dict_has_nanogpts_names_and_shapes():
    names = {name: tuple(p.shape) for name, p in GPT(GPTConfig(**{**SMALL, "n_layer": 1})).state_dict().items()}
    assert names == {
        "transformer.wte.weight": (61, 33), "transformer.wpe.weight": (19, 33),
        "transformer.h.0.ln_1.weight": (33,), "transformer.h.0.ln_1.bias": (33,),
        "transformer.h.0.attn.c_attn.weight": (99, 33), "transformer.h.0.attn.c_attn.bias": (99,),
        "transformer.h.0.attn.c_proj.weight": (33, 33), "transformer.h.0.attn.c_proj.bias": (33,),
        "transformer.h.0.ln_2.weight": (33,), "transformer.h.0.ln_2.bias": (33,),
        "transformer.h.0.mlp.c_fc.weight": (132, 33), "transformer.h.0.mlp.c_fc.bias": (132,),
        "transformer.h.0.mlp.c_proj.weight": (33, 132), "transformer.h.0.mlp.c_proj.bias": (33,),
        "transformer.ln_f.weight": (33,), "transformer.ln_f.bias": (33,), "lm_head.weight": (61, 33)}


def test_tied_embeddings_are_one_parameter_and_untied_ones_two():
    tied, untied = GPT(GPTConfig(**SMALL)), GPT(GPTConfig(**SMALL, tie_word_embeddings=False))
    assert tied.transformer.wte.weight is tied.lm_head.weight
    assert untied.transformer.wte.weight is not untied.lm_head.weight
    # what counts without embeddings: all but positions, and all but tokens where they are not the head as well
    assert tied.get_num_params() == untied.get_num_params() == tied.get_num_params(False) - 19 * 33
    assert untied.get_num_params(non_embedding=False) == tied.get_num_params(False) + 61 * 33


def test_gpt2_has_124_million_parameters():
    model = checkpoint.skeleton(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124_439_808
    assert model.get_num_params() == 124_439_808 - 1024 * 768


def test_without_targets_the_last_position_alone_is_projected():
    ours, _ = make()
    idx, targets = batch(ours.config)
    logits, loss = ours(idx)
    assert loss is None and logits.shape == (3, 1, 61)
    torch.testing.assert_close(logits, ours(idx, targets)[0][:, -1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("return_logits", [True, False])
def test_targets_of_minus_one_are_ignored(return_logits):
    ours, _ = make()
    idx, targets = batch(ours.config, B=2)
    targets[1] = -1
    alone = ours(idx[:1], targets[:1])[1]
    torch.testing.assert_close(ours(idx, targets, return_logits=return_logits)[1], alone)
    assert ours(idx, torch.full_like(idx, -1), return_logits=return_logits)[1].isnan()


def test_a_token_does_not_see_the_future():
    ours, _ = make()
    idx, targets = batch(ours.config, B=1)
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 61
    before, after = ours(idx, targets)[0], ours(changed, targets)[0]
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


def gradients_with_seed(model, idx, targets):
    torch.manual_seed(5)
    return loss_and_gradients(model, idx, targets)[2]


def kept_for_backward(n_layer):
    """The elements of the tensors that a step keeps, parameters apart."""
    model = GPT(GPTConfig(**{**SMALL, "n_layer": n_layer, "n_head": 1}))
    parameters = {p.data_ptr() for p in model.parameters()}
    loss = model(*batch(model.config), return_logits=False)[1]
    kept = {t.untyped_storage().data_ptr(): t for t in saved_tensors(loss.grad_fn, set()) if t.data_ptr() not in parameters}
    return sum(t.untyped_storage().nbytes() // t.itemsize for t in kept.values())


def saved_tensors(node, seen):
    """What the nodes of a graph keep for backward. Not by hooks on saved tensors, under which everything is kept."""
    if node is None or node in seen:
        return []
    seen.add(node)
    own = [*getattr(node, "saved_tensors", ()), *(getattr(node, name) for name in dir(node) if name.startswith("_saved_"))]
    behind = [t for following, _ in node.next_functions for t in saved_tensors(following, seen)]
    return [t for t in own if isinstance(t, torch.Tensor)] + behind


@pytest.mark.skipif(bool(extension.MISSING), reason=str(extension.MISSING))
def test_neither_the_activation_nor_the_norms_results_are_kept(monkeypatch):
    monkeypatch.setattr(tensors, "LARGE", 0)
    rows, C = 3 * SMALL["block_size"], SMALL["n_embd"]
    streams, qkv, attention, wide, statistics = 2 * C, 3 * C, C, 4 * C, 2 * 2 + 1
    assert kept_for_backward(4) - kept_for_backward(3) == rows * (streams + qkv + attention + wide + statistics)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(dropout):
    model = GPT(GPTConfig(**SMALL, dropout=dropout))
    idx, targets = batch(model.config)
    products = []  # the recomputation stops after the last tensor that it needs, so a block's first product is watched
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda *_: products.append(1))
    expected = gradients_with_seed(model, idx, targets)
    assert len(products) == 3
    model.config.gradient_checkpointing = True
    recomputed = gradients_with_seed(model, idx, targets)
    assert len(products) == 3 + 2 * 3
    for name, grad in recomputed.items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("rate", ["embd_dropout", "attn_dropout", "resid_dropout"])
def test_each_dropout_acts_alone_in_training_and_never_in_eval(rate):
    model = GPT(GPTConfig(**SMALL, **{rate: 0.5}))
    idx, _ = batch(model.config)
    first, second = model(idx)[0], model(idx)[0]
    assert not torch.equal(first, second)
    model.eval()
    plain = GPT(GPTConfig(**SMALL))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(idx)[0], plain(idx)[0])


def test_dropout_is_the_default_of_the_three_rates():
    config = GPTConfig(dropout=0.1, attn_dropout=0.0)
    assert [config.rate(name) for name in ("embd", "attn", "resid")] == [0.1, 0.0, 0.1]


def test_crop_block_size_keeps_the_first_positions():
    ours, _ = make()
    idx, targets = batch(ours.config, T=7)
    before = ours(idx, targets)[0]
    ours.crop_block_size(7)
    assert ours.config.block_size == 7 and ours.transformer.wpe.weight.shape == (7, 33)
    assert ours.transformer.wpe.weight.untyped_storage().nbytes() == 7 * 33 * 8
    assert torch.equal(ours(idx, targets)[0], before)
    with pytest.raises(ValueError, match="block_size must be from 1 to 7, got 8"):
        ours.crop_block_size(8)
    with pytest.raises(TypeError, match="block_size must be an int, got 1.5"):
        ours.crop_block_size(1.5)
    assert ours.config.block_size == 7


def test_configure_optimizers_decays_matrices_alone():
    model = GPT(GPTConfig(**SMALL))
    model.transformer.wpe.weight.requires_grad_(False)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.8, 0.9), "cpu")
    decay, rest = optimizer.param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert decay["lr"] == 3e-4 and decay["betas"] == (0.8, 0.9)
    assert all(p.dim() == 2 for p in decay["params"]) and all(p.dim() == 1 for p in rest["params"])
    assert len(decay["params"]) == 1 + 4 * 3 and len(rest["params"]) == 8 * 3 + 2
    assert decay["fused"]


def test_estimate_mfu_is_the_share_of_a_peak():
    model = checkpoint.skeleton(GPTConfig(vocab_size=50257))
    flops = (6 * 123_653_376 + 12 * 12 * 12 * 64 * 1024) * 1024
    assert model.estimate_mfu(8, 2.0) == pytest.approx(flops * 8 / 2.0 / 312e12)
    assert model.estimate_mfu(8, 2.0, peak_flops=1e12) == pytest.approx(flops * 8 / 2.0 / 1e12)


@pytest.mark.parametrize("return_logits", [True, False])
def test_the_model_compiles_into_one_graph(return_logits):
    ours, _ = make(torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    idx, targets = batch(ours.config)
    expected = loss_and_gradients(ours, idx, targets, return_logits=return_logits)
    _, loss, grads = loss_and_gradients(compiled, idx, targets, return_logits=return_logits)
    torch.testing.assert_close(loss, expected[1])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[2][name.removeprefix("_orig_mod.")])


BAD_INPUT = {
    "id too large": ((torch.tensor([[61]]),), IndexError, r"idx: a token id is outside \[0, 61\)"),
    "id negative": ((torch.tensor([[-1]]),), IndexError, r"idx: a token id is outside \[0, 61\)"),
    "float ids": ((torch.zeros(1, 3),), TypeError, "idx must hold token ids as int64 or int32, got torch.float32"),
    "one dimension": ((torch.zeros(3, dtype=torch.int64),), ValueError, r"idx must have shape \(B, T\), got \(3,\)"),
    "no tokens": ((torch.zeros(2, 0, dtype=torch.int64),), ValueError, "idx has no tokens"),
    "too long": ((torch.zeros(1, 20, dtype=torch.int64),), ValueError, "20 tokens is longer than block_size = 19"),
    "targets' shape": ((torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)), ValueError,
                       r"targets must have idx's shape \(1, 3\), got \(1, 2\)"),
    "targets' dtype": ((torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3)), TypeError, "targets must be int64"),
    "target too large": ((torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[61]])), (IndexError, ValueError), "61"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        GPT(GPTConfig(**SMALL))(*arguments)


@pytest.mark.parametrize(("values", "error", "message"), [
    ({"n_embd": 10, "n_head": 3}, ValueError, "n_embd must be a multiple of n_head, got n_embd=10, n_head=3"),
    ({"vocab_size": None}, TypeError, "vocab_size must be an int, got None"),
    ({"block_size": 0}, ValueError, "block_size must be from 1 to"),
    ({"n_layer": True}, TypeError, "n_layer must be an int"),
    ({"n_inner": -4}, ValueError, "n_inner must be from 1"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ({"attn_dropout": float("nan")}, ValueError, "attn_dropout must be in"),
    ({"bias": 1}, TypeError, "bias must be a bool, got 1"),
    ({"activation": "swish"}, ValueError, "activation must be one of gelu, .*, got 'swish'"),
    ({"layer_norm_epsilon": 0}, ValueError, "layer_norm_epsilon must be in"),
    ({"initializer_range": "0.02"}, TypeError, "initializer_range must be a number"),
])
def test_bad_config_is_named(values, error, message):
    with pytest.raises(error, match=message):
        GPTConfig(**values)


def test_config_begins_with_nanogpts_fields_and_takes_numpys_integers():
    np = pytest.importorskip("numpy")
    config = GPTConfig(8, np.int64(61), 2, 2, 16, 0, False)
    assert (config.block_size, config.n_layer, config.dropout, config.bias) == (8, 2, 0, False)
    assert type(config.vocab_size) is int and config.vocab_size == 61
    assert GPTConfig() == GPTConfig(1024, 50304, 12, 12, 768, 0.0, True)


@pytest.mark.parametrize("switches", [{}, SWITCHES["all"], {"dropout": 0.1, "attn_dropout": 0.3}, {"n_inner": 12}])
def test_config_survives_hugging_faces_form(switches):
    config = GPTConfig(**{**SMALL, **switches})
    assert GPTConfig.from_hf(config.to_hf()) == config


def test_from_hf_knows_old_spellings_and_defaults():
    config = GPTConfig.from_hf({"n_ctx": 77, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1})
    assert (config.block_size, config.n_embd, config.n_head, config.n_layer) == (77, 24, 2, 1)
    assert (config.vocab_size, config.activation) == (50257, "gelu_tanh")
    assert (config.dropout, config.attn_dropout) == (0.1, None)


def test_importing_fastgpt_pulls_in_neither_triton_nor_transformers():
    code = ("import sys, fastgpt; light = 'torch' not in sys.modules; fastgpt.GPT; fastgpt.SamplingParams; fastgpt.ops\n"
            "print(light, sorted({'triton', 'transformers', 'huggingface_hub'} & set(sys.modules)))")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True []"


def test_model_py_has_no_device_branch_and_stays_short():
    with open(model_module.__file__) as file:
        lines = file.read().splitlines()
    assert len(lines) < 300
    assert not any("is_cuda" in line or "device.type" in line or "is_available" in line for line in lines)
