"""One org's plugin: its worker if there is one, the requests that wait for it, and how its starts went."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, Protocol

from .catalog import Plugin
from .errors import BreakerOpenError, QueueFullError, RequestError, StartFailedError, StoreError, UnavailableError
from .installs import Installation
from .logs import get_logger
from .metrics.histogram import Recent
from .states import WorkerState
from .supervisor import Backoff, Breaker
from .version import Version
from .worker import SLACK, Worker

if TYPE_CHECKING:
    from .pool import Pool
    from .tracing import Trace

__all__ = ["ZYGOTE_REPORTS", "Slot", "Waiter"]

ZYGOTE_REPORTS: Final = 0.05
"""Seconds after which a zygote has reported how its worker ended, which the worker's socket tells at once."""

# Requests wait this long at most while an org's state moves from one worker to the next.
_LONGEST_HOLD: Final = 1.0


class Waiter(Protocol):
    """A request that needs a worker."""

    @property
    def trace(self) -> "Trace | None":
        """Its trace, if there is one."""
        ...

    def begin(self, worker: Worker) -> None:
        """The worker is ready for it."""

    def failed(self, error: RequestError) -> None:
        """It will not get one."""


class Slot:
    """One org's plugin: its worker if there is one, the requests that wait for it, and how its starts went."""

    def __init__(self, pool: "Pool", plugin: Plugin, org_id: str) -> None:
        self.plugin = plugin
        self.org_id = org_id
        self.worker: Worker | None = None
        self.lock = asyncio.Lock()
        """Held by whoever changes the org's settings or its worker on purpose."""
        self.users = 0
        """How many hold the lock, or wait for it, and need the slot to stay."""
        self.backoff = Backoff()
        self.breaker = Breaker()
        self.last_error = ""
        self.down_since = 0.0
        """Seconds since the epoch at which it went down the last time."""
        self.restarts = 0
        self.requests = 0
        self.errors = 0
        """Answers, and those of them with 5xx."""
        self.recent: Recent | None = None
        """Its requests of the last minutes, once there was one."""
        self.trial_error = ""
        self.queue: OrderedDict[Waiter, float] = OrderedDict()
        """Requests that wait for the worker, and since when."""
        self._pool = pool
        self._starting: asyncio.Task[None] | None = None
        self._closed = ""  # why nothing is started any more
        self._backing_off = False
        self._down = False  # crashed, and not started again yet
        self._held = False  # requests wait although there is a worker: its state is on the way to the next one

    @property
    def state(self) -> WorkerState:
        """What the org's plugin is doing now."""
        if self.worker is not None:
            return self.worker.lifecycle.state
        if self._starting is not None and not self._starting.done():
            return WorkerState.STARTING
        return WorkerState.ERROR if self.breaker.reason or self._down else WorkerState.STOPPED

    @property
    def is_down(self) -> bool:
        """Whether there is no worker because the last one died, or did not start."""
        return self.worker is None and bool(self.breaker.reason or self._down)

    @property
    def is_idle(self) -> bool:
        """Whether nothing would be lost with it."""
        busy = self.worker or self.queue or self.users or self.last_error or self.lock.locked()
        starting = self._starting is not None and not self._starting.done()
        return not busy and not starting and not self.backoff.remaining(self._pool.loop.time())

    def submit(self, waiter: Waiter) -> None:
        """Give ``waiter`` the worker, now or when there is one, or tell it why not."""
        if self._closed:
            waiter.failed(UnavailableError(self._closed))
            return
        worker = self.worker
        pool = self._pool
        if worker is not None and worker.lifecycle.state.serving and not self.queue:
            if not self._held and len(worker.streams) < pool.settings.max_requests:
                waiter.begin(worker)
                return
        elif worker is None:
            wait = self.breaker.refuses_for(pool.loop.time())
            if wait > 0:
                waiter.failed(BreakerOpenError(f"The worker does not start: {self.breaker.reason}", wait))
                return
        if len(self.queue) >= pool.settings.max_queue:
            waiter.failed(QueueFullError("Too many requests wait for this worker"))
            return
        self.queue[waiter] = pool.loop.time()
        if worker is None:
            self.ensure_starting()

    def answered(self, now: float, seconds: float, status: int) -> None:
        """A request of the org's is being answered ``now``, after ``seconds``."""
        if self.recent is None:
            self.recent = Recent(now)
        self.recent.add(now, seconds, status >= 500)
        self.requests += 1
        if status >= 500:
            self.errors += 1

    def current(self) -> "Slot":
        """The slot of this org now: an idle one is dropped, also while a request that was routed to it is read."""
        return self._pool.slot(self.plugin, self.org_id)

    def forget(self, waiter: Waiter) -> None:
        """A waiting request's client has left, or its time is up."""
        self.queue.pop(waiter, None)

    def ensure_starting(self) -> None:
        """Start a worker unless that is under way."""
        if not self._closed and (self._starting is None or self._starting.done()):
            self._starting = self._pool.spawn(self._start())

    def forgive(self) -> None:
        """Forget how starts and workers of another version failed."""
        self.breaker.succeeded()
        self.backoff = Backoff()
        self.last_error = ""
        self._down = False
        if self._backing_off and self._starting is not None:
            self._starting.cancel()
            self._starting = self._pool.spawn(self._start())

    async def _start(self) -> None:
        if (delay := self.backoff.remaining(self._pool.loop.time())) > 0:
            self._backing_off = True
            try:
                await asyncio.sleep(delay)
            finally:
                self._backing_off = False
        async with self.lock:
            if self.worker is not None:
                return
            try:
                installation = await self._pool.installs.load(self.plugin.name, self.org_id)
            except StoreError as error:
                self._fail_queue(UnavailableError(str(error)))
                return
            if installation is None or not installation.enabled:
                self._fail_queue(RequestError("This plugin is not installed for this organisation", status=404))
                return
            while True:
                try:
                    worker = await self.launch(installation)
                except RequestError as error:
                    self._fail_queue(error)
                    return
                if worker.version is self.plugin.current or self._closed:
                    break
                # Another version took over meanwhile, and who waits may have come after that.
                self._pool.spawn(self._pool.retire(worker))
            self.adopt(worker)

    async def launch(
        self,
        installation: Installation,
        *,
        serve: bool = True,
        version: Version | None = None,
        carry: Callable[[], Awaitable[bytes]] | None = None,
    ) -> Worker:
        """A new worker of this org, ready: of ``version``, else of the one that serves.

        ``carry()`` is asked for the state of the worker that it replaces once the new process is there. Raises
        ``StartFailedError`` and the like, which are counted if it serves.
        """
        pool, hook_timeout = self._pool, self._pool.settings.hook_timeout
        began = pool.loop.time()
        trace = next((waiter.trace for waiter in self.queue if waiter.trace is not None), None)
        worker: Worker | None = None
        replacing = serve and self.worker is not None
        try:
            worker = await pool.take(self.plugin, version, room=not replacing)
            if carry is not None:
                worker.send_state(await carry())
            worker.start(installation, serve=serve, hook_timeout=hook_timeout)
            await worker.ready(hook_timeout + SLACK)
            if worker.exit.done():
                raise StartFailedError(f"the worker died as soon as it was ready: {worker.exit.result()}")
        except asyncio.CancelledError:
            if worker is not None:
                pool.give_up(worker)
            raise
        except Exception as problem:  # whatever it was, who waits is told
            if worker is not None:
                worker.kill()
            error = problem if isinstance(problem, UnavailableError) else StartFailedError(str(problem))
            if serve:
                counts, was_open = self.plugin.counts, self.breaker.is_open
                self._went_down()
                self.breaker.failed(pool.loop.time(), error.message)
                counts.failed_starts += 1
                counts.breakers_opened += self.breaker.is_open and not was_open
                self.last_error = error.message
                pool.told(self)
                get_logger().error(
                    "a worker did not start", plugin=self.plugin.name, org=self.org_id, reason=error.message
                )
            raise error from None
        get_logger().debug(
            "worker ready",
            plugin=self.plugin.name,
            org=self.org_id,
            worker=worker.pid,
            isolation=worker.version.level.label,
            serve=serve,
            ms=worker.phases(),
            stamps=[("asked", worker.asked), *worker.stamps],
        )
        if serve:
            self.breaker.succeeded()
            phases = {name: ms / 1000 for name, ms in worker.phases().items()}
            self.plugin.counts.started(phases, pool.loop.time() - began)
            if pool.tracing is not None:
                pool.tracing.started(self.plugin.name, self.org_id, int(began * 1e9), worker.stamps, trace)
        return worker

    def adopt(self, worker: Worker) -> None:
        """Let ``worker`` serve from now on; requests that wait go to it."""
        if self._closed:
            self._pool.spawn(self._pool.retire(worker))
            return
        self.worker, self._down = worker, False
        self._pool.serving(worker, self)
        worker.released = lambda: self._released(worker)
        self.pump()
        self._pool.touch(worker)
        self._pool.told(self)

    def _released(self, worker: Worker) -> None:
        self._pool.touch(worker)
        if self.queue:
            self.pump()

    def pump(self) -> None:
        """Give waiting requests to the worker, as many as it may have."""
        while self.queue and not self._held and self.worker is not None and self.worker.lifecycle.state.serving:
            if len(self.worker.streams) >= self._pool.settings.max_requests:
                return
            waiter, since = self.queue.popitem(last=False)
            self.plugin.counts.waits.add(self._pool.loop.time() - since)
            waiter.begin(self.worker)

    def _fail_queue(self, error: RequestError) -> None:
        queue, self.queue = self.queue, OrderedDict()
        for waiter in queue:
            waiter.failed(error)

    def release(self, *, for_another: bool = False) -> Worker | None:
        """Take the worker out of service, ``for_another`` to serve at once; the caller stops it."""
        worker, self.worker = self.worker, None
        if worker is not None:
            self._pool.lru.pop(worker, None)
            if not for_another:
                self._pool.told(self)
        return worker

    def crashed(self, worker: Worker, reason: str) -> None:
        """``worker`` ended without being told to."""
        if worker is not self.worker:
            return
        self._went_down()
        self.worker, self._down = None, True
        self.last_error = told = f"the worker died while it served: {reason}"
        self.backoff.crashed(self._pool.loop.time())
        self.restarts += 1
        self.plugin.counts.restarts += 1
        self._pool.loop.call_later(ZYGOTE_REPORTS, self._explain, worker, told, reason)
        self.ensure_starting()
        self._pool.told(self)

    def _went_down(self) -> None:
        if not self.breaker.reason and not self._down:
            self.down_since = time.time()

    def _explain(self, worker: Worker, told: str, reason: str) -> None:
        """Log a crash once its zygote has had the time to say how it ended."""
        if (how := worker.how_it_ended()) is not None and self.last_error == told:
            self.last_error = f"the worker died while it served: {how}"
        get_logger().error(
            "a worker died", plugin=self.plugin.name, org=self.org_id, worker=worker.pid, reason=how or reason
        )

    async def replace(self, reason: str) -> bool:
        """As ``replace_locked``, for whoever does not hold the lock."""
        async with self.lock:
            return await self.replace_locked(reason)

    async def replace_locked(self, reason: str, version: Version | None = None, *, carry: bool = False) -> bool:
        """Start a new worker beside the serving one, swap, and let the old one finish; the caller holds the lock.

        With ``carry`` the new one gets the old one's ``state``. If it does not start, the old one goes on: ``False``.
        """
        old = self.worker
        if old is None or self._closed:
            return True
        try:
            installation = await self._pool.installs.load(self.plugin.name, self.org_id)
        except StoreError as error:
            self._not_replaced(str(error))
            return False
        if installation is None or self.worker is not old:
            return True
        serving = old
        release: asyncio.TimerHandle | None = None

        async def state() -> bytes:
            nonlocal release
            # What requests would change from here on would be lost, so they wait; but not for a slow on_start.
            self._held = True
            release = self._pool.loop.call_later(_LONGEST_HOLD, self._let_go)
            dumped = await serving.dump_state()
            if not dumped:
                self._let_go()
            return dumped

        worker: Worker | None = None
        try:
            worker = await self.launch(installation, version=version, carry=state if carry else None)
        except RequestError as error:
            self._not_replaced(error.message)
            return False
        finally:
            if release is not None:
                release.cancel()
            if worker is None:
                self._let_go()
        self._held = False
        old = self.release(for_another=True) or old
        self.adopt(worker)
        get_logger().debug("worker replaced", plugin=self.plugin.name, org=self.org_id, reason=reason)
        self._pool.spawn(self._pool.retire(old))
        return True

    def _not_replaced(self, reason: str) -> None:
        get_logger().error("a worker was not replaced", plugin=self.plugin.name, org=self.org_id, reason=reason)

    async def update(self) -> None:
        """Have the worker, if there is one, replaced by one of the version that serves."""
        async with self.lock:
            if self.worker is not None and self.worker.version is not self.plugin.current:
                await self.replace_locked("another version serves", carry=True)

    async def try_version(self, version: Version) -> bool:
        """Replace the worker by one of ``version``; if that does not start, ``trial_error`` says why."""
        self.trial_error = ""
        before = self.last_error
        async with self.lock:
            if self.worker is None:
                return True
            if await self.replace_locked("another version is tried", version, carry=True):
                return True
            self.trial_error, self.last_error = self.last_error, before
            self.breaker.succeeded()  # the version that serves did not fail
            return False

    def _let_go(self) -> None:
        self._held = False
        self.pump()

    def close(self, reason: str) -> None:
        """Fail what waits, and start nothing any more."""
        self._closed = reason
        if self._starting is not None:
            self._starting.cancel()
        self._fail_queue(UnavailableError(reason))
