"""How a next token is chosen, in PyTorch: the reference of the engine's sampler (csrc/cpu/sampling.inl).

The order is Hugging Face's: penalties, bias, temperature, top-k, softmax, top-p, min-p. Without a seed the draw is
`torch.multinomial` on torch's generator, as in nanoGPT. With one it inverts the cumulative distribution at a number
that is a pure function of (seed, sample, position), so that a request replays alone, whatever else is in its batch.
"""
import torch


def choose(logits, params, counts=None, uniforms=None):
    """The next token of every row: logits (R, V) -> ids (R,).

    counts (R, V): how often a row has got each token, -1 for one that its prompt alone holds; needed for penalties.
    uniforms (R,) float64 in [0, 1): what each row draws; None draws from torch's generator.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=bool(params.logit_bias))
    if counts is not None:
        logits = _penalised(logits, params, counts)
    for token, bias in params.logit_bias.items():
        if token < logits.shape[1]:
            logits[:, token] += bias
    if not torch.isfinite(logits.amax(-1)).all():
        raise ValueError("the model's logits are not finite: there is no distribution to draw from")
    if params.temperature == 0:
        return logits.argmax(-1)
    probs = distribution(logits, params)
    return torch.multinomial(probs, 1)[:, 0] if uniforms is None else _invert(probs, uniforms)


def _penalised(logits, params, counts):
    penalty = params.repetition_penalty
    logits = torch.where(counts != 0, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    return logits - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts.clamp(min=0)


def distribution(logits, params):
    """What is drawn from, (R, V), not normalised again after the last filters."""
    logits = logits / params.temperature
    if params.top_k is not None:
        kth = torch.topk(logits, min(params.top_k, logits.shape[-1])).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = torch.softmax(logits, dim=-1)
    if params.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        covered = ordered.cumsum(-1) - ordered >= params.top_p  # the likelier tokens have the mass already
        probs = probs.masked_fill(torch.zeros_like(covered).scatter(-1, order, covered), 0.0)
    if params.min_p > 0.0:
        probs = probs.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs


def _invert(probs, uniforms):
    cdf = probs.double().cumsum(-1)
    # right: the first token whose cumulative mass exceeds the target, so never one of probability 0
    return torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)[:, 0]
