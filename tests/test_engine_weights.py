"""Where the engine's weights may come from: every form of a checkpoint gives the same bits, and a broken one an error."""
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from engines import Recorder, prompt, small_model

from fastgpt import LLM, SamplingParams
from fastgpt.engine import weights
from fastgpt.extension import MISSING

pytestmark = pytest.mark.skipif(bool(MISSING), reason="needs the extension")
PARAMS = SamplingParams(max_tokens=4, temperature=0)
TOKENS = list(range(1, 40))


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def bits(source, dtype="float32"):
    llm = Recorder(source, dtype)
    llm.generate(TOKENS, PARAMS)
    return llm.seen


def stored(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def store(folder, tensors):
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_directory_is_the_model(model, folder, dtype):
    assert weights.of_directory(folder) is not None
    assert bits(str(folder), dtype) == bits(model, dtype)


def test_old_names_and_mask_buffers(model, folder):
    tensors = {name.removeprefix("transformer."): t for name, t in stored(folder).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 300, 300)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    store(folder, tensors)
    assert weights.of_directory(folder) is not None
    assert bits(folder) == bits(model)


def test_shards(model, folder):
    tensors = stored(folder)
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(2):
        shard = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in names[i::2]}, folder / shard)
        weight_map.update(dict.fromkeys(names[i::2], shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert weights.of_directory(folder) is not None
    assert bits(folder) == bits(model)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": False}, {"bias": False}], ids=str)
def test_other_shapes_of_models(changes, tmp_path):
    model = small_model(**changes)
    model.save_pretrained(tmp_path)
    assert bits(tmp_path) == bits(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_other_dtypes_of_files(folder, dtype):
    store(folder, {name: t.to(dtype) for name, t in stored(folder).items()})
    twin = small_model()
    twin.load_state_dict({name: t.to(dtype).float() for name, t in twin.state_dict().items()})
    assert weights.of_directory(folder) is not None
    assert bits(folder) == bits(twin)


def test_tensors_may_lie_in_any_order(model):
    twin = small_model()
    for p in (twin.transformer.wpe.weight, twin.transformer.h[0].attn.c_attn.weight):
        p.data = p.data.t().contiguous().t()
    assert bits(twin) == bits(model)


def test_a_balance_is_of_powers_of_two_and_bounded():
    highest = np.array([1, 1, 1, 0.51, 0.49, 4, 1, 1, 0.01, 1e-9, 0], np.float32)
    assert weights.balance(highest).tolist() == [1, 1, 1, 1, 2, 1, 1, 1, 64, 1024, 1024]
    for broken in ([0, 0, 0], [1, np.nan, 1e-3]):
        assert weights.balance(np.array(broken, np.float32)).tolist() == [1, 1, 1]


def test_nanogpts_checkpoint_and_pickles(model, folder, tmp_path):
    args = {name: getattr(model.config, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd",
                                                          "n_inner", "bias", "dropout")}
    torch.save({"model": model.state_dict(), "model_args": args}, tmp_path / "ckpt.pt")
    assert bits(tmp_path / "ckpt.pt") == bits(model)
    torch.save(stored(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert bits(folder) == bits(model)


BREAKS = {
    "missing": lambda t: t.pop("transformer.h.1.mlp.c_fc.weight"),
    "shape": lambda t: t.update({"transformer.wpe.weight": torch.zeros(7, 35)}),
    "dtype": lambda t: t.update({"transformer.wpe.weight": torch.zeros(300, 35, dtype=torch.int8)}),
    "head": lambda t: t.update({"lm_head.weight": torch.zeros(61, 35)}),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_tensors_are_named(folder, kind):
    tensors = stored(folder)
    BREAKS[kind](tensors)
    store(folder, tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors.*(c_fc|wpe|lm_head)"):
        LLM(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0{}"], ids=["empty", "noise", "short"])
def test_damaged_files_are_named(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        LLM(folder)


@pytest.mark.parametrize("config", ["{", "[]", '{"n_layer": 1000000000}', '{"n_head": 0}'])
def test_bad_configs_are_named(folder, config):
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config\.json|n_layer"):
        LLM(folder)


def test_an_extra_tensor_is_ignored_with_a_warning(model, folder):
    store(folder, {**stored(folder), "transformer.extra": torch.zeros(3)})
    with pytest.warns(UserWarning, match="extra"):
        assert bits(folder) == bits(model)


def test_a_file_that_shrinks_while_it_is_read(folder):
    config, tensors = weights.of_directory(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-5000])
    with pytest.raises(ValueError, match="ends within a tensor"):
        weights.PackedWeights(config, tensors, "float32")


def test_prompts_of_any_kind_of_integers(model):
    import numpy as np
    llm = LLM(model)
    expected = llm.generate([[3, 4]], PARAMS)[0].outputs[0].token_ids
    for given in ([np.array([3, 4])], [(3, 4)], [np.array([3, 4], np.uint8)], [torch.tensor([3, 4])]):
        assert llm.generate(given, PARAMS)[0].outputs[0].token_ids == expected
    assert prompt(np.random.default_rng(0), 3) == prompt(np.random.default_rng(0), 3)
