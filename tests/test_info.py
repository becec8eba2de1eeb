import torch
from processes import run_python

from fastgpt import ops
from fastgpt import extension
from fastgpt.info import report

PRINT = "from fastgpt.info import report; print(report())"


def row(text, name):
    return next(line for line in text.splitlines() if line.split()[:1] == [name])


def test_the_report_names_what_matters():
    text = report()
    for word in ("Python", "torch " + torch.__version__, "numpy", "triton", "transformers", "processor", "threads",
                 "PyTorch's own ops", "build", "GPU", "FASTGPT_BACKEND", "FASTGPT_CPU_ISA", "FASTGPT_BUILD"):
        assert word in text, word
    if not extension.MISSING:
        assert extension._C.BUILD in text and row(text, extension.LEVEL).endswith(extension.LEVEL_REASON)
        for level in extension.LEVELS:
            assert (extension.level_refusal(level) or "") in row(text, level)
        assert str(extension.get_num_threads()) in row(text, "threads") and extension.THREADS_REASON in text
    assert max(map(len, text.splitlines())) < 250


def test_every_op_on_every_device_and_dtype_has_its_answer_and_reason():
    text = report()
    header = row(text, "ops").split()[1:]
    columns = list(zip(header[::2], header[1::2], strict=True))
    assert columns == [(d, t) for d in ("cpu", "cuda") for t in ("float32", "bfloat16", "float16")]
    for op in ops.OPS:
        cells = row(text, op).split()[1:]
        for (device, dtype), name, number in zip(columns, cells[::2], cells[1::2], strict=True):
            expected = ops.resolve(op, torch.empty(1, dtype=getattr(torch, dtype)), device=device)
            reason = next(line for line in text.splitlines() if line.startswith(f"  {number} "))
            assert (name, reason) == (expected[0], f"  {number} {expected[1]}")


def test_a_forced_backend_shows_what_would_raise():
    with ops.backend("cpp"):
        text = report()
    assert "raises" in row(text, "attention") and ("not for cuda" in text or "can't be imported" in text)
    with ops.backend("reference"):
        assert "raises" not in report() and "asked for by" in report()


def test_the_environment_is_shown_and_nothing_heavy_imported():
    code = PRINT + "\nimport sys; assert not {'triton', 'transformers'} & set(sys.modules)"
    result = run_python(code, FASTGPT_BACKEND="reference", FASTGPT_BUILD="cpu")
    assert "FASTGPT_BACKEND=reference, FASTGPT_CPU_ISA=(not set), FASTGPT_BUILD=cpu" in result.stdout, result.stderr


def test_torchs_threads_sleep_unless_torch_was_there_first_or_the_user_chose():
    assert "asleep" in run_python(PRINT, OMP_WAIT_POLICY=None).stdout
    assert "spinning" in run_python("import torch\n" + PRINT, OMP_WAIT_POLICY=None).stdout
    assert "asleep" in run_python("import torch\n" + PRINT, OMP_WAIT_POLICY="PASSIVE").stdout
    assert "spinning" in run_python(PRINT, OMP_WAIT_POLICY="active").stdout


def test_without_the_extension_the_report_says_so():
    result = run_python(f"import sys; sys.modules['fastgpt._C'] = None\n{PRINT}")
    assert "the extension fastgpt._C can't be imported" in row(result.stdout, "build"), result.stderr
    assert "reference" in row(result.stdout, "layer_norm")
