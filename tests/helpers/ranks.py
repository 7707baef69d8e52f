"""Processes that train together on one machine, and how they end."""

import os
import time

from torch import distributed


def join(folder, rank, count):
    """Take part in a group of `count` processes that meet in a folder."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count
    )


def leave_together(folder, rank, count):
    """End this process once all are done, without taking its gloo threads down.

    gloo aborts a process whose peer leaves amid a collective, a barrier included, and now and then one whose
    threads still run when Python ends (`terminate called without an active exception`). Files say that all
    collectives are over, and the process ends at once.
    """
    (folder / f"left-{rank}").touch()
    waiting_until = time.monotonic() + 60
    while not all((folder / f"left-{i}").exists() for i in range(count)):
        if time.monotonic() > waiting_until:
            raise TimeoutError("another rank has not come to its end")
        time.sleep(0.01)
    os._exit(0)
