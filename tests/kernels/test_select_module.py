"""The module with fused selective kernels: as the plain one, checkpointed, and on several ranks."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bigsimclr.kernels.select import Handover
from bigsimclr.models.anatomy import Memory
from bigsimclr.models.memory import save_memory
from bigsimclr.models.norm import BatchNorm, frozen_running_statistics, share_batch_norm
from bigsimclr.models.resnet import Bottleneck
from bigsimclr.models.selective import SelectiveKernel, fuse_selective_kernels
from bigsimclr.world import ALONE, World
from tests.distributed.ranks import on_ranks
from tests.kernels.test_select import DEVICE, Found, channels_last, draw, errors, worst


@pytest.fixture(autouse=True)
def exact_convolutions():
    """On a GPU they round to 10 bits, and add in any order, unless they are told not to."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


# --- the module ----------------------------------------------------------------------------------


def module(*, features: int = 10, stride: int = 1) -> SelectiveKernel:
    made = SelectiveKernel(8, features, stride=stride, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.bn.weight.copy_(draw(2 * features, seed=7))
        made.bn.bias.copy_(draw(2 * features, seed=8))
    return made.train().to(DEVICE)


def images(number: int = 6, side: int = 9) -> Tensor:
    """Images of different contrast, which the choice then tells apart."""
    contrast = torch.linspace(0.5, 2, number).view(-1, 1, 1, 1)
    return channels_last(draw(number, 8, side, side) * contrast).to(DEVICE)


def state_after(model: nn.Module, inputs: Tensor, upstream: Tensor | None = None) -> Found:
    """Outputs, all gradients and running statistics."""
    leaf = inputs.clone().requires_grad_()
    outputs = model(leaf)
    if upstream is None:
        upstream = draw(*outputs.shape, seed=9).to(DEVICE)
    outputs.backward(upstream.to(outputs.dtype))
    found = {"outputs": outputs, "inputs": leaf.grad, **dict(model.named_buffers())}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.mark.parametrize(
    ("features", "stride", "number", "side"), [(10, 1, 24, 9), (35, 2, 16, 9), (64, 2, 16, 13)]
)
def test_the_module(features: int, stride: int, number: int, side: int) -> None:
    inputs = images(number, side)
    exact, single = (module(features=features, stride=stride) for _ in range(2))
    fast = copy.deepcopy(single)
    fuse_selective_kernels(fast)
    assert list(fast.state_dict()) == list(single.state_dict())
    expected = state_after(exact.double(), inputs.double())
    wrong = errors(state_after(fast, inputs), expected)
    reference = errors(state_after(single, inputs), expected)
    print({name: (error, reference[name]) for name, error in wrong.items()})
    # The little network's norm takes away most of this gradient: what is left carries the rounding
    # of what cancelled, in plain float32 as well.
    cancelled = wrong.pop("gradient of reduce.weight")
    assert cancelled < 2e-4
    assert max(wrong.values()) < 1e-5
    # Versions of PyTorch round differently: what plain float32 has is the measure.
    for name in ("outputs", "bn.running_mean", "bn.running_var"):
        assert wrong[name] < max(1e-6, 3 * reference[name]), name


@pytest.mark.parametrize("kind", ["evaluation", "contiguous", "float64"])
def test_the_plain_code_where_kernels_do_not_fit(kind: str) -> None:
    single, inputs = module(), images()
    if kind == "evaluation":
        single.eval()
    if kind == "contiguous":
        inputs = inputs.contiguous()
    if kind == "float64":
        single, inputs = single.double(), inputs.double()
    fast = copy.deepcopy(single)
    fuse_selective_kernels(fast)
    found, expected = state_after(fast, inputs), state_after(single, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_running_statistics_can_be_left_alone() -> None:
    fast = module()
    fuse_selective_kernels(fast)
    before = {name: buffer.clone() for name, buffer in fast.named_buffers()}
    with frozen_running_statistics(fast):
        fast(images())
    assert all(torch.equal(buffer, before[name]) for name, buffer in fast.named_buffers())
    fast(images())
    assert not torch.equal(fast.bn.running_mean, before["bn.running_mean"])


def test_one_value_per_channel_is_refused() -> None:
    fast = module()
    fuse_selective_kernels(fast)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fast(images(1, 1))


# --- computed again ------------------------------------------------------------------------------


def block(memory: Memory) -> Bottleneck:
    made = Bottleneck(
        8,
        6,
        stride=2,
        projects=True,
        selective_kernel=True,
        generator=torch.Generator().manual_seed(0),
    )
    made = made.train().to(DEVICE).to(memory_format=torch.channels_last)
    nn.init.ones_(made.bn3.weight)
    fuse_selective_kernels(made)
    save_memory(made, memory)
    return made


def one_pass(model: Bottleneck) -> Tensor:
    loss = model(images()).square().sum()
    loss.backward()
    return loss


def sixteen_bits(model: Bottleneck) -> Tensor:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outputs = model(images())
    loss = outputs.float().square().sum()
    loss.backward()
    return loss


def forwards_before_a_backward(model: Bottleneck) -> Tensor:
    first, second = model(images()), model(images().flip(0))
    loss = (first * second.detach()).sum() + second.square().sum()
    loss.backward()
    return loss


def moved_before_the_backward(model: Bottleneck) -> Tensor:
    loss = model(images()).square().sum()
    model.eval()
    with frozen_running_statistics(model):
        loss.backward()
    return loss


WAYS = [one_pass, sixteen_bits, forwards_before_a_backward, moved_before_the_backward]


@pytest.mark.parametrize("step", WAYS)
def test_the_same_bits_in_less_memory(step) -> None:
    states = []
    for memory in ("none", "selective", "block"):
        model = block(memory)
        loss = step(model)
        state = {"loss": loss, **dict(model.named_buffers())}
        states.append(state | {f"gradient of {n}": p.grad for n, p in model.named_parameters()})
        assert all(m.note is None for m in model.modules() if isinstance(m, BatchNorm))
    for state in states[1:]:
        assert [name for name in state if not torch.equal(state[name], states[0][name])] == []


def test_what_is_left_for_pooling_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Handover] = []
    record = Handover.__init__

    def init(self: Handover) -> None:
        record(self)
        made.append(self)

    monkeypatch.setattr(Handover, "__init__", init)
    one_pass(block("block"))
    assert len(made) == 2  # one of the first pass, which works, and one of the second
    for handover in made:
        with pytest.raises(RuntimeError, match="follows that of the mixed"):
            handover.take()


# --- several ranks -------------------------------------------------------------------------------

ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="two ranks need two GPUs, or the interpreter")


def of_rank(world: World, *, memory: Memory) -> dict[str, list]:
    model = block(memory)
    share_batch_norm(model, world)
    inputs = images().chunk(world.size)[world.rank]
    upstream = draw(6, 24, 5, 5, seed=9).to(DEVICE).chunk(world.size)[world.rank]
    return {name: value.tolist() for name, value in state_after(model, inputs, upstream).items()}


@ON_CPU
def test_two_ranks_are_one_process() -> None:
    whole = of_rank(ALONE, memory="none")
    parts = on_ranks(2, partial(of_rank, memory="none"))
    for name, expected in whole.items():
        values = [torch.tensor(part[name], dtype=torch.float64) for part in parts]
        if name in ("outputs", "inputs"):
            found = torch.cat(values)
        elif "running" in name:
            assert torch.equal(*values)
            found = values[0]
        else:
            found = values[0] + values[1]
        error = worst(found, torch.tensor(expected, dtype=torch.float64))
        print(name, error)
        assert error < 5e-6, name


@ON_CPU
@pytest.mark.slow
@pytest.mark.parametrize("memory", ["selective", "block"])
def test_the_same_bits_on_two_ranks_in_less_memory(memory: Memory) -> None:
    parts = on_ranks(2, partial(of_rank, memory="none"))
    assert on_ranks(2, partial(of_rank, memory=memory)) == parts
