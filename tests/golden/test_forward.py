"""Every output of the network equals that of the official code with the same weights."""

import numpy as np
import pytest
import torch

from bigsimclr.interop.tf_checkpoint import import_checkpoint
from bigsimclr.interop.tf_names import from_official, official_names
from bigsimclr.models import build_model
from bigsimclr.models.simclr import SimCLR
from tests.golden.checkpoints import checkpoints
from tests.golden.forward import CASES, FLOAT64_TOLERANCE, Case, read_case, run

pytestmark = pytest.mark.golden

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=["float32", "float64"]
)


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def case(request: pytest.FixtureRequest) -> Case:
    return read_case(request.param)


@pytest.fixture(scope="module")
def weights(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The state of our network; from plain arrays, so that no reader is needed, if there are."""
    plain = case.directory / "weights_tf1_names.npz"
    if not plain.exists():
        (path, *_) = checkpoints(case.directory, tmp_path_factory.mktemp("weights")).values()
        return import_checkpoint(path).portable.model.state_dict()
    with np.load(plain) as arrays:
        names = official_names(build_model(case.architecture, seed=0))
        return {ours: from_official(arrays[theirs]) for ours, theirs in names.items()}


def network(case: Case, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> SimCLR:
    model = build_model(case.architecture, seed=0)
    model.load_state_dict(weights, strict=True)
    return model.to(dtype)


@DTYPES
def test_evaluation_outputs(
    case: Case, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    ours = run(network(case, weights, dtype).eval(), case.images(dtype))
    assert case.too_far(ours, "eval/", case.tolerance("eval")) == {}
    if dtype == torch.float64:
        assert case.too_far(ours, "eval64/", FLOAT64_TOLERANCE) == {}


@DTYPES
def test_training_outputs_and_running_statistics(
    case: Case, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    model = network(case, weights, dtype).train()
    ours = run(model, case.images(dtype))
    assert case.too_far(ours, "train/", case.tolerance("train")) == {}
    if dtype == torch.float64:
        assert case.too_far(ours, "train64/", FLOAT64_TOLERANCE) == {}
    state = model.state_dict()
    after = {theirs: state[name].numpy() for name, theirs in official_names(model).items()}
    assert case.too_far(after, "bn_after/", case.tolerance("train_bn_after")) == {}


def test_every_official_variable_has_a_place(case: Case) -> None:
    names = set(official_names(build_model(case.architecture, seed=0)).values())
    variables = {name for name, _ in case.info["variables"] if not name.endswith("/Momentum")}
    assert names == variables - {"global_step"}


def test_cases_were_found() -> None:
    assert CASES
