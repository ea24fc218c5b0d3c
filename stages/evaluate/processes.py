"""Make the parts of an evaluation on the cores of this machine, in single-threaded processes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from stages.errors import UserError
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.evaluation import Begin, Evaluation
from stages.evaluate.threads import takes_one_thread
from stages.evaluate.worker import Worker
from stages.streams import print_warnings_in_one_line

FEW = 2  # parts that take less time than starting a process


def evaluate_over_cores(evaluation: Evaluation, begin: Begin) -> Iterator[int]:
    """Make the missing parts; yield the number of images of each finished part.

    A small denoiser on the CPU runs in as many processes as torch would use threads (`OMP_NUM_THREADS`). With few
    parts, a large denoiser or a GPU, this process makes the parts.

    Raises:
        UserError: a worker raised it, or its process ended.
    """
    worker = evaluation.new_worker()
    missing = begin(worker.load())
    count = min(torch.get_num_threads(), len(missing)) if takes_one_thread(worker.pipe) else 1
    if count == 1 or len(missing) <= FEW:
        yield from map(worker.make, missing)
    else:
        del worker
        yield from evaluate_over_processes(evaluation, missing, count)


def evaluate_over_processes(evaluation: Evaluation, parts: list[int], count: int) -> Iterator[int]:
    """Make these parts in `count` processes, which all end with this call."""
    todo = deque(parts)
    children: dict[Any, WorkerProcess] = {}
    try:
        for number in range(count):
            child = WorkerProcess(evaluation, warns=number == 0)
            children[child.connection] = child
            child.request(todo.popleft())
        busy = list(children)
        while busy:
            for connection in wait(busy):
                child = children[connection]
                yield child.result()
                if todo:
                    child.request(todo.popleft())
                else:
                    busy.remove(connection)
    finally:
        for child in children.values():
            child.end()


class WorkerProcess:
    """A process that makes parts, one at a time.

    Args:
        warns: whether it prints warnings, which all processes would repeat.
    """

    def __init__(self, evaluation: Evaluation, warns: bool) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would inherit the locks of torch's threads
        self.connection, remote = context.Pipe()
        arguments = remote, warns, evaluation.config, evaluation.adapters, evaluation.folder
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        with sigint_ignored():
            self.process.start()
        remote.close()  # else the end of the process would not close the pipe

    def request(self, part: int) -> None:
        with suppress(BrokenPipeError):  # the process has ended, which `result` reports
            self.connection.send(part)

    def result(self) -> int:
        """Wait for the requested part; return its number of images."""
        try:
            made = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise UserError(
                f"a worker process ended with status {self.process.exitcode}: repeat the command to make the missing "
                "parts; OMP_NUM_THREADS=1 makes them in one process"
            ) from None
        if isinstance(made, Exception):
            raise made
        return made

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


@contextmanager
def sigint_ignored() -> Iterator[None]:
    """Processes started within the context ignore Ctrl-C, which a terminal sends to all; their parent ends them."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def serve(connection: Connection, warns: bool, config: EvaluateConfig, adapters: dict[str, str], output: Path) -> None:
    """Make the requested parts until the connection closes; send a `UserError` or `OSError` back, raise others."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # a clean exit, or Python warns about leaked semaphores
    torch.set_num_threads(1)
    print_warnings_in_one_line()
    if not warns:
        warnings.simplefilter("ignore")
    worker = Worker(config, adapters, output)

    def results() -> Iterator[int | Exception]:
        try:
            worker.load()
            while True:
                yield worker.make(connection.recv())
        except (UserError, OSError) as error:
            yield error

    with suppress(EOFError, ConnectionError):  # the parent process has ended
        for result in results():
            connection.send(result)
