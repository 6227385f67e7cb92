"""What fits into memory, found by trying."""

import gc
import logging
from collections.abc import Callable
from functools import partial
from typing import Final

import torch

from bigsimclr.errors import RecipeError
from bigsimclr.models.anatomy import Memory
from bigsimclr.world import World

logger = logging.getLogger(__name__)

_FEWEST: Final = 2
"""Batch norm needs two images."""
_SIGNS: Final = ("out of memory", "allocate memory", "ALLOC_FAILED")
"""In the message of a RuntimeError: CUDA and its allocator, the host's allocator, CUDA libraries.
Which of them notices first that nothing is left is a matter of chance."""


def find_micro_batch(try_one: Callable[[int], None], rank_batch: int, world: World) -> int:
    """Return the most images per forward pass that every rank has memory for.

    The rank's whole share is tried first, then its smaller divisors, so that all passes of an
    update are alike. All ranks make the same tries. A GPU says when its memory ends; a host that
    promises more than it has ends the process instead.

    Args:
        try_one: takes forward and backward passes with so many images, with the optimizer's state
            in place, and leaves nothing behind. It waits for no other rank: one without memory
            would not come.
        rank_batch: images per update on one rank.
        world: the ranks that must agree.

    Raises:
        RecipeError: not even the fewest images fit; every rank raises it.
    """
    sizes = [
        size
        for size in range(rank_batch, 0, -1)
        if rank_batch % size == 0 and (size >= _FEWEST or size == rank_batch)
    ]
    for size in sizes:
        without = _ranks_without(partial(try_one, size), world)
        if not without:
            logger.info("micro-batch: %d of %d images per rank fit", size, rank_batch)
            return size
        logger.info("micro-batch: %d images do not fit on %d ranks", size, without)
    raise RecipeError(
        f"batch.micro_batch: of {rank_batch} images per rank not even {sizes[-1]} fit at once; "
        "parallel.memory=block, parallel.precision=bf16, parallel.strategy=fsdp2 and a smaller "
        "augment.image_size take less memory"
    )


def find_memory(try_one: Callable[[Memory], None], world: World) -> Memory:
    """Return the first way to save memory with which every rank has enough.

    Args:
        try_one: as for `find_micro_batch`, with one way and the images of a forward pass.
        world: the ranks that must agree.

    Returns:
        none, selective or block; block also where not even that fits.
    """
    levers: tuple[Memory, ...] = ("none", "selective")
    for memory in levers:
        without = _ranks_without(partial(try_one, memory), world)
        if not without:
            logger.info("memory: %s", memory)
            return memory
        logger.info("memory: %s does not fit on %d ranks", memory, without)
    logger.info("memory: block")
    return "block"


def _ranks_without(attempt: Callable[[], None], world: World) -> int:
    """Count the ranks whose memory an attempt exceeds; the same on all."""
    fits = torch.tensor(_fits(attempt), dtype=torch.int64, device=world.device)
    return world.size - int(world.gather(fits).sum())


def _fits(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except RuntimeError as error:
        ended = isinstance(error, torch.OutOfMemoryError)
        if not (ended or any(sign in str(error) for sign in _SIGNS)):
            raise
    else:
        return True
    # The traceback, which held on to the tensors of the attempt, is gone here. What the graph ties
    # into cycles is not.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False
