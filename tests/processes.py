"""Processes that tests start, with an end to their waiting, and what a function holds of memory."""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

# One thread each: a tiny model gains nothing from more, and several processes share the cores.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SECONDS = 300


def run_python(*arguments) -> subprocess.CompletedProcess:
    """Run Python with `arguments`, which must end well."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return done


def kill_when(is_time: Callable[[], bool], *arguments) -> None:
    """Run Python with `arguments` and kill it, as `kill -9` does, once `is_time()`; it must not end before that."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *map(str, arguments)], env=ENVIRONMENT, **silent)
    try:
        deadline = time.monotonic() + SECONDS
        while not is_time():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()


def spawn_two(worker: Callable, arguments: tuple) -> None:
    """Run `worker(rank, *arguments)` in two processes; one that hangs ends the test, not the suite."""
    context = torch.multiprocessing.spawn(worker, arguments, nprocs=2, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        # True when both have ended; a failure of either is raised.
        while not context.join(timeout=max(deadline - time.monotonic(), 0)):
            assert time.monotonic() < deadline, "two processes are still waiting for each other"
    finally:
        for process in context.processes:
            process.kill()


def peak_allocated(function: Callable) -> int:
    """The most bytes that torch's CPU allocator held while `function` ran, beyond those at its beginning."""
    # What earlier tests have left in cycles would be freed meanwhile, and be taken off.
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
