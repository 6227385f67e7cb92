"""Costs: every count equals what the networks themselves do."""

import functools
import itertools
from collections.abc import Iterable
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bigsimclr.models import Architecture, build_model
from bigsimclr.models.anatomy import DEPTHS, Memory
from bigsimclr.models.cost import Cost, Part, Precision, cost
from bigsimclr.models.memory import save_memory
from bigsimclr.models.simclr import Outputs, SimCLR
from bigsimclr.recipe.sections import HeadSection, ResNetBackbone
from tests.models.live import Live

WIDTHS = (1.0, 2.0, 0.375, 3.0, 1 / 16)
SIZES = (32, 65, 224, 37)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Stem = Literal["imagenet", "cifar"]

# Table 1 of arXiv 2006.10029: depth, width, selective kernels, millions of parameters. Beside
# them, of our own networks with the head: GFLOP of a forward pass at 224 pixels.
TABLE_1 = [
    (50, 1, False, 24, 8.2),
    (50, 1, True, 35, 12.4),
    (50, 2, False, 94, 32.3),
    (50, 2, True, 140, 49.4),
    (101, 1, False, 43, 15.6),
    (101, 1, True, 65, 23.7),
    (101, 2, False, 170, 62.0),
    (101, 2, True, 257, 94.9),
    (152, 1, False, 58, 23.0),
    (152, 1, True, 89, 35.1),
    (152, 2, False, 233, 91.7),
    (152, 2, True, 354, 140.3),
    (152, 3, True, 795, 315.6),
]


def network(
    depth: int,
    width: float = 1.0,
    selective_kernel: bool = False,
    stem: Stem = "imagenet",
    *,
    classes: int | None = 10,
) -> Architecture:
    backbone = ResNetBackbone(
        depth=depth, width=width, selective_kernel=selective_kernel, stem=stem
    )
    return Architecture(backbone, HeadSection(output_width=48), classes, from_layer=0)


def numbers(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def flops(model: SimCLR, size: int) -> int:
    images = torch.empty(2, 3, size, size, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    views, rest = divmod(counter.get_total_flops(), 2)
    assert rest == 0
    return views


def saved_bytes(model: SimCLR, images: Tensor, precision: Precision) -> int:
    """Sum the storages that autograd keeps, each once, without the images."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    dtype = AUTOCAST.get(precision)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
    ):
        outputs = model(images)
    kept.pop(images.untyped_storage()._cdata, None)
    del outputs
    return sum(storage.nbytes() for storage in kept.values())


def activation_bytes(model: SimCLR, size: int, precision: Precision = "fp32") -> int:
    """Measure what one more view adds; weights, their copies and statistics are in both."""
    device = next(model.parameters()).device
    fewer, more = (
        saved_bytes(
            model,
            torch.zeros(views, 3, size, size, device=device).contiguous(
                memory_format=torch.channels_last
            ),
            precision,
        )
        for views in (2, 3)
    )
    return more - fewer


def agrees(architecture: Architecture, size: int) -> None:
    with torch.device("meta"):
        model = build_model(architecture, seed=0, probe=True).train()
    found = cost(architecture, image_size=size)
    for part, module in (
        (found.backbone, model.backbone),
        (found.head, model.head),
        (found.classifier, model.classifier),
    ):
        assert module is not None
        assert part.parameters == numbers(module.parameters())
        assert part.statistics == numbers(module.buffers())
    assert found.total.flops == flops(model, size)
    assert found.total.activation_bytes == activation_bytes(model, size)


@pytest.mark.slow
@pytest.mark.parametrize("selective_kernel", [False, True])
@pytest.mark.parametrize("depth", [10, 18, 34, 50, 101])
def test_counts_are_those_of_the_network(depth: int, selective_kernel: bool) -> None:
    # Widths, stems and sizes take turns; the next test tries all together.
    turn = 2 * list(DEPTHS).index(depth) + selective_kernel
    stem: Stem = "cifar" if turn % 3 == 1 else "imagenet"
    agrees(network(depth, WIDTHS[turn % 5], selective_kernel, stem), SIZES[turn * 3 // 2 % 4])


@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
def test_counts_are_those_of_every_network(depth: int) -> None:
    stems: tuple[Stem, Stem] = ("imagenet", "cifar")
    every = itertools.product(WIDTHS, (False, True), stems)
    # Five sizes against four kinds of network: each kind meets each size. The depths share them.
    kinds = zip(every, itertools.cycle((*SIZES, 1)))
    turn = list(DEPTHS).index(depth)
    for (width, selective_kernel, stem), size in itertools.islice(kinds, turn % 3, None, 3):
        agrees(network(depth, width, selective_kernel, stem), size)


@pytest.mark.parametrize(
    ("head_layers", "classes", "from_layer", "keep"),
    [
        (None, None, 0, None),
        (None, 7, 0, None),
        (3, None, 0, None),
        (3, 7, 0, None),
        (3, 7, 0, 0),
        (3, 7, 1, 1),
        (3, 7, 1, None),
        (3, 7, 3, 3),
        (1, 7, 1, None),
        (2, 7, 0, 1),
    ],
)
def test_parts_that_a_stage_keeps(
    head_layers: int | None, classes: int | None, from_layer: int, keep: int | None
) -> None:
    head = None if head_layers is None else HeadSection(layers=head_layers, output_width=48)
    architecture = Architecture(ResNetBackbone(depth=10), head, classes, from_layer, keep)
    with torch.device("meta"):
        model = build_model(architecture, seed=0).train()
    found = cost(architecture, image_size=32)
    absent = Part(0, 0, 0, 0)
    for part, module in ((found.head, model.head), (found.classifier, model.classifier)):
        assert (part == absent) == (module is None)
        if module is not None:
            assert part.parameters == numbers(module.parameters())
            assert part.statistics == numbers(module.buffers())
    assert found.total.flops == flops(model, 32)
    assert found.total.activation_bytes == activation_bytes(model, 32)
    model.eval().requires_grad_(requires_grad=False)
    if model.classifier is not None:
        model.classifier.requires_grad_(requires_grad=True)
    frozen = cost(architecture, image_size=32, frozen=True)
    assert frozen.total.activation_bytes == activation_bytes(model, 32)
    assert frozen.total.flops == found.total.flops


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("depth", "selective_kernel", "stem", "size"),
    [(18, False, "cifar", 9), (50, False, "imagenet", 37), (50, True, "imagenet", 65)],
)
def test_activations_on_a_real_device(
    depth: int, selective_kernel: bool, stem: Stem, size: int, precision: Precision
) -> None:
    architecture = network(depth, 0.25, selective_kernel, stem)
    model = build_model(architecture, seed=0, probe=True).train()
    found = cost(architecture, image_size=size, precision=precision)
    assert found.total.activation_bytes == activation_bytes(model, size, precision)


# --- what is computed again ----------------------------------------------------------------------


def pixels(views: int, size: int, device: torch.device) -> Tensor:
    images = torch.zeros(views, 3, size, size, device=device)
    return images.contiguous(memory_format=torch.channels_last)


def ends(outputs: Outputs) -> list[object]:
    """Return what holds the graph, and no result."""
    results = (outputs.projections[-1], *([] if outputs.logits is None else [outputs.logits]))
    return [result.grad_fn for result in results]


def held_bytes(model: SimCLR, size: int, precision: Precision) -> int:
    """Measure what one more view adds to all that lives between the two passes."""
    device, dtype = next(model.parameters()).device, AUTOCAST.get(precision)
    held = []
    for views in (2, 3):
        images = pixels(views, size, device)
        with (
            Live([images, *model.parameters(), *model.buffers()]) as live,
            torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
        ):
            graph = ends(model(images))
        held.append(live.now)
        del graph
    return held[1] - held[0]


@pytest.mark.parametrize("memory", ["none", "selective", "block"])
@pytest.mark.parametrize(
    ("depth", "width", "selective_kernel", "stem", "size"),
    [
        (10, 1 / 16, False, "cifar", 9),
        (34, 0.375, True, "imagenet", 65),
        (50, 0.25, False, "imagenet", 37),
        (50, 1.0, True, "cifar", 16),
        (101, 2.0, True, "imagenet", 224),
    ],
)
def test_activations_that_are_kept_all_the_same(
    depth: int, width: float, selective_kernel: bool, stem: Stem, size: int, memory: Memory
) -> None:
    architecture = network(depth, width, selective_kernel, stem)
    with torch.device("meta"):
        model = build_model(architecture, seed=0, probe=True).train()
    save_memory(model, memory)
    found = cost(architecture, image_size=size, memory=memory)
    assert found.total.activation_bytes == held_bytes(model, size, "fp32")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("memory", ["selective", "block"])
def test_activations_of_16_bits_that_are_kept_all_the_same(
    memory: Memory, precision: Precision
) -> None:
    architecture = network(50, 0.25, selective_kernel=True)
    model = build_model(architecture, seed=0, probe=True).train()
    save_memory(model, memory)
    found = cost(architecture, image_size=37, precision=precision, memory=memory)
    assert found.total.activation_bytes == held_bytes(model, 37, precision)


@pytest.mark.parametrize("selective_kernel", [False, True])
@pytest.mark.parametrize("memory", ["selective", "block"])
def test_the_peak_while_a_block_is_computed_again(memory: Memory, selective_kernel: bool) -> None:
    architecture = network(50, 1.0, selective_kernel, classes=None)
    with torch.device("meta"):
        model = build_model(architecture, seed=0).train()
    save_memory(model, memory)
    images = pixels(64, 224, torch.device("meta"))
    with Live([images, *model.parameters(), *model.buffers()]) as live:
        model(images).projections[-1].sum().backward()
    found = cost(architecture, image_size=224, memory=memory)
    assert found.again_bytes > 0
    views = 64 * (found.total.activation_bytes + found.again_bytes)
    # Where the peak is decides how many of the parameters' gradients there are.
    assert 0.95 * views < live.peak < 1.02 * (views + 4 * found.total.parameters)


@functools.cache
def flops_of_both_passes(architecture: Architecture, memory: Memory) -> int:
    with torch.device("meta"):
        model = build_model(architecture, seed=0).train()
    save_memory(model, memory)
    with FlopCounterMode(display=False) as counter:
        outputs = model(pixels(2, 65, torch.device("meta")))
        assert outputs.logits is not None
        (outputs.projections[-1].sum() + outputs.logits.sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("selective_kernel", [False, True])
@pytest.mark.parametrize("memory", ["none", "selective", "block"])
def test_arithmetic_of_what_is_computed_again(memory: Memory, selective_kernel: bool) -> None:
    architecture = network(50, 0.25, selective_kernel)
    plain, counted = (flops_of_both_passes(architecture, how) for how in ("none", memory))
    found = cost(architecture, image_size=65, memory=memory)
    assert counted - plain == 2 * found.again_flops
    # The last convolutions of bottlenecks; everything.
    share = found.again_flops / found.backbone.flops
    assert {"none": share == 0, "selective": 0.1 < share < 0.2, "block": share > 0.9}[memory]


def test_a_frozen_network_computes_nothing_again() -> None:
    architecture = network(50)
    plain = cost(architecture, image_size=64, frozen=True)
    assert cost(architecture, image_size=64, frozen=True, memory="block") == plain


@pytest.mark.parametrize(
    ("depth", "width", "selective_kernel"), [(18, 1.0, False), (50, 0.5, True), (152, 3.0, True)]
)
def test_the_largest_block(depth: int, width: float, selective_kernel: bool) -> None:
    architecture = network(depth, width, selective_kernel)
    with torch.device("meta"):
        backbone = build_model(architecture, seed=0).get_submodule("backbone")
    groups = (backbone.get_submodule(f"layer{number}") for number in (1, 2, 3, 4))
    largest = max(numbers(block.parameters()) for group in groups for block in group.children())
    assert cost(architecture, image_size=8).largest_block_parameters == largest


@pytest.mark.parametrize(("depth", "width", "selective_kernel", "millions", "giga"), TABLE_1)
def test_published_sizes(
    depth: int, width: int, selective_kernel: bool, millions: int, giga: float
) -> None:
    backbone = ResNetBackbone(depth=depth, width=float(width), selective_kernel=selective_kernel)
    found = cost(Architecture(backbone, HeadSection(), None, from_layer=0), image_size=224)
    # The published counts include the running statistics of batch norm.
    assert round((found.backbone.parameters + found.backbone.statistics) / 1e6) == millions
    assert round(found.total.flops / 1e9, 1) == giga


def test_the_largest_activation_is_that_of_the_first_group() -> None:
    found = cost(network(50, 2.0), image_size=224, precision="bf16")
    assert found.largest_activation_bytes == 2 * 512 * 56 * 56


def test_the_total_is_the_sum_of_the_parts() -> None:
    parts = [Part(1, 2, 3, 4), Part(10, 20, 30, 40), Part(100, 200, 300, 400)]
    whole = Cost(
        *parts,
        largest_activation_bytes=9,
        largest_block_parameters=8,
        again_bytes=7,
        again_flops=6,
    )
    assert whole.total == Part(111, 222, 333, 444)


def test_contradictions_are_refused() -> None:
    backbone = ResNetBackbone(depth=10)
    with pytest.raises(ValueError, match="from_layer 2: the head has 1 layers here"):
        cost(Architecture(backbone, HeadSection(), 10, 2, keep_head_layers=1), image_size=32)
    with pytest.raises(ValueError, match=r"width 0\.01 leaves fewer than 2"):
        cost(network(10, 0.01), image_size=32)
