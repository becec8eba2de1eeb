import math

import numpy as np
import pytest
import torch

from fastgpt import GPT, GPTConfig, Tokenizer
from fastgpt.evaluate import Evaluation, evaluate, plan_windows, score

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "Señor, the café opens at nine — or so they say. " * 8
CHARS = Tokenizer.characters(TEXT)
BPE = Tokenizer.train_bpe(TEXT, 300)


def make_model(vocab_size, dtype=torch.float64):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=12, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=8, initializer_range=0.3))
    return model.eval().to(dtype)


@pytest.mark.parametrize("n_tokens", [2, 3, 12, 13, 14, 25, 100, 101])
@pytest.mark.parametrize("context,stride", [(12, 12), (12, 6), (12, 1), (5, 3), (1, 1)])
def test_every_target_is_scored_once_with_the_context_promised(n_tokens, context, stride):
    length, starts, first = plan_windows(n_tokens, context, stride, 12)
    scored = [place for start, begin in zip(starts, first, strict=True) for place in range(begin, start + length)]
    assert scored == list(range(n_tokens - 1))
    for start, begin in zip(starts[1:], first[1:], strict=True):
        assert begin - start >= context - stride


def naive_nats(model, ids, context, stride):
    """The definition, one target at a time: the first window that holds it scores it."""
    nats, length = 0.0, min(context, len(ids) - 1)
    starts = sorted({min(s, len(ids) - 1 - length) for s in range(0, len(ids), stride)})
    for target in range(1, len(ids)):
        start = next(s for s in starts if target <= s + length)
        logits = model(torch.tensor([ids[start:target]]))[0][0, -1]
        nats -= torch.log_softmax(logits, -1)[ids[target]].item()
    return nats


@pytest.mark.parametrize("tokenizer", [CHARS, BPE], ids=["characters", "bpe"])
@pytest.mark.parametrize("context,stride,text",
                         [(12, 5, TEXT[:90]), (7, 7, TEXT[:91]), (12, 1, TEXT[:40]), (12, 6, "Señ")])
def test_it_is_the_definition(tokenizer, context, stride, text):
    model, ids = make_model(tokenizer.vocab_size), tokenizer.encode(text)
    result = evaluate(model, tokenizer, text, context, stride, batch=4)
    assert result.nats == pytest.approx(naive_nats(model, ids, context, stride), rel=1e-12)
    rest = text[len(tokenizer.decode(ids[:1])):]
    assert (result.tokens, result.characters, result.bytes) == (len(ids) - 1, len(rest), len(rest.encode()))
    assert (result.context, result.stride) == (context, stride)


def test_units():
    result = Evaluation(nats=math.log(2) * 60, tokens=10, characters=20, bytes=30, context=4, stride=2)
    assert result.loss == pytest.approx(6 * math.log(2)) and result.perplexity == pytest.approx(64)
    assert result.bits_per_byte == pytest.approx(2) and result.nats_per_character == pytest.approx(3 * math.log(2))
    assert Evaluation(1e6, 1, 1, 1, 1, 1).perplexity == math.inf


def test_a_model_that_knows_nothing_has_the_entropy_of_its_vocabulary():
    model = make_model(CHARS.vocab_size, torch.float32)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = evaluate(model, CHARS, TEXT)
    assert result.loss == pytest.approx(math.log(CHARS.vocab_size), rel=1e-6)
    assert (result.context, result.stride) == (12, 6)


def test_the_batch_does_not_matter():
    model, tokens = make_model(CHARS.vocab_size), np.array(CHARS.encode(TEXT))
    plan = plan_windows(len(tokens), 12, 4, 12)
    results = [score(model, tokens, plan, batch) for batch in (1, 3, 64)]
    assert {count for _, count in results} == {len(tokens) - 1}
    assert [nats for nats, _ in results] == pytest.approx([results[0][0]] * 3, rel=1e-12)


def test_bad_input_is_named():
    model = make_model(CHARS.vocab_size)
    for text in ("", "S"):
        with pytest.raises(ValueError, match=f"at least 2 tokens, got {len(text)}"):
            evaluate(model, CHARS, text)
    with pytest.raises(ValueError, match="context must be from 1 to the model's block size 12, got 13"):
        evaluate(model, CHARS, TEXT, context=13)
    for stride in (0, 13):
        with pytest.raises(ValueError, match=f"stride must be from 1 to the context 12, got {stride}"):
            evaluate(model, CHARS, TEXT, stride=stride)
    with pytest.raises(ValueError, match=f"has {BPE.vocab_size} tokens, the model only {CHARS.vocab_size}"):
        evaluate(model, BPE, TEXT)
    with pytest.raises(ValueError, match="'Q'.*is not among"):
        evaluate(model, CHARS, "Q" + TEXT)
