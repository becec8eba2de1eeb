"""Checkpoints: what transformers and nanoGPT write loads, what we write they load, and nothing hostile gets through."""
import errno
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import types

import pytest
import safetensors
import safetensors.torch
import torch

from fastgpt import GPT, GPTConfig, checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"block_size": 8, "vocab_size": 17, "n_layer": 2, "n_head": 2, "n_embd": 6, "initializer_range": 0.3}
CONFIGS = {
    "gpt2": {},
    "no bias": {"bias": False},
    "untied": {"tie_word_embeddings": False, "activation": "relu", "n_inner": 5, "dropout": 0.1, "attn_dropout": 0.2},
}


@pytest.fixture
def model():
    return randomised(GPT(GPTConfig(**TINY)))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def randomised(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def assert_same_model(ours, expected):
    assert ours.config == expected.config
    theirs = expected.state_dict()
    assert list(ours.state_dict()) == list(theirs)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name
    assert (ours.transformer.wte.weight is ours.lm_head.weight) == ours.config.tie_word_embeddings
    assert all(p.requires_grad and p.is_contiguous() for p in ours.parameters())


def hf_state(model):
    """What transformers calls these tensors, and how it stores them."""
    return dict(checkpoint._hf_tensors(model))


def write_hf(folder, model, state, name="pytorch_model.bin"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()))
    if name.endswith(".bin"):
        torch.save(state, folder / name)
    else:
        safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
    return folder


def nanogpt_checkpoint(model, prefix=""):
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    return {"model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
            "optimizer": model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").state_dict(),
            "model_args": {name: getattr(model.config, name) for name in names}, "iter_num": 3,
            "best_val_loss": torch.tensor(1.5), "config": {"dataset": "openwebtext", "device": "cpu"}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("switches", CONFIGS.values(), ids=CONFIGS)
def test_a_saved_model_loads_as_it_was(switches, dtype, tmp_path):
    model = randomised(GPT(GPTConfig(**{**TINY, **switches}))).to(dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert_same_model(loaded, model)
    assert not loaded.training


@pytest.mark.parametrize("switches", CONFIGS.values(), ids=CONFIGS)
def test_transformers_loads_what_we_save_to_equal_logits(switches, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = randomised(GPT(GPTConfig(**{**TINY, **switches}))).double().eval()
    model.save_pretrained(tmp_path)
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    idx = torch.randint(17, (3, 8))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(idx).logits, model(idx, idx)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no prefix"])
def test_names_with_and_without_prefix_and_old_buffers(model, tmp_path, file, prefix):
    state = hf_state(model)
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if not prefix:
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    assert_same_model(GPT.from_pretrained(write_hf(tmp_path, model, state, file)), model)


def test_the_old_torch_format_loads(model, tmp_path):
    write_hf(tmp_path, model, {})
    torch.save(hf_state(model), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_model(GPT.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_weights_load(model, tmp_path, suffix):
    state = hf_state(model)
    write_hf(tmp_path, model, {})
    (tmp_path / "pytorch_model.bin").unlink()
    stem, weight_map = {"safetensors": "model", "bin": "pytorch_model"}[suffix], {}
    for shard in range(3):
        part = dict(list(state.items())[shard::3])
        name = f"{stem}-{shard + 1:05}-of-00003.{suffix}"
        write_hf(tmp_path, model, part, name)
        weight_map.update(dict.fromkeys(part, name))
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_model(GPT.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_loads(tmp_path, prefix, bias):
    model = randomised(GPT(GPTConfig(**{**TINY, "bias": bias, "dropout": 0.2, "initializer_range": 0.02})))
    torch.save(nanogpt_checkpoint(model, prefix), tmp_path / "ckpt.pt")
    assert_same_model(GPT.from_pretrained(tmp_path), model)
    assert_same_model(GPT.from_pretrained(str(tmp_path / "ckpt.pt")), model)


def test_float16_and_mixed_weights_become_float32(model, tmp_path):
    half = {name: tensor.half() for name, tensor in hf_state(model).items()}
    mixed = {name: tensor.bfloat16() if tensor.dim() == 2 else tensor for name, tensor in hf_state(model).items()}
    for name, state in {"half": half, "mixed": mixed}.items():
        loaded = GPT.from_pretrained(write_hf(tmp_path / name, model, state))
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert torch.equal(loaded.lm_head.weight, state["transformer.wte.weight"].float())


def test_a_saved_head_beside_its_embedding_must_equal_it(model, tmp_path):
    state = hf_state(model)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    assert_same_model(GPT.from_pretrained(write_hf(tmp_path, model, state)), model)
    state["lm_head.weight"][3, 3] += 1
    with pytest.raises(ValueError, match="'lm_head.weight' differs from 'transformer.wte.weight'"):
        GPT.from_pretrained(write_hf(tmp_path, model, state))


def test_loaded_weights_are_the_models_own(folder):
    loaded = GPT.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(0)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_loaded_model_trains_and_saves_over_its_own_file(model, folder):
    loaded = GPT.from_pretrained(folder).train()
    optimizer = loaded.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    idx = torch.randint(17, (2, 8))
    loaded(idx, idx)[1].backward()
    optimizer.step()
    loaded.save_pretrained(folder)
    assert not torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert_same_model(GPT.from_pretrained(folder), loaded)


def test_loading_does_not_import_the_compiler(folder):
    """Random initialisation on the meta device would, which takes longer than all the rest."""
    code = "import sys, fastgpt; fastgpt.GPT.from_pretrained(sys.argv[1]); print('torch._dynamo' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"


def test_override_args(folder, tmp_path):
    assert GPT.from_pretrained(folder, {"dropout": 0.25}).config.rate("attn") == 0.25
    config = GPT.from_pretrained(folder, {"dropout": 0.25, "attn_dropout": 0.5, "gradient_checkpointing": True}).config
    assert (config.rate("embd"), config.rate("attn"), config.gradient_checkpointing) == (0.25, 0.5, True)
    with pytest.raises(ValueError, match="override_args: 'n_layer' cannot be overridden"):
        GPT.from_pretrained(folder, {"n_layer": 1})
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        GPT.from_pretrained(folder, {"dropout": 2.0})


def test_a_subclass_loads_as_itself(folder):
    class Mine(GPT):
        pass

    assert type(Mine.from_pretrained(folder)) is Mine


# Missing, extra, wrong


def test_missing_and_extra_tensors_are_named(model, tmp_path):
    state = hf_state(model)
    moved = state.pop("transformer.ln_f.bias")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: missing the tensors 'transformer.ln_f.bias'$"):
        GPT.from_pretrained(write_hf(tmp_path, model, state))
    state["transformer.final.bias"] = moved
    with pytest.raises(ValueError, match="missing .*'transformer.ln_f.bias'; .* have: 'transformer.final.bias'"):
        GPT.from_pretrained(write_hf(tmp_path, model, state))
    state["transformer.ln_f.bias"] = moved
    with pytest.warns(UserWarning, match="pytorch_model.bin: ignored the tensors 'transformer.final.bias'"):
        assert_same_model(GPT.from_pretrained(write_hf(tmp_path, model, state)), model)


def test_a_name_that_comes_twice_is_refused(model, tmp_path):
    state = hf_state(model)
    state["wte.weight"] = state["transformer.wte.weight"]
    with pytest.raises(ValueError, match="'wte.weight' is the same as 'transformer.wte.weight'"):
        GPT.from_pretrained(write_hf(tmp_path, model, state))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("name", "change", "message"), [
    ("transformer.wte.weight", lambda t: t[:, :3], r"shape \(17, 3\), but the config says \(17, 6\)"),
    ("transformer.h.1.mlp.c_fc.weight", lambda t: t.t(), r"shape \(24, 6\), but the config says \(6, 24\)"),
    ("transformer.h.0.ln_1.bias", lambda t: t[None], r"shape \(1, 6\), but"),
    ("transformer.h.0.attn.c_proj.weight", lambda t: t.long(), "c_proj.weight' is .*64; expected one of"),
])
def test_a_wrong_tensor_is_named_with_its_file(model, tmp_path, file, name, change, message):
    state = hf_state(model)
    state[name] = change(state[name])
    with pytest.raises(ValueError, match=rf"{file}: the tensor '{name}' .*|{message}") as caught:
        GPT.from_pretrained(write_hf(tmp_path, model, state, file))
    assert caught.match(message) and caught.match(file)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("n_layer", 10 ** 7, "config says n_layer = 10000000, but the weights are of 2 blocks"),
    ("n_layer", 1, "config says n_layer = 1, but the weights are of 2 blocks"),
    ("n_embd", 2 ** 23, r"shape \(17, 6\), but the config says \(17, 8388608\)"),
    ("vocab_size", 10 ** 12, "config.json: vocab_size must be from 1 to"),
    ("n_embd", "6", "config.json: n_embd must be an int, got '6'"),
    ("n_head", 5, "config.json: n_embd must be a multiple of n_head"),
    ("activation_function", "swish", "config.json: activation must be one of"),
    ("model_type", "llama", "config.json: model_type must be 'gpt2', got 'llama'"),
    ("add_cross_attention", True, "config.json: add_cross_attention must be false"),
    ("embd_pdrop", None, None),
])
def test_a_lying_config_is_refused_before_anything_is_built(folder, key, value, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    if message is None:
        GPT.from_pretrained(folder)
        return
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(folder)


def test_biases_in_a_model_without_them_must_be_zero(tmp_path):
    model = GPT(GPTConfig(**TINY, bias=False))
    state = hf_state(model)
    state["transformer.h.1.ln_2.bias"][0] = 1e-9
    with pytest.raises(ValueError, match="'transformer.h.1.ln_2.bias' is not 0, but the config says that the model"):
        GPT.from_pretrained(write_hf(tmp_path, model, state))
    state["transformer.h.1.ln_2.bias"] = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="'transformer.h.1.ln_2.bias' is I64; expected one of"):
        GPT.from_pretrained(write_hf(tmp_path, model, state, "model.safetensors"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\xff"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_broken_json_is_named(folder, text, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=name):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".hidden.bin",
                                   7, None, "a\\b.bin", "config.json"])
def test_an_index_cannot_lead_out_of_its_directory(model, folder, shard):
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(hf_state(model), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json: the tensor 'transformer.wte.weight' must lie in a file of this"):
        GPT.from_pretrained(folder)


def test_an_index_that_lies_about_its_shards(model, folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = {"transformer.wte.weight": "one.safetensors", "other": "one.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="index.json: the tensor 'other' is not in 'one.safetensors'"):
        GPT.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"other": "two.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="index.json names the file 'two.safetensors', which is missing"):
        GPT.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": [1, 2]}))
    with pytest.raises(ValueError, match="weight_map must be an object, not a list"):
        GPT.from_pretrained(folder)


def lying_header(header, data=b"\0" * 64):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HOSTILE_SAFETENSORS = {
    "empty": b"",
    "header longer than the file": struct.pack("<Q", 2 ** 62) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"abcd",
    "offsets beyond the file": lying_header({"a": {"dtype": "F32", "shape": [2 ** 40], "data_offsets": [0, 2 ** 42]}}),
    "offsets against the shape": lying_header({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 64]}}),
    "shape that overflows": lying_header({"a": {"dtype": "F32", "shape": [2 ** 33, 2 ** 33], "data_offsets": [0, 64]}}),
    "unknown dtype": lying_header({"a": {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]}}),
    "not safetensors": b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("content", HOSTILE_SAFETENSORS.values(), ids=HOSTILE_SAFETENSORS)
def test_hostile_safetensors_are_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not a valid safetensors file"):
        GPT.from_pretrained(folder)


def test_truncated_files_are_refused(model, folder):
    for name in ("model.safetensors", "pytorch_model.bin"):
        write_hf(folder, model, hf_state(model), name)
        whole = (folder / name).read_bytes()
        for size in (7, 8, 100, len(whole) // 2, len(whole) - 1):
            (folder / name).write_bytes(whole[:size])
            with pytest.raises(ValueError, match=name):
                GPT.from_pretrained(folder)
        (folder / name).unlink()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["pytorch_model.bin", "ckpt.pt"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_code_in_a_pickle_does_not_run(model, tmp_path, place, form):
    target, file = tmp_path / "attacked", tmp_path / place
    content = nanogpt_checkpoint(model) if place == "ckpt.pt" else hf_state(model)
    content["payload"] = Payload(target)
    if place != "ckpt.pt":
        (tmp_path / "config.json").write_text(json.dumps(model.config.to_hf()))
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=f"{place} is not a file of plain tensors"):
        GPT.from_pretrained(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(("tensor", "message"), [
    (torch.zeros(1).expand(17, 6), "'transformer.wte.weight' claims more elements than the file holds"),
    (torch.zeros(17, 6).to_sparse(), "'transformer.wte.weight' is not a dense tensor"),
    (torch.zeros(17, 6, device="meta"), "'transformer.wte.weight'"),
    ([1.0] * 6, "'transformer.wte.weight' is a list"),
    (torch.zeros(17, 6, dtype=torch.complex64), "'transformer.wte.weight' is torch.complex64; expected one of"),
])
def test_tensors_that_are_none_are_refused(model, tmp_path, tensor, message):
    with pytest.raises(ValueError, match=f"pytorch_model.bin.*{message}"):
        GPT.from_pretrained(write_hf(tmp_path, model, {**hf_state(model), "transformer.wte.weight": tensor}))


@pytest.mark.parametrize(("content", "message"), [
    ([1, 2], "ckpt.pt is no checkpoint of nanoGPT"),
    ({"model": {}}, "ckpt.pt is no checkpoint of nanoGPT"),
    ({"model": 1, "model_args": TINY}, "ckpt.pt must hold a dict of tensors, not a int"),
    ({"model": {}, "model_args": 3}, "ckpt.pt: model_args: "),
    ({"model": {}, "model_args": {**TINY, "n_layers": 3}}, "ckpt.pt: model_args: .*'n_layers'"),
    ({"model": {}, "model_args": TINY}, "n_layer = 2, but the weights are of 0 blocks"),
])
def test_a_ckpt_that_is_none_of_nanogpts_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path / "ckpt.pt")


def test_damaged_files_never_crash_the_process(model, tmp_path):
    """Random bytes changed in each kind of file: it loads or raises, in a process of its own that must end well."""
    write_hf(tmp_path, model, hf_state(model), "model.safetensors")
    torch.save(hf_state(model), tmp_path / "whole.bin")
    code = """
import random, sys, warnings, pathlib
from fastgpt import GPT
warnings.simplefilter("ignore")
folder, pick = pathlib.Path(sys.argv[1]), random.Random(0)
for source, name in (("model.safetensors", "model.safetensors"), ("whole.bin", "pytorch_model.bin")):
    whole = (folder / source).read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(pick.choice([1, 4, 32])):
            damaged[pick.randrange(pick.choice([64, 2000, len(whole)]))] = pick.randrange(256)
        (folder / name).write_bytes(damaged)
        try:
            GPT.from_pretrained(folder)
        except ValueError as error:
            assert name in str(error), error
    (folder / name).unlink()
print("done")
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
    assert result.stdout.strip() == "done", result.stderr[-2000:]


# Where nothing is


def test_missing_places_are_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds neither config.json nor ckpt.pt"):
        GPT.from_pretrained(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights: none of model.safetensors, "):
        GPT.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="no file or directory '/no/such/place', and it is no Hugging Face hub"):
        GPT.from_pretrained("/no/such/place")
    with pytest.raises(ValueError, match="config.json: give the directory"):
        GPT.from_pretrained(folder / "config.json")


def fake_hub(monkeypatch, download):
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def test_a_hub_id_is_fetched(monkeypatch, model, folder):
    asked = []
    config = {**model.config.to_hf(), "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    fake_hub(monkeypatch, lambda name, allow_patterns: asked.append(name) or str(folder))
    monkeypatch.chdir(folder.parent)
    assert torch.equal(GPT.from_pretrained("someone/tiny-gpt2").lm_head.weight, model.lm_head.weight)
    assert GPT.from_pretrained("someone/tiny-gpt2").config.rate("attn") == 0.1
    assert GPT.from_pretrained("gpt2-xl").config.rate("attn") == 0.0  # as in nanoGPT
    assert GPT.from_pretrained("gpt2", {"dropout": 0.2}).config.rate("attn") == 0.2
    assert asked == ["someone/tiny-gpt2", "someone/tiny-gpt2", "gpt2-xl", "gpt2"]


def test_a_hub_model_without_safetensors_is_fetched_as_bin(monkeypatch, model, tmp_path):
    def download(name, allow_patterns):
        if "pytorch_model*.bin" in allow_patterns:
            torch.save(hf_state(model), tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(model.config.to_hf()))
    fake_hub(monkeypatch, download)
    assert torch.equal(GPT.from_pretrained("someone/old").lm_head.weight, model.lm_head.weight)


def test_offline_the_error_says_what_to_do(monkeypatch, tmp_path):
    def offline(name, allow_patterns):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, offline)
    with pytest.raises(FileNotFoundError, match=r"'gpt2', and the Hugging Face hub gave none \(no network\). Offline"):
        GPT.from_pretrained("gpt2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        GPT.from_pretrained("gpt2")


# Saving


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_old_checkpoint(folder):
    """A real limit on the size of a file, since a full disk fails in the same call."""
    before = files_of(folder)
    larger = GPT(GPTConfig(**{**TINY, "n_embd": 600}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"while writing: '.*model.safetensors'") as caught:
            larger.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert files_of(folder) == before


@pytest.mark.parametrize("call", range(2))
def test_a_failed_sync_leaves_the_old_checkpoint(monkeypatch, folder, call):
    before, calls, sync = files_of(folder), [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) == call + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device, while writing"):
        GPT(GPTConfig(**{**TINY, "n_layer": 1})).save_pretrained(folder)
    assert files_of(folder) == before


def test_a_kill_while_saving_leaves_a_whole_checkpoint(folder):
    """Killed just before each rename: what lies there then is a whole model, the old one or the new one."""
    code = """
import os, sys, torch
from fastgpt import GPT
model, rename = GPT.from_pretrained(sys.argv[1]), os.replace
torch.nn.init.ones_(model.lm_head.weight)
def killed_after(renames):
    def replace(*paths):
        nonlocal renames
        if renames == 0:
            os._exit(9)
        renames -= 1
        rename(*paths)
    return replace
for renames in range(2):
    child = os.fork()
    if child == 0:
        os.replace = killed_after(renames)
        model.save_pretrained(sys.argv[1])
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, GPT.from_pretrained(sys.argv[1]).lm_head.weight.eq(1).all().item())
"""
    run = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["9", "False", "9", "True"]


def test_saving_where_a_file_is_says_so(model, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(NotADirectoryError, match="taken is a file; expected a directory"):
        model.save_pretrained(tmp_path / "taken")


def test_saved_files_have_the_usual_permissions(folder):
    (folder / "usual").touch()
    usual = (folder / "usual").stat().st_mode
    assert {(folder / name).stat().st_mode for name in ("config.json", "model.safetensors")} == {usual}


def test_the_saved_file_is_plain_safetensors(model, folder):
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(hf_state(model)) and "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") % 8 == 0
