"""`GPT.generate` on the engine: when it takes over, and that it never answers with weights of the past."""
import copy
import weakref

import pytest
import torch
from engines import small_model
from processes import run_python

from fastgpt import GPT, LLM, SamplingParams, ops
from fastgpt.engine import in_model

pytestmark = pytest.mark.skipif(bool(in_model.MISSING), reason="needs the extension")
PARAMS = SamplingParams(max_tokens=9)


def greedy(model):
    return model.generate([[1, 2, 3]], 9, temperature=0)[0]


def by_the_ops(model):
    with ops.backend("reference"):
        return greedy(model)


CHANGES = {
    "in place": lambda m: m.transformer.h[1].mlp.c_fc.weight.mul_(-1),
    "by .data": lambda m: m.transformer.h[0].attn.c_attn.weight.data.neg_(),
    "another tensor": lambda m: setattr(m.transformer.h[0].mlp.c_proj, "weight",
                                        torch.nn.Parameter(-m.transformer.h[0].mlp.c_proj.weight)),
    "a state dict": lambda m: m.load_state_dict(small_model(initializer_range=0.3).state_dict()),
    "a bias": lambda m: m.transformer.ln_f.bias.add_(torch.randn(35)),
    "positions": lambda m: m.transformer.wpe.weight.copy_(m.transformer.wpe.weight.flip(0)),
    "numpy": lambda m: m.lm_head.weight.detach().numpy().__imul__(-1),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_weights_are_seen(change):
    model = small_model(initializer_range=0.4)
    before = greedy(model)
    assert before == by_the_ops(model)
    CHANGES[change](model)
    assert greedy(model) == by_the_ops(model) != before


def test_the_engine_is_kept_while_nothing_changes_and_goes_with_the_model():
    model = small_model()
    greedy(model)
    engine = in_model._engines[model][1]
    greedy(model)
    assert in_model._engines[model][1] is engine
    other = copy.deepcopy(model)
    assert other not in in_model._engines
    count = len(in_model._engines)
    del model, engine
    assert len(in_model._engines) == count - 1


def test_the_engine_goes_when_the_weights_leave(monkeypatch):
    """At once, and a GPU's also when they are converted, since it reads them where they were; the CPU's has copies."""
    model = small_model()
    greedy(model)
    model.to("cpu").bfloat16().float()
    assert model in in_model._engines
    model.to("meta")
    assert model not in in_model._engines
    for move in (lambda m: m.to("meta"), lambda m: m.bfloat16()):
        model = small_model()
        greedy(model)
        state, engine = in_model._engines[model]
        in_model._engines[model] = ("cuda:0", *state[1:]), engine
        with monkeypatch.context() as patch:
            patch.setattr(in_model, "device_of", lambda m: m.lm_head.weight.device.type.replace("cpu", "cuda:0"))
            model.to("cpu")
            assert model in in_model._engines
            move(model)
            assert model not in in_model._engines


def test_a_larger_cache_is_made_when_the_smaller_one_is_gone(monkeypatch):
    model, gone = small_model(), []
    rows = [[i] for i in range(40)]
    expected = model.generate(rows, 50, temperature=0)
    model = small_model()
    greedy(model)
    engine = in_model._engines[model][1]
    before, make = weakref.ref(engine.runner), engine._backend.runner
    monkeypatch.setattr(engine._backend, "runner", lambda *sizes: gone.append(before() is None) or make(*sizes))
    assert model.generate(rows, 50, temperature=0) == expected and gone == [True]

    def none(*sizes):
        raise MemoryError("none left")
    monkeypatch.setattr(engine._backend, "runner", none)
    with pytest.raises(MemoryError, match="none left"):
        model.generate(rows, 200, temperature=0)
    monkeypatch.undo()
    assert model.generate(rows, 50, temperature=0) == expected


def test_other_kernels_than_the_engines_are_refused_by_name():
    model = small_model()
    llm = LLM(model)
    with ops.backend("reference"), pytest.raises(RuntimeError, match="GPT.generate runs on the reference"):
        llm.generate([[1]], PARAMS)
    code = "import fastgpt; fastgpt.LLM('nowhere')"
    for name in ("reference", "triton", "refrence"):
        result = run_python(code, FASTGPT_BACKEND=name)
        assert f"RuntimeError: fastgpt.LLM: the backend {name!r} was asked for" in result.stderr


class Doubled(GPT):
    pass


REFUSALS = {
    "dropout": (lambda: small_model(dropout=0.1).train(), "training mode"),
    "double": (lambda: small_model().double(), "float64"),
    "mixed": (lambda: _mixed(), "bfloat16, torch.float32"),
    "hook": (lambda: _hooked(), "hooks"),
    "module": (lambda: _replaced(), "modules"),
    "forward": (lambda: _patched(), "modules"),
    "subclass": (lambda: Doubled(small_model().config).eval(), "not a plain"),
    "head": (lambda: _changed(lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(-m.lm_head.weight.detach()))),
             "sizes"),
    "vocabulary": (lambda: _changed(_resize), "sizes"),
    "positions": (lambda: _changed(lambda m: setattr(m.transformer.wpe, "weight", torch.nn.Parameter(torch.zeros(7, 35)))),
                  "sizes"),
    "eps": (lambda: _changed(lambda m: setattr(m.transformer.ln_f, "eps", 0.1)), "switches"),
    "scale": (lambda: _changed(lambda m: setattr(m.transformer.h[0].attn, "scale", 2.0)), "switches"),
    "activation": (lambda: _changed(lambda m: setattr(m.transformer.h[1].mlp.c_fc, "activation", "relu")), "switches"),
    "one block's dropout": (lambda: _changed(lambda m: m.transformer.h[0].train(), dropout=0.1), "training mode"),
    "elsewhere": (lambda: _changed(lambda m: m.transformer.h[0].to("meta")), "not all on the CPU"),
}


def _changed(change, **settings):
    model = small_model(**settings)
    change(model)
    return model


def _resize(model):
    model.lm_head.weight = model.transformer.wte.weight = torch.nn.Parameter(torch.randn(71, 35))


def _mixed():
    model = small_model()
    model.transformer.ln_f.bfloat16()
    return model


def _hooked():
    model = small_model()
    model.transformer.h[0].register_forward_hook(lambda *_: None)
    return model


def _replaced():
    model = small_model()
    model.transformer.h[0].mlp = torch.nn.Identity()
    return model


def _patched():
    model = small_model()
    model.transformer.h[0].forward = model.transformer.h[0].forward
    return model


@pytest.mark.parametrize("kind", REFUSALS)
def test_models_that_it_cannot_take(kind):
    make, reason = REFUSALS[kind]
    assert reason in in_model.why_not(make())


def test_calls_that_it_leaves_to_the_ops():
    model = small_model()
    assert in_model.why_not(model, [[1, 2]], PARAMS) is None
    assert "longer than the context" in in_model.why_not(model, [[1] * 300], PARAMS)
    with ops.backend("reference"):
        assert "reference" in in_model.why_not(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in in_model.why_not(model)


def test_more_rows_than_the_cache_held():
    model = small_model()
    assert len(model.generate(torch.tensor([[1, 2, 3]]), 200, temperature=0, n=9)) == 9
    rows = model.generate([[i] for i in range(40)], 100, temperature=0)
    assert rows[7] == model.generate([[7]], 100, temperature=0)[0]


def test_a_streamer_that_generates_with_the_same_model():
    model, inner = small_model(), []
    expected = model.generate([[4, 5]], 150, temperature=0)

    def ask(row, token):
        if not inner:
            inner.append(model.generate([[4, 5]], 150, temperature=0))

    model.generate([[1, 2, 3]], 200, temperature=0, streamer=ask)
    assert inner[0] == expected


def test_without_a_seed_a_batch_draws_what_the_ops_draw():
    model = small_model()
    for prompts in ([[1] * 280, [2] * 280], [[3], [4, 5]]):
        torch.manual_seed(5)
        ours = model.generate(prompts, 10, temperature=0.9, n=2)
        torch.manual_seed(5)
        with ops.backend("reference"):
            assert model.generate(prompts, 10, temperature=0.9, n=2) == ours


def test_another_dtype():
    model = small_model()
    in_model.use_dtype(model, "int8")
    assert len(greedy(model)) == 12
    assert in_model._engines[model][1].dtype == "int8"
    with pytest.raises(ValueError, match="decode engine"):
        in_model.use_dtype(small_model().double(), "int8")
