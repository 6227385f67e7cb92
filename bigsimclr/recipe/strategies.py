"""The section `parallel`: how ranks share the work, and what every rank does alike.

The number of ranks is no key: it is that of the processes which were started together.
"""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from bigsimclr.recipe.sections import Section

StrategyName = Literal[
    "ddp", "zero1", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"
]


class ParallelSection(Section):
    """How ranks share the work, on which device, in which precision."""

    strategy: StrategyName = "ddp"
    """ddp: every rank holds everything; on one rank, plain training. zero1: as ddp, but one rank
    each holds and updates a parameter's optimizer state; for big networks. fsdp2: parameters,
    gradients and optimizer state are sharded. deepspeed_zero1, 2, 3: DeepSpeed's (extra
    `deepspeed`), with our optimizers inside."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one, else the CPU; the log says which."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the network's arithmetic; losses and statistics stay fp32. fp16 scales its loss."""
    memory: Literal["auto", "none", "selective", "block"] = "none"
    """What is computed again in the backward pass instead of kept: nothing; all between the
    convolutions and the last one of a bottleneck, for 5 to 7% more arithmetic; all inside a
    residual block, for a third more. auto: the first of these that every GPU has memory for, found
    by trying; none on a CPU. Loss and gradient stay the same."""
    kernels: Literal["auto", "plain", "triton"] = "auto"
    """Fused Triton kernels or plain PyTorch, which compute the same functions; auto: fused on a
    GPU. The log says which."""
    cuda_graph: bool = False
    """ddp and zero1 on a GPU, without micro-batches. Record forward pass, loss and backward pass
    once and replay them with one launch: for small networks or batches, whose launches take longer
    than their work. The numbers stay the same."""
    sync_group_size: PositiveInt | None = None
    """Ranks that share their batch norm statistics; null: all of them, so that the number of ranks
    changes nothing."""
    gradient_exchange: Literal["fp32", "bf16"] = "fp32"
    """ddp and zero1 only. Type in which gradients are added up over the ranks; bf16 halves the
    traffic and rounds every sum to three digits, alike on all ranks."""
    reshard: bool = True
    """fsdp2 only. Free a block's gathered parameters after its forward pass; false keeps them for
    the backward pass: more memory, less traffic."""
    offload: bool = False
    """deepspeed only. Keep the optimizer state in host memory."""
    cpu_threads: PositiveInt | None = None
    """Threads of CPU arithmetic; null: one per core, shared among the ranks of a machine. Another
    number may change last bits."""
    deterministic: bool = False
    """Refuse GPU kernels whose result changes from run to run; slower."""
    hang_seconds: PositiveFloat = 300.0
    """Seconds without a sign of life or progress after which a rank is named and the run ends;
    three times as many before the third update."""
