import pytest
import torch
from numerics import check_op

from fastgpt import ops, reference

SHAPES = [(7, 3, 5), (33, 59, 111), (0, 8, 4), (130, 17, 64)]  # rows, K, N


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_values_and_gradients(shape, activation, dtype, level):
    M, K, N = shape
    inputs = {"x": torch.randn(M, K, dtype=dtype), "weight": torch.randn(N, K, dtype=dtype) / K ** 0.5,
              "bias": torch.randn(N, dtype=dtype), "residual": torch.randn(M, N, dtype=dtype)}

    def op(implementation):
        return lambda x, weight, bias, residual: implementation.linear(x, weight, bias, activation=activation,
                                                                       residual=residual)
    with ops.backend("cpp"):
        check_op(op(ops), inputs, op(reference))
        check_op(lambda x, w: ops.linear(x, w, activation=activation),
                 {"x": inputs["x"], "weight": inputs["weight"]},
                 lambda x, w: reference.linear(x, w, activation=activation))
