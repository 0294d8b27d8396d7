"""Independent pieces of work over the cores, one thread each: small models gain nothing from threads."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch
from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_all(
    work: Callable[[Task], Result], tasks: Sequence[Task], name: str, workers: int | None = None
) -> list[Result]:
    """Run `work` on every task, in processes; results in the order of the tasks. Both must be picklable."""
    workers = workers or os.cpu_count() or 1
    results: dict[int, Result] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(work, task): index for index, task in enumerate(tasks)}
        for done in tqdm(as_completed(futures), name, total=len(tasks), unit="job"):
            results[futures[done]] = done.result()
    return [results[index] for index in range(len(tasks))]


def call(task: tuple[Callable[..., Result], tuple[object, ...]]) -> Result:
    """Return a task that is a function and its arguments."""
    function, arguments = task
    return function(*arguments)
