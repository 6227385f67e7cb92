"""Computing again instead of keeping: the same numbers to the bit, in less memory."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bigsimclr.models import Architecture, build_model
from bigsimclr.models.anatomy import Memory
from bigsimclr.models.memory import save_memory
from bigsimclr.models.norm import BatchNorm, frozen_running_statistics, share_batch_norm
from bigsimclr.models.simclr import SimCLR
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from bigsimclr.world import World
from tests.distributed.ranks import on_ranks
from tests.models.live import Live

LEVERS: tuple[Memory, ...] = ("selective", "block")
State = dict[str, Tensor]


def network(depth: int = 10, *, selective_kernel: bool, memory: Memory = "none") -> SimCLR:
    """Build a narrow network in training mode, whose blocks all take part."""
    backbone = ResNetBackbone(
        depth=depth, width=1 / 16, selective_kernel=selective_kernel, stem="cifar"
    )
    architecture = Architecture(backbone, HeadSection(output_width=16), None, from_layer=0)
    model = build_model(architecture, seed=1).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BatchNorm):  # the last scale of a block starts at zero
                module.weight.fill_(0.7)
    save_memory(model, memory)
    return model


def images(number: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(number, 3, 12, 12, generator=generator, dtype=dtype)
    return drawn.contiguous(memory_format=torch.channels_last)


def one_pass(model: SimCLR) -> Tensor:
    dtype = next(model.parameters()).dtype
    loss = model(images(dtype=dtype)).projections[-1].square().sum()
    loss.backward()
    return loss


def sixteen_bits(model: SimCLR) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images()).projections[-1]
    loss = outputs.float().square().sum()
    loss.backward()
    return loss


def forwards_before_a_backward(model: SimCLR) -> Tensor:
    first, second = (model(images(seed=seed)).projections[-1] for seed in (0, 1))
    loss = (first * second.detach()).sum() + second.square().sum()
    loss.backward()
    return loss


def sixteen_bits_at_once(model: SimCLR) -> Tensor:
    """The second pass finds copies of the weights made."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = (model(images(seed=seed)).projections[-1] for seed in (0, 1))
    loss = (first.float() * second.float().detach()).sum() + second.float().square().sum()
    loss.backward()
    return loss


def frozen_while_forward(model: SimCLR) -> Tensor:
    with frozen_running_statistics(model):
        loss = model(images()).projections[-1].square().sum()
    loss.backward()
    return loss


def moved_before_the_backward(model: SimCLR) -> Tensor:
    loss = model(images()).projections[-1].square().sum()
    model.eval()
    with frozen_running_statistics(model):
        loss.backward()
    model.train()
    return loss


WAYS = [
    one_pass,
    sixteen_bits,
    sixteen_bits_at_once,
    forwards_before_a_backward,
    frozen_while_forward,
    moved_before_the_backward,
]


def state_after(step: Callable[[SimCLR], Tensor], model: SimCLR) -> State:
    """Loss, gradients and running statistics."""
    loss = step(model)
    found = {"loss": loss.detach(), **{n: b.clone() for n, b in model.named_buffers()}}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[f"gradient of {name}"] = parameter.grad
    return found


def same_bits(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("step", WAYS)
@pytest.mark.parametrize("selective_kernel", [False, True])
@pytest.mark.parametrize("memory", LEVERS)
def test_the_same_bits(
    memory: Memory, selective_kernel: bool, step: Callable[[SimCLR], Tensor]
) -> None:
    plain = network(50, selective_kernel=selective_kernel)
    expected = state_after(step, plain)
    saving = network(50, selective_kernel=selective_kernel, memory=memory)
    assert list(saving.state_dict()) == list(plain.state_dict())
    same_bits(state_after(step, saving), expected)
    assert all(m.note is None for m in saving.modules() if isinstance(m, BatchNorm))


@pytest.mark.parametrize("memory", LEVERS)
def test_the_same_bits_in_float64_without_bottlenecks(memory: Memory) -> None:
    for selective_kernel in (False, True):
        plain = network(18, selective_kernel=selective_kernel).double()
        saving = network(18, selective_kernel=selective_kernel, memory=memory).double()
        same_bits(state_after(one_pass, saving), state_after(one_pass, plain))


@pytest.mark.parametrize("memory", LEVERS)
def test_nothing_is_computed_again_where_nothing_is_trained(memory: Memory) -> None:
    plain = network(selective_kernel=True)
    saving = network(selective_kernel=True, memory=memory)
    with torch.no_grad():
        assert torch.equal(saving(images()).features, plain(images()).features)
    plain.eval()
    saving.eval()
    found, expected = saving(images()).features, plain(images()).features
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    for one, other in zip(saving.backbone.parameters(), plain.backbone.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    same_bits(dict(saving.named_buffers()), dict(plain.named_buffers()))


def test_the_lever_can_be_let_go() -> None:
    model = network(selective_kernel=False, memory="block")
    save_memory(model, "none")
    calls: list[nn.Module] = []
    first = model.backbone.get_submodule("layer1.0.conv1")
    first.register_forward_hook(lambda module, *_: calls.append(module))
    one_pass(model)
    assert len(calls) == 1


@pytest.mark.parametrize(("memory", "times"), [("selective", 2), ("block", 2)])
def test_blocks_are_computed_again(memory: Memory, times: int) -> None:
    model = network(selective_kernel=False, memory=memory)
    calls: list[nn.Module] = []
    # The second pass ends as soon as it has what it was made for: in the middle of the last norm.
    model.backbone.get_submodule("layer1.0.bn2").register_forward_pre_hook(
        lambda module, *_: calls.append(module)
    )
    one_pass(model)
    assert len(calls) == times


@pytest.mark.parametrize("selective_kernel", [False, True])
def test_less_is_kept(selective_kernel: bool) -> None:
    kept = {}
    for memory in ("none", *LEVERS):
        model = network(50, selective_kernel=selective_kernel, memory=memory)
        pixels = images()
        with Live([pixels, *model.parameters(), *model.buffers()]) as live:
            outputs = model(pixels).projections[-1]
        assert outputs.requires_grad
        kept[memory] = live.now
    assert kept["selective"] < 0.85 * kept["none"]
    assert kept["block"] < 0.6 * kept["selective"]


# --- several ranks -------------------------------------------------------------------------------


def counted(world: World, *, memory: Memory) -> tuple[list[tuple[str, list]], int]:
    """Take one pass in float64; return its state, and how often the ranks spoke."""
    model = network(10, selective_kernel=True, memory=memory).double()
    share_batch_norm(model, world)
    share = images(dtype=torch.float64).chunk(world.size)[world.rank]
    with _CountedGathers() as gathers:
        first = model(share).projections[-1]
        second = model(share.flip(0)).projections[-1]
        loss = (first * second.detach()).sum() + second.square().sum()
        loss.backward()
    found = {"loss": loss.detach(), **dict(model.named_buffers())}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return [(name, value.tolist()) for name, value in found.items()], gathers.count


class _CountedGathers(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts collective operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", LEVERS)
def test_no_collective_is_repeated(memory: Memory) -> None:
    plain = on_ranks(2, partial(counted, memory="none"))
    saving = on_ranks(2, partial(counted, memory=memory))
    assert saving == plain
    assert all(count > 0 for _, count in plain)
