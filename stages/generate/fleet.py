"""A fleet of teachers as Ray actors, on this machine or over a cluster."""

from __future__ import annotations

import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import count
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from stages.base.loading import located
from stages.base.sampling import Condition
from stages.cluster import join
from stages.errors import UserError
from stages.generate.config import GenerateConfig, place_of
from stages.generate.events import WAITING, Event, Failed, Loaded, Made
from stages.generate.unit import Unit
from stages.generate.worker import UnitWorker
from stages.signals import end_on_sigterm
from stages.storage.folder import absolute

MAX_MESSAGE_LENGTH = 1000  # characters of a runtime environment's error
UNITS_WRITTEN = 1  # units that a worker may be writing while it samples; more would only fill memory


class Doing(str, Enum):
    """The kinds of calls; the values name a worker's state in reports."""

    PLACE = WAITING
    LOAD = "loading"
    SAMPLE = "sampling"
    COMMIT = "writing"
    AGAIN = "out of reach"


class TeacherWorker(UnitWorker):
    """The actor's class; Ray's dashboard shows its name."""

    def place(self) -> tuple[str, str]:
        """The node's id and address; the first call, answered once the cluster has room for the worker."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()


@dataclass(eq=False)
class Member:
    """A worker as the fleet keeps track of it."""

    actor: Any
    name: str
    node: str | None = None
    is_loaded: bool = False
    alone: bool = False
    doing: list[Doing] = field(default_factory=list)

    def is_free(self, alone: bool) -> bool:
        """Whether it can sample another unit: it is not sampling, and writes at most one unit (none if `alone`)."""
        written = 0 if alone or self.alone else UNITS_WRITTEN
        return self.is_loaded and len(self.doing) <= written and self.doing.count(Doing.COMMIT) == len(self.doing)


@dataclass(frozen=True)
class PendingCall:
    """A call that a worker has not answered yet."""

    member: Member
    doing: Doing
    unit: int | None = None
    since: float = field(default_factory=time.monotonic)


class RayFleet:
    """Plain actors that Ray never restarts: the driver owns retries, and this fleet replaces dead and hung workers.

    Until the cluster has room for an actor, it waits inside Ray; it starts when a node joins.
    """

    worker_class = TeacherWorker

    def __init__(self, config: GenerateConfig) -> None:
        self.started_ray = not ray.is_initialized()
        if self.started_ray:
            start_ray(config)
        teacher = replace(
            config.teacher,
            pretrained_model_name_or_path=located(config.teacher.pretrained_model_name_or_path),
            config=config.teacher.config and located(config.teacher.config),
        )
        self.config = replace(config, teacher=teacher, output_dir=absolute(config.output_dir))
        with ray_errors(config):
            self.actor_class = ray.remote(
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                resources=dict(config.resources),
                runtime_env=dict(config.runtime_env) or None,
                max_concurrency=1 + UNITS_WRITTEN,
                max_restarts=0,
                max_task_retries=0,
            )(self.worker_class)
        self.run, self.numbers = uuid.uuid4().hex[:4], count(1)
        self.examples: Sequence[Condition] = ()
        self.members: list[Member] = []
        self.calls: dict[Any, PendingCall] = {}
        for _ in range(config.num_workers):
            self._add_worker()

    def _add_worker(self) -> None:
        name = f"teacher-{next(self.numbers)}"
        with ray_errors(self.config):
            actor = self.actor_class.options(name=f"{name}-of-run-{self.run}").remote(self.config)
        member = Member(actor, name)
        self.members.append(member)
        self._call(member, Doing.PLACE, actor.place.remote())

    def _call(self, member: Member, doing: Doing, reference: Any, unit: int | None = None) -> None:
        self.calls[reference] = PendingCall(member, doing, unit)
        member.doing.append(doing)

    def start(self, examples: Sequence[Condition]) -> None:
        """Remember the examples; `poll` has each worker load once it has a place."""
        self.examples = examples

    def free(self, alone: bool) -> bool:
        return self._free_member(alone) is not None

    def _free_member(self, alone: bool) -> Member | None:
        """The least busy worker that is free, or None."""
        free = (member for member in self.members if member.is_free(alone))
        return min(free, key=lambda member: len(member.doing), default=None)

    def dispatch(self, unit: Unit, alone: bool) -> None:
        member = self._free_member(alone)
        assert member is not None
        member.alone = alone
        self._call(member, Doing.SAMPLE, member.actor.sample.remote(unit), unit.index)

    def poll(self, timeout: float) -> list[Event]:
        references = list(self.calls)
        finished, _ = ray.wait(references, num_returns=1, timeout=timeout)
        if finished:
            finished, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return [event for reference in finished for event in self._events(reference)] + self._overdue()

    def _events(self, reference: Any) -> list[Event]:
        call = self.calls.pop(reference, None)
        if call is None:  # its worker was lost by an earlier event
            return []
        call.member.doing.remove(call.doing)
        try:
            return self._advance(call, ray.get(reference))
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if call.unit is None:
                return self._lose(call, cause)
            return [Failed(call.unit, cause, worker=call.member.name)]
        except ActorUnavailableError:
            # The connection is lost. The next answer shows whether the worker or its node is gone too.
            self._call(call.member, Doing.AGAIN, call.member.actor.place.remote(), call.unit)
            return []
        except RayError as error:
            return self._lose(call, ray_error_of(error), self._is_preempted(call, error))

    def _advance(self, call: PendingCall, result: Any) -> list[Event]:
        """Start the worker's next call, and return the events of the finished one."""
        member, unit = call.member, call.unit
        match call.doing:
            case Doing.PLACE:
                member.node, address = result
                member.name = f"{member.name} on {address}"
                self._call(member, Doing.LOAD, member.actor.load.remote(self.examples))
            case Doing.LOAD:
                member.is_loaded = True
                return [Loaded(result, member.name)]
            case Doing.SAMPLE:
                self._call(member, Doing.COMMIT, member.actor.commit.remote(unit), unit)
            case Doing.COMMIT:
                assert unit is not None
                records, seconds = result
                return [Made(unit, records, member.name, seconds)]
            case Doing.AGAIN:
                return self._lose(call, ConnectionError("its answer was lost on the way"), preempted=True)
        return []

    def _is_preempted(self, call: PendingCall, error: RayError) -> bool:
        """Whether the loss has a cause outside the worker: its node went away, or it never had a place."""
        if isinstance(error, RuntimeEnvSetupError) or (isinstance(error, RayActorError) and error.actor_init_failed):
            return False
        if call.doing is Doing.PLACE or (isinstance(error, RayActorError) and error.preempted):
            return True
        return call.member.node not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def _lose(self, call: PendingCall, error: BaseException, preempted: bool = False) -> list[Event]:
        """Replace a worker that is gone or unusable; all of its pending calls have failed."""
        member = call.member
        units = [call.unit, *(each.unit for each in self.calls.values() if each.member is member and each is not call)]
        self.calls = {reference: each for reference, each in self.calls.items() if each.member is not member}
        self.members.remove(member)
        ray.kill(member.actor)
        self._add_worker()
        return [Failed(unit, error, preempted, member.name, lost=True) for unit in units]

    def _overdue(self) -> list[Event]:
        limit = self.config.unit_timeout
        latest = time.monotonic() - limit
        events: list[Event] = []
        for call in list(self.calls.values()):
            hung = call.doing is not Doing.PLACE and call.since < latest
            if hung and call.member in self.members:  # it is not lost already with an earlier call
                error = TimeoutError(f"{call.doing.value} took more than unit_timeout={limit:g} s")
                events += self._lose(call, error)
        return events

    def states(self) -> Counter[str]:
        """A worker that samples and writes at once counts as sampling."""
        return Counter(
            Doing.SAMPLE.value if Doing.SAMPLE in member.doing else member.doing[0].value if member.doing else "idle"
            for member in self.members
        )

    def close(self) -> None:
        for member in self.members:
            ray.kill(member.actor)
        if self.started_ray:
            ray.shutdown()
            end_on_sigterm()


@contextmanager
def ray_errors(config: GenerateConfig) -> Iterator[None]:
    """Turn Ray's refusal of a worker's resources into a `UserError`."""
    try:
        yield
    except ValueError as error:
        message = " ".join(" ".join(map(str, error.args)).split())
        raise UserError(f"{place_of(config)}: Ray cannot keep that for a worker: {message}") from error


def ray_error_of(error: RayError) -> RayError:
    """The error with a first line that names the cause: of a constructor, an import or a runtime environment."""
    if isinstance(error, RuntimeEnvSetupError):
        return RayError(f"runtime_env: {' '.join(str(error).split())}"[:MAX_MESSAGE_LENGTH])
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return RayActorError(error_msg=str(error).rstrip().rpartition("\n")[2])
    return error


def start_ray(config: GenerateConfig) -> None:
    """Join the cluster that the configuration or RAY_ADDRESS names, else start Ray on this machine.

    Raises:
        UserError: there is no such cluster; or Ray runs on this machine alone, and a worker needs more than it has.
    """
    if config.ray_address:
        join(config.ray_address, "ray_address")
        return
    if address := os.environ.get("RAY_ADDRESS"):
        join(address)
        return
    join(None, num_cpus=max(os.cpu_count() or 1, math.ceil(config.num_workers * config.num_cpus)))
    available = ray.cluster_resources()
    if any(available.get(name, 0) < amount for name, amount in {"GPU": config.num_gpus, **config.resources}.items()):
        ray.shutdown()
        raise UserError(
            f"{place_of(config)}: more than this machine has for a worker: ask for less, or name a cluster by ray_address"
        )
