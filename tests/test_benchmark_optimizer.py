"""The methods that benchmarks.optimizer compares compute what they are said to."""

import pytest
import torch
from torch.nn import Parameter

from benchmarks.optimizer_methods import Parameters, error, loop, plain, sgd


def parameters() -> Parameters:
    generator = torch.Generator().manual_seed(0)
    made = [Parameter(torch.randn(*shape, generator=generator)) for shape in [(8, 9), (7,)]]
    for parameter in made:
        parameter.grad = 1e-2 * torch.randn(parameter.shape, generator=generator)
    return Parameters(made[:1], made[1:])


@pytest.mark.parametrize("make", [plain, loop, sgd])
def test_a_method_follows_its_definition(make) -> None:
    given = parameters()
    initial = [parameter.detach().clone() for parameter in given]
    assert error(make.__name__, make, given, initial) < 1e-5


@pytest.mark.parametrize(("make", "other"), [(plain, "loop"), (loop, "plain"), (sgd, "plain")])
def test_a_method_that_computes_something_else_is_found(make, other) -> None:
    given = parameters()
    initial = [parameter.detach().clone() for parameter in given]
    for parameter in given.kernels:
        parameter.grad = parameter.detach() * -1e-3  # decay and gradient are comparable
    with pytest.raises(AssertionError, match="something else"):
        error(other, make, given, initial)
