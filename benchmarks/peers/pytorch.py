"""The models that fastgpt is held against: nanoGPT's architecture in plain PyTorch, and transformers' GPT-2.

`NanoGPT` keeps nanoGPT's contract (Karpathy, github.com/karpathy/nanoGPT: parameter names, tied head, exact GELU,
PyTorch's SDPA), so that one state dict serves all. transformers stores its matrices transposed.
"""
import torch
import torch.nn.functional as F
from torch import nn

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class Norm(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):  # (B, T, C)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Layer(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = Norm(C), Attention(C, heads), Norm(C), MLP(C)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """config: a fastgpt.GPTConfig, of which the sizes are used. forward(idx, targets) -> loss, of (B, T) token ids."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, C), "wpe": nn.Embedding(config.block_size, C),
            "h": nn.ModuleList(Layer(C, config.n_head) for _ in range(config.n_layer)), "ln_f": Norm(C)})
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets):
        T = self.transformer
        x = T.wte(idx) + T.wpe(torch.arange(idx.shape[1], device=idx.device))
        for layer in T.h:
            x = layer(x)
        logits = self.lm_head(T.ln_f(x))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Transformers(nn.Module):
    """transformers' GPT2LMHeadModel under the same forward; exact GELU and no dropout, as nanoGPT has them."""

    def __init__(self, config):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel
        self.model = GPT2LMHeadModel(GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
            n_head=config.n_head, activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=None, eos_token_id=None))

    def load_state_dict(self, state, strict=True):
        state = {name: t.t() if name.endswith(TRANSPOSED) else t for name, t in state.items()}
        return self.model.load_state_dict(state, strict=strict)

    def forward(self, idx, targets):
        logits = self.model(idx, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def adamw(model, learning_rate, weight_decay, betas):
    """nanoGPT's groups (matrices decay, vectors do not), fused: PyTorch's fastest AdamW."""
    decays = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
