"""A model's attention weights against transformers'."""
import pytest
import torch
from numerics import assert_accurate

from fastgpt import GPT, GPTConfig

T = 21


def pair(folder, dtype, **changes):
    """(ours, theirs) of the same weights, in eval mode."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=3, n_head=2, initializer_range=0.3,
                                     scale_attn_by_inverse_layer_idx=True, bos_token_id=0, eos_token_id=0,
                                     attn_implementation="eager", **changes)
    theirs = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    theirs.save_pretrained(folder)
    return GPT.from_pretrained(folder), theirs


def test_equal_transformers(tmp_path, dtype):
    ours, theirs = pair(tmp_path, dtype)
    idx = torch.randint(50, (2, T))
    found = ours.attention_weights(idx)
    assert list(found) == [0, 1, 2] and {weights.dtype for weights in found.values()} == {dtype}
    with torch.no_grad():
        pytorch = theirs(idx, output_attentions=True).attentions
        truth = theirs.double()(idx, output_attentions=True).attentions
    for layer, weights in found.items():
        assert_accurate(f"layer {layer}", weights, truth[layer], pytorch[layer])
    some = ours.attention_weights(idx, layers=[2, 0], heads=[1], rows=[T - 1, 3])
    assert set(some) == {0, 2}
    for layer, weights in some.items():
        assert torch.equal(weights, found[layer][:, [1]][:, :, [T - 1, 3]])


def test_the_model_is_left_as_it_was():
    model = GPT(GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=24)).eval()
    idx = torch.randint(50, (2, T))
    before = model(idx)[0]
    for wrong, message in (({"heads": [2]}, "heads must be ints in"), ({"rows": [T]}, "rows must be ints in"),
                           ({"layers": [2]}, r"layers must be ints in \[0, 2\), got 2"), ({"layers": [-1]}, "layers must be")):
        with pytest.raises(ValueError, match=f"attention_weights: {message}"):
            model.attention_weights(idx, **wrong)
    weights = model.attention_weights(idx, rows=[T - 1])
    assert all(w.shape == (2, 2, 1, T) and not w.requires_grad for w in weights.values())
    assert not any(module._forward_hooks for module in model.modules()) and torch.equal(model(idx)[0], before)
