"""ZeRO by DeepSpeed: it partitions and communicates, and our optimizers update a rank's partition.

DeepSpeed hands an optimizer one flat tensor per rank instead of parameters, so that norms taken of
what it hands over, LARS's above all, would be no layer's. Therefore it gets an optimizer that does
nothing but tell the time; ours works on views of the flat tensor, one for each parameter, and sums
norms over the ranks. Where parameters lie in it is read from attributes that DeepSpeed does not
document, so that the extra pins its version.

Parameters stay float32, and precision is autocast's, as in every strategy.

Source: Rajbhandari et al. 2020, arXiv 1910.02054 (stages 1 to 3).
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined] # public, though not declared
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from bigsimclr.errors import MissingExtraError, RecipeError
from bigsimclr.models.simclr import SimCLR
from bigsimclr.optim import set_learning_rate
from bigsimclr.optim.tensors import check_tensors, copy_tensors, tensors_of
from bigsimclr.parallel import Choose, MakeOptimizer, Update
from bigsimclr.parallel.ddp import BUCKET_BYTES, copy_from_first
from bigsimclr.parallel.precision import Precision
from bigsimclr.parallel.shards import Part, Shards
from bigsimclr.parallel.single import trained
from bigsimclr.world import World, name_device

# DeepSpeed announces the device it has found while it is imported.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
try:
    import deepspeed
except ImportError as error:
    raise MissingExtraError(
        "parallel.strategy: deepspeed_zero1, 2 and 3 need the package deepspeed: "
        "pip install 'bigsimclr[deepspeed]'"
    ) from error

warnings.filterwarnings(
    "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning
)  # said at each of its collectives since torch 2.13
# It would compile an all-reduce of its own for CPUs, for half a minute at the start of every run.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedZero:
    """The strategy of ranks whose optimizer state, gradients or parameters DeepSpeed shares.

    Args:
        world: the ranks.
        precision: arithmetic of forward passes, and the finite check; no fp16.
        stage: what is shared: 1, optimizer state; 2, gradients, too; 3, parameters, too.
        offload: keep the partition that this rank updates, and its optimizer state, on the host.

    Raises:
        RecipeError: DeepSpeed computes on another device.
    """

    def __init__(self, world: World, precision: Precision, *, stage: int, offload: bool) -> None:
        found = deepspeed.accelerator.get_accelerator().device_name()
        if found != world.device.type:
            raise RecipeError(
                f"parallel.device: deepspeed has chosen {found}, not {world.device.type}; set the "
                f"environment variable DS_ACCELERATOR={world.device.type}"
            )
        self._world = world
        self._precision = precision
        self._stage = stage
        self._offload = offload
        self._verdict: Update | None = None  # on the update that is being made
        self._prepared: _Prepared | None = None

    def prepare(self, model: SimCLR, make_optimizer: MakeOptimizer) -> None:
        """Partition the first rank's model and make the optimizer of this rank's partition."""
        model.to(self._world.device)
        copy_from_first(model, self._world)
        with torch.no_grad():
            for parameter in model.parameters():
                # Flat tensors have no channels_last pieces. `contiguous` would keep the strides of
                # a 1 x 1 kernel, which DeepSpeed refuses.
                plain = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                parameter.data = plain.copy_(parameter)
        engine = self._start(model)
        flat, pieces = _partition(engine.optimizer, self._stage, self._world.rank)
        parts: dict[str, Part] = {}
        places: dict[str, slice] = {}
        touched: set[str] = set()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                places[name] = pieces[id(parameter)]
                parts[name] = Part(Parameter(flat[places[name]]), _shape(parameter))
                parameter.register_post_accumulate_grad_hook(partial(_note, touched, name))
            elif self._stage == 3:
                parts[name] = _frozen(parameter, self._world.rank)
        whole = tensors_of(model) if self._stage < 3 else dict(model.named_buffers())
        world = _AlsoHost(**vars(self._world)) if self._offload else self._world
        shards = Shards(world, parts, make_optimizer)
        self._prepared = _Prepared(engine, parts, places, touched, whole, shards)

    def _start(self, model: SimCLR) -> Any:
        # DeepSpeed wants a process group even for one process, and its device's number.
        if not dist.is_initialized():
            backend = "nccl" if self._world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        name_device(self._world.device)
        clock = _Clock(list(trained(model).values()), self._step)
        engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=clock, config=_config(self._stage, offload=self._offload)
        )
        if self._stage == 3:
            # Small parameters stay gathered, and what is gathered in inference mode takes no part
            # in a backward pass later on.
            offload, outside = engine.optimizer.parameter_offload, torch.inference_mode(mode=False)
            for hook in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
                setattr(offload, hook, outside(getattr(offload, hook)))
        return engine

    @property
    def _ready(self) -> "_Prepared":
        if self._prepared is None:
            raise AssertionError("prepare comes first")
        return self._prepared

    def compute(self) -> AbstractContextManager[None]:
        """Run forward passes in the recipe's precision."""
        return self._precision.compute()

    @contextmanager
    def synchronise(self, *, when: bool) -> Iterator[None]:
        """Say whether the backward pass inside is the update's last; stages 2 and 3 always send."""
        self._ready.engine.set_gradient_accumulation_boundary(when)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the parameters' gradients."""
        engine = self._ready.engine
        # What the engine's own forward pass would do: the next gradients are added to the last.
        engine.optimizer.clear_backward_seen_flag()
        engine.backward(loss, scale_wrt_gas=False)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Give the next updates this rate."""
        set_learning_rate(self._ready.shards.optimizer, learning_rate)

    def update(self) -> Update:
        """Let DeepSpeed step this rank's partition and exchange the results.

        Raises:
            NumericsError: a gradient of some rank is not finite; every rank raises.
        """
        try:
            self._ready.engine.step()
        finally:
            self._ready.touched.clear()
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            # In stage 3 and with offload DeepSpeed looks for itself, and leaves out the step.
            verdict = self._precision.judge(torch.tensor(math.inf, device=self._world.device))
        return verdict

    def _step(
        self,
        gradient: Tensor,  # [n] of this rank's partition, averaged over the ranks
    ) -> None:
        ready = self._ready
        for name, place in ready.places.items():
            # What no loss depends on has no gradient, on no rank. DeepSpeed has zeros for it, which
            # would let it decay.
            ready.parts[name].local.grad = gradient[place] if name in ready.touched else None
        self._verdict = self._precision.judge(ready.shards.gradient_norm())
        ready.shards.optimizer.step()
        for part in ready.parts.values():
            part.local.grad = None

    def whole(self) -> Iterator[Mapping[str, Tensor]]:
        """Gather what stage 3 has partitioned, one parameter after the other; then the rest."""
        ready = self._ready
        for name, part in ready.parts.items():
            if name not in ready.whole:
                yield {name: ready.shards.gather(name, part.local).to(self._world.device)}
        yield ready.whole

    def optimizer_part(self, is_kept: Choose) -> dict[str, Tensor]:
        """Gather the optimizer state, and return what this rank keeps."""
        return self._ready.shards.optimizer_part(is_kept)

    def load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take this rank's parts of saved tensors, and all of what it holds whole."""
        ready = self._ready
        wanted = {name: (part.shape, part.local.dtype) for name, part in ready.parts.items()}
        wanted |= {name: (tensor.shape, tensor.dtype) for name, tensor in ready.whole.items()}
        check_tensors(wanted, model, what="model")
        zero = ready.engine.optimizer
        if self._stage == 3:
            # Small parameters stay gathered between updates.
            zero.parameter_offload.partition_all_parameters()
        ready.shards.load_parameters(model)
        if self._stage == 3:
            # Forward passes gather from copies where the partition is on the host.
            zero._reassign_or_swap_out_partitioned_parameters(0)  # noqa: SLF001 - no public way
        copy_tensors(ready.whole, {name: model[name] for name in ready.whole}, what="model")
        ready.shards.load_optimizer(optimizer)

    def state(self) -> dict[str, float]:
        """Return nothing: there is no loss scale."""
        return self._precision.state()

    def restore(self, state: dict[str, float]) -> None:
        """Take back what `state` returned."""
        self._precision.restore(state)


@dataclass(frozen=True)
class _Prepared:
    """What exists once there is a model."""

    engine: Any
    parts: dict[str, Part]  # views of this rank's part of each parameter that is partitioned
    places: dict[str, slice]  # of the trained ones in the flat tensor
    touched: set[str]  # trained parameters that have a gradient
    whole: dict[str, Tensor]  # parameters and buffers that every rank holds
    shards: Shards


class _Clock(Optimizer):
    """What DeepSpeed takes for the optimizer: one group, no state, and `step` when it is time.

    Args:
        parameters: all that are trained.
        step: called with the gradient [n] of this rank's partition.
    """

    def __init__(self, parameters: list[Parameter], step: Callable[[Tensor], None]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self._tell = step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Pass on the gradient of the flat tensor, which has replaced the parameters."""
        (flat,) = self.param_groups[0]["params"]
        self._tell(flat.grad)
        return None


@dataclass(frozen=True)
class _AlsoHost(World):
    """A world that also takes tensors from the host, and answers there."""

    @override
    def gather(
        self,
        tensor: Tensor,  # [...]
    ) -> Tensor:  # [W, ...]
        """Collect by way of the device: the group may know no other collectives."""
        return super().gather(tensor.to(self.device)).to(tensor.device)


def _config(stage: int, *, offload: bool) -> dict[str, object]:
    bucket = BUCKET_BYTES // torch.float32.itemsize
    zero: dict[str, object] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # One step for all parameters: norms are summed over the ranks in one collective.
        "sub_group_size": 1 << 60,
        # The finite check is ours, except where DeepSpeed insists.
        "compute_grad_norm": stage == 3 or offload,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # wanted, though no batch goes through DeepSpeed
        "gradient_clipping": 0.0,  # the default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _partition(zero: Any, stage: int, rank: int) -> tuple[Tensor, dict[int, slice]]:
    """Return the flat tensor [n] that this rank updates, and where each parameter lies in it.

    Padding is left out: a parameter's places on all ranks are as long as it is.
    """
    places: dict[int, slice] = {}
    if stage < 3:
        (flat,), (parameters,) = zero.single_partition_of_fp32_groups, zero.bit16_groups
        for parameter in parameters:
            fragment = parameter._hp_mapping  # noqa: SLF001 - no public way
            address = None if fragment is None else fragment.get_hp_fragment_address()
            start, length = (0, 0) if address is None else (address.start, address.numel)
            places[id(parameter)] = slice(start, start + length)
    else:
        (flat,), (parameters,) = zero.fp32_partitioned_groups_flat, zero.fp16_groups
        start = 0
        for parameter in parameters:
            places[id(parameter)] = slice(start, start + _held(parameter, rank))
            start += parameter.partition_numel()
        if start != flat.numel():
            raise AssertionError("DeepSpeed's partition is not laid out as expected")
    return flat.detach(), places


def _held(parameter: Any, rank: int) -> int:
    """Return how many elements of a parameter this rank holds in stage 3, without padding."""
    length = int(parameter.partition_numel())
    return max(0, min(length, int(parameter.ds_numel) - rank * length))


def _frozen(parameter: Any, rank: int) -> Part:
    held = parameter.ds_tensor.detach()[: _held(parameter, rank)]
    return Part(Parameter(held, requires_grad=False), _shape(parameter))


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, of which stage 3 has left nothing."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _note(touched: set[str], name: str, _: Tensor) -> None:
    touched.add(name)
