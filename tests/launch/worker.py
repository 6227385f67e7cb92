"""A little job: several ranks that compute a sum over all of them in every step.

    python -m tests.launch.worker RANKS FOLDER STEPS HANG_SECONDS [TROUBLE...]

starts them. Each leaves its process id in FOLDER/RANK.pid in its fifth step. TROUBLE is a word and
a rank: sleep-1 (in the phase data), sleep-forward-1, slow-1, slower-1, exit3-1.
"""

import logging
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from bigsimclr.engine.liveness import Pulse
from bigsimclr.engine.stop import StopRequest
from bigsimclr.errors import BigSimCLRError, DataError, DistributedError, Stopped
from bigsimclr.launch.local import is_rank, run_command
from bigsimclr.world import World

TROUBLE_AT = 7  # step
STEP_SECONDS = {"slow": 0.03, "slower": 0.0115}


def main() -> None:
    folder, steps, hang_seconds = Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    here = {name.removesuffix(f"-{rank}") for name in sys.argv[5:] if name.endswith(f"-{rank}")}
    dist.init_process_group("gloo")
    store = dist.distributed_c10d._get_default_store()
    world = World(rank, size, torch.device("cpu"))
    pulse = Pulse(store, rank, size, hang_seconds=hang_seconds, stacks=folder / "stacks")
    with StopRequest() as stop, pulse:
        for step in range(steps):
            _step(world, pulse, step, here if step >= TROUBLE_AT else set())
            if step == 5:
                (folder / f"{rank}.pid").write_text(str(os.getpid()))
            if world.total(torch.tensor(float(stop.received is not None))) > 0:
                # As `join_world` does: threads of gloo that are left may end a process by SIGABRT.
                dist.destroy_process_group()
                raise Stopped("on request")
    dist.destroy_process_group()
    print(f"rank {rank} done")


def _step(world: World, pulse: Pulse, step: int, troubles: set[str]) -> None:
    pulse.at("data", step)
    if "sleep" in troubles:
        time.sleep(3600)
    if "exit3" in troubles:
        raise DataError("an image is missing")
    pulse.at("forward", step)
    if "sleep-forward" in troubles:
        time.sleep(3600)
    started = time.monotonic()
    time.sleep(max([0.01, *(STEP_SECONDS.get(trouble, 0) for trouble in troubles)]))
    pulse.step_took(time.monotonic() - started)
    try:
        assert world.total(torch.tensor(1.0)) == world.size
    except RuntimeError as error:
        raise DistributedError("a collective was broken off") from error
    pulse.at("update", step)


if __name__ == "__main__":
    try:
        if not is_rank():
            command = [sys.executable, "-m", "tests.launch.worker", *sys.argv[1:]]
            sys.exit(run_command(int(sys.argv[1]), command))
        main()
    except BigSimCLRError as error:
        sys.stderr.write(f"{error}\n")  # in one write, or the lines of two ranks mix
        sys.exit(error.exit_code)
