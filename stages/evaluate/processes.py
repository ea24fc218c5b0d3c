"""The parts of an evaluation over the cores of this machine: processes of one thread each, none of which waits for another."""

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

FEW = 2  # parts that are made sooner than a process has started


def over_cores(evaluation: Evaluation, begin: Begin) -> Iterator[int]:
    """Make the parts that are missing; the number of images of each as it is made.

    A small denoiser on the CPU gets a process in place of each thread that torch would take (`OMP_NUM_THREADS`); few parts,
    a large denoiser or one on a GPU stay in this process.

    Raises:
        UserError: a worker refused, or its process ended.
    """
    worker = evaluation.new_worker()
    missing = begin(worker.load())
    count = min(torch.get_num_threads(), len(missing)) if takes_one_thread(worker.pipe) else 1
    if count == 1 or len(missing) <= FEW:
        yield from map(worker.make, missing)
    else:
        del worker
        yield from over_processes(evaluation, missing, count)


def over_processes(evaluation: Evaluation, parts: list[int], count: int) -> Iterator[int]:
    """Make these parts in so many processes, which all end with this call."""
    todo = deque(parts)
    children: dict[Any, Child] = {}
    try:
        for number in range(count):
            child = Child(evaluation, tells=number == 0)
            children[child.connection] = child
            child.ask(todo.popleft())
        busy = list(children)
        while busy:
            for connection in wait(busy):
                child = children[connection]
                yield child.answer()
                if todo:
                    child.ask(todo.popleft())
                else:
                    busy.remove(connection)
    finally:
        for child in children.values():
            child.end()


class Child:
    """A process that makes parts, one after another.

    Args:
        tells: whether its warnings are shown, which every child would repeat.
    """

    def __init__(self, evaluation: Evaluation, tells: bool) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would inherit locks of torch's threads
        self.connection, theirs = context.Pipe()
        given = theirs, tells, evaluation.config, evaluation.adapters, evaluation.folder
        self.process = context.Process(target=serve, args=given, daemon=True)
        with ctrl_c_ignored():
            self.process.start()
        theirs.close()  # so that the child's end is the last, and is noticed when the child ends

    def ask(self, part: int) -> None:
        with suppress(BrokenPipeError):  # it has ended, which its missing answer tells
            self.connection.send(part)

    def answer(self) -> int:
        """The number of images of the part that it was asked for, once that is made."""
        try:
            made = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise UserError(
                f"a process that makes parts ended with status {self.process.exitcode}: the same command goes on with what is "
                "missing; OMP_NUM_THREADS=1 makes them in one process"
            ) from None
        if isinstance(made, Exception):
            raise made
        return made

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


@contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    """A process that is started within it never sees Ctrl-C, which a terminal sends to all: its parent ends it."""
    if threading.current_thread() is not threading.main_thread():  # which alone can
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def serve(connection: Connection, tells: bool, config: EvaluateConfig, adapters: dict[str, str], output: Path) -> None:
    """Make the parts that are asked for until nobody asks; what a user can mend is answered, anything else is a defect."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # cleanly, or Python warns of semaphores that are left
    torch.set_num_threads(1)
    print_warnings_in_one_line()
    if not tells:
        warnings.simplefilter("ignore")
    worker = Worker(config, adapters, output)

    def answers() -> Iterator[int | Exception]:
        try:
            worker.load()
            while True:
                yield worker.make(connection.recv())
        except (UserError, OSError) as error:
            yield error

    with suppress(EOFError, ConnectionError):  # the parent has ended
        for answer in answers():
            connection.send(answer)
