"""Small valid arguments for every op, for the tests that treat all ops alike."""
import torch


def samples(dtype=torch.float32, requires_grad=False):
    """{op: (positional tensors, keyword arguments)}, one entry for every op in fastgpt.ops.OPS."""
    def t(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)

    def starts(*rows):
        return torch.tensor(rows, dtype=torch.int32)

    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, 3, -100, 6, 1])
    return {
        "layer_norm": ((t(5, 24), t(24), t(24)), {}),
        "add_layer_norm": ((t(5, 24), t(5, 24), t(24), t(24)), {}),
        "gelu": ((t(5, 24),), {"approximate": "tanh"}),
        "bias_gelu": ((t(5, 24), t(24)), {}),
        "linear": ((t(5, 24), t(7, 24), t(7)), {"activation": "gelu_tanh", "residual": t(5, 7)}),
        "attention": ((t(2, 4, 5, 8), t(2, 2, 6, 8), t(2, 2, 6, 8)), {"key_mask": torch.ones(2, 6).bool()}),
        "packed_attention": ((t(5, 4, 8), t(6, 2, 8), t(6, 2, 8), starts(0, 2, 5), starts(0, 1, 6)), {}),
        "cross_entropy": ((t(5, 24), t(7, 24), targets), {"bias": t(7)}),
    }
