"""Walk through a loader again and again while its workers are killed; a process of its own.

Run as `python -m tests.data.kills FOLDER SEED DEATHS PAUSE_SECONDS`. Goes on until so many deaths
were noticed: a worker that dies when its last work is done is missed by nobody. Prints one JSON
object: how many walks ended with the undisturbed view hash, every other ending in words, how many
workers were killed, and what was logged.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from bigsimclr.augment import ViewSettings
from bigsimclr.data.folder import FolderSource, training_folder
from bigsimclr.data.loader import Batch, Loader, view_hash
from bigsimclr.data.steps import Means
from bigsimclr.errors import DataError

STEPS = 6


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def walked(source: FolderSource, pause: float) -> tuple[str, float]:
    """Return the view hash and a sum over all pixels."""
    loader = Loader(
        source,
        indices=np.arange(len(source)),
        labels=source.labels,
        settings=ViewSettings(image_size=32),
        views=2,
        seed=3,
        global_batch=96,
        means=Means(workers=2),
    )
    batches = []
    for batch in loader.batches(0, STEPS):
        batches.append(batch)
        until = time.monotonic() + pause  # a step, in which nobody waits for workers
        while time.monotonic() < until:
            pass
    whole = Batch.join(batches)
    return view_hash(whole), float(whole.pixels.double().sum())


def kill_one(rng: random.Random, longest: float, killed: list[int], over: threading.Event) -> None:
    over.wait(rng.uniform(0, longest))
    workers = [child.pid for child in multiprocessing.active_children()]
    if workers and not over.is_set():
        victim = rng.choice(workers)
        if victim is not None:
            with contextlib.suppress(ProcessLookupError):  # its walk has just ended
                os.kill(victim, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV]))
                killed.append(victim)


def main(folder: str, seed: str, deaths: str, pause: str) -> None:
    torch.set_num_threads(1)
    logged = Kept()
    logging.getLogger("bigsimclr.data.workers").addHandler(logged)
    source = training_folder(Path(folder), ".", labelled=False)
    start = time.monotonic()
    expected = walked(source, float(pause))
    longest = time.monotonic() - start
    rng, killed, endings = random.Random(int(seed)), list[int](), Counter[str]()
    while len(logged.messages) < int(deaths):
        over = threading.Event()
        killer = threading.Thread(target=kill_one, args=(rng, longest, killed, over))
        killer.start()
        try:
            endings["same" if walked(source, float(pause)) == expected else "DIFFERENT"] += 1
        except DataError as error:
            endings[f"named: {error}"] += 1
        over.set()
        killer.join()
        if multiprocessing.active_children():
            endings["a worker outlived its loader"] += 1
    found = {"killed": len(killed), "endings": endings, "logged": logged.messages}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
