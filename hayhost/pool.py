"""Workers for orgs: started when a request needs one, shared by all requests, stopped when idle, bounded in number."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar

from .catalog import Plugin
from .errors import HostError, QueueFullError, RequestError, StartFailedError, UnavailableError
from .installs import Installation, Installs
from .logs import PluginLog, get_logger
from .settings import Settings
from .states import WorkerState
from .supervisor import Backoff, Breaker
from .version import Version
from .worker import SLACK, Worker

__all__ = ["Pool", "Slot", "Waiter"]

T = TypeVar("T")

_TICK: Final = 0.5
# Handlers that were cancelled and still run after this many seconds are stuck: their worker is replaced.
_STUCK_AFTER: Final = 3.0
# A zygote reports how its worker ended a moment after the worker's socket has told that it did.
_WORD_AFTER: Final = 0.05
# Requests wait this long at most while an org's state moves from one worker to the next.
_LONGEST_HOLD: Final = 1.0
# Orgs whose workers are exchanged side by side: enough to be quick, few enough to leave the machine to requests.
_AT_ONCE: Final = 4
# Spares are refilled when nothing has been started for this long, so that no start waits for them.
_REFILL_AFTER: Final = 0.05


class Waiter(Protocol):
    """A request that needs a worker."""

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
        self.backoff = Backoff()
        self.breaker = Breaker()
        self.last_error = ""
        self.restarts = 0
        self.trial_error = ""
        self.queue: OrderedDict[Waiter, None] = OrderedDict()
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
                waiter.failed(UnavailableError(f"The worker does not start: {self.breaker.reason}", wait))
                return
        if len(self.queue) >= pool.settings.max_queue:
            waiter.failed(QueueFullError("Too many requests wait for this worker"))
            return
        self.queue[waiter] = None
        if worker is None:
            self.ensure_starting()

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
            installation = self._pool.installs.find(self.plugin.name, self.org_id)
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
        worker: Worker | None = None
        replacing = serve and self.worker is not None
        try:
            worker = await pool.take(self.plugin, version, room=not replacing)
            if carry is not None:
                worker.send_state(await carry())
            worker.start(installation, serve=serve, hook_timeout=hook_timeout)
            degraded = await worker.ready(hook_timeout + SLACK)
            if worker.exit.done():
                raise StartFailedError(f"the worker died as soon as it was ready: {worker.exit.result()}")
        except asyncio.CancelledError:
            if worker is not None:
                worker.kill()
            raise
        except Exception as problem:  # whatever it was, who waits is told
            if worker is not None:
                worker.kill()
            error = problem if isinstance(problem, UnavailableError) else StartFailedError(str(problem))
            if serve:
                self.breaker.failed(pool.loop.time(), error.message)
                self.last_error = error.message
                get_logger().error(
                    "a worker did not start", plugin=self.plugin.name, org=self.org_id, reason=error.message
                )
            raise error from None
        get_logger().debug(
            "worker ready", plugin=self.plugin.name, org=self.org_id, worker=worker.pid, serve=serve, ms=worker.phases()
        )
        if serve:
            self.breaker.succeeded()
            if degraded:
                self.last_error = degraded
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

    def _released(self, worker: Worker) -> None:
        self._pool.touch(worker)
        if self.queue:
            self.pump()

    def pump(self) -> None:
        """Give waiting requests to the worker, as many as it may have."""
        while self.queue and not self._held and self.worker is not None and self.worker.lifecycle.state.serving:
            if len(self.worker.streams) >= self._pool.settings.max_requests:
                return
            self.queue.popitem(last=False)[0].begin(self.worker)

    def _fail_queue(self, error: RequestError) -> None:
        queue, self.queue = self.queue, OrderedDict()
        for waiter in queue:
            waiter.failed(error)

    def release(self) -> Worker | None:
        """Take the worker out of service; the caller stops it."""
        worker, self.worker = self.worker, None
        if worker is not None:
            self._pool.lru.pop(worker, None)
        return worker

    def crashed(self, worker: Worker, reason: str) -> None:
        """``worker`` ended without being told to."""
        if worker is not self.worker:
            return
        self.worker, self._down = None, True
        self.last_error = told = f"the worker died while it served: {reason}"
        self.backoff.crashed(self._pool.loop.time())
        self.restarts += 1
        self._pool.loop.call_later(_WORD_AFTER, self._explain, worker, told, reason)
        self.ensure_starting()

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
        installation = self._pool.installs.find(self.plugin.name, self.org_id)
        if old is None or installation is None or self._closed:
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
            get_logger().error(
                "a worker was not replaced", plugin=self.plugin.name, org=self.org_id, reason=error.message
            )
            return False
        finally:
            if release is not None:
                release.cancel()
            if worker is None:
                self._let_go()
        self._held = False
        old = self.release() or old
        self.adopt(worker)
        get_logger().debug("worker replaced", plugin=self.plugin.name, org=self.org_id, reason=reason)
        self._pool.spawn(self._pool.retire(old))
        return True

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


class Pool:
    """All workers of the host."""

    def __init__(self, settings: Settings, installs: Installs) -> None:
        self.settings = settings
        self.installs = installs
        self.loop = asyncio.get_running_loop()
        self.slots: dict[tuple[str, str], Slot] = {}
        self.workers: dict[Worker, Slot | None] = {}
        """Every live worker, with the slot it serves if it does."""
        self.lru: OrderedDict[Worker, Slot] = OrderedDict()
        """Serving workers, the longest unused first."""
        self.spares: dict[str, deque[Worker]] = {}
        self.keep_idle = False
        """Whether workers stay however long they are idle (``hayhost run``)."""
        self._room: deque[asyncio.Future[None]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._coming = 0  # workers that are not in ``workers`` yet, because their zygote is waited for
        self._closing = False
        self._last_start = 0.0
        self._ticker = self.spawn(self._tick())

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run a task that the pool owns; what it raises is logged, never lost."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            get_logger().error("an internal task failed", reason=repr(error))

    def slot(self, plugin: Plugin, org_id: str) -> Slot:
        """The slot of ``plugin`` for an org, made if there is none yet."""
        slot = self.find(plugin, org_id)
        if slot is None:
            slot = self.slots[plugin.name, org_id] = Slot(self, plugin, org_id)
        return slot

    def find(self, plugin: Plugin, org_id: str) -> Slot | None:
        """The slot of ``plugin`` for an org, if there is one."""
        slot = self.slots.get((plugin.name, org_id))
        return slot if slot is not None and slot.plugin is plugin else None  # another may have had the name before

    # ---- processes

    async def take(self, plugin: Plugin, version: Version | None = None, *, room: bool = True) -> Worker:
        """A worker of ``plugin`` that has said hello and has no org: a spare, or a new one once there is room.

        Without ``room`` none is made: it is for an org whose worker leaves as soon as this one is ready. Raises
        ``UnavailableError`` if the plugin is not loaded, ``StartFailedError`` if the worker does not come up.
        """
        self._last_start = self.loop.time()
        spares = self.spares.get(plugin.name)
        while spares:
            worker = spares.popleft()
            if not worker.exit.done() and worker.version is (version or plugin.current):
                return worker
            worker.kill()
        if room:
            await self._make_room()
        serving = version or plugin.current
        try:
            return await self._fork(plugin, version)
        except StartFailedError:
            await asyncio.sleep(_WORD_AFTER)
            if version is not None or serving is None or serving.alive:
                raise
        return await self._fork(plugin, None)  # its zygote had just died, and nobody knew yet

    async def _fork(self, plugin: Plugin, version: Version | None) -> Worker:
        self._coming += 1
        try:
            version = version or await plugin.ready_version()
            zygote = (await plugin.twin(version)).zygote if version.strict else version.zygote
        except BaseException as error:
            self._wake_one()  # the room that was made for it is free again
            if isinstance(error, HostError):
                raise StartFailedError(str(error).partition("\n")[0]) from None
            raise
        finally:
            self._coming -= 1
        log = PluginLog(plugin=plugin.name, version=version.manifest.version)
        try:
            worker = Worker(version, zygote, log, self._gone)
        except OSError:
            if zygote is not version.zygote:
                zygote.kill()
            self._wake_one()
            raise
        self.workers[worker] = None
        try:
            async with asyncio.timeout(self.settings.hook_timeout + SLACK):
                await asyncio.shield(worker.hello)
        except TimeoutError:
            worker.kill()
            zygote.kill()  # it does not fork any more
            raise StartFailedError("it did not say hello in time") from None
        except asyncio.CancelledError:
            worker.kill()
            raise
        return worker

    async def _make_room(self) -> None:
        while len(self.workers) + self._coming >= self.settings.max_workers and not self._closing:
            draining = sum(worker.lifecycle.state is WorkerState.DRAINING for worker in self.workers)
            taken = len(self.workers) + self._coming - draining
            if taken < self.settings.max_workers and draining <= self._most_draining:
                return
            if draining <= self._most_draining and self._evict():
                continue
            room: asyncio.Future[None] = self.loop.create_future()
            self._room.append(room)
            try:
                await room
            except asyncio.CancelledError:
                if not room.cancelled():
                    self._wake_one()  # it was this one's turn
                raise

    @property
    def _most_draining(self) -> int:
        # Workers that are on their way out do not hold up a start, unless they pile up.
        return max(8, self.settings.max_workers // 10)

    def _evict(self) -> bool:
        """Make the least useful worker leave: a spare, else the one idle for the longest."""
        for spares in self.spares.values():
            while spares:
                spare = spares.popleft()
                if not spare.exit.done():
                    spare.lifecycle.to(WorkerState.DRAINING, "its room is needed")
                    spare.kill()
                    return True
        for worker, slot in self.lru.items():
            if worker.idle and not slot.lock.locked():
                self._dismiss(worker, slot)
                return True
        return False

    def _dismiss(self, worker: Worker, slot: Slot) -> None:
        """Make an idle worker leave, and forget its slot unless there is something to remember."""
        slot.release()
        worker.lifecycle.to(WorkerState.DRAINING, "on_stop")
        self.spawn(self.retire(worker))
        if not slot.last_error and not slot.backoff.remaining(self.loop.time()) and not slot.queue:
            self.slots.pop((slot.plugin.name, slot.org_id), None)

    def serving(self, worker: Worker, slot: Slot) -> None:
        """``worker`` serves ``slot`` from now on."""
        self.workers[worker] = slot
        self.lru[worker] = slot

    def touch(self, worker: Worker) -> None:
        """A request of ``worker`` has ended."""
        if worker in self.lru:
            self.lru.move_to_end(worker)
        if self._room and worker.idle:
            self._wake_one()

    def _wake_one(self) -> None:
        while self._room:
            room = self._room.popleft()
            if not room.done():
                room.set_result(None)
                return

    def _gone(self, worker: Worker, reason: str) -> None:
        slot = self.workers.pop(worker, None)
        self.lru.pop(worker, None)
        if worker.zygote is not worker.version.zygote:
            worker.zygote.close()
        if slot is not None and not self._closing:
            slot.crashed(worker, reason)
        self._wake_one()

    async def retire(self, worker: Worker, hook: str = "on_stop") -> None:
        """Stop a worker that is out of service already."""
        if not worker.exit.done():
            await worker.stop(hook, self.settings.drain_timeout, self.settings.hook_timeout)

    # ---- upkeep

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            now = self.loop.time()
            for worker, slot in list(self.lru.items()):
                if worker.used < now - self.settings.idle_timeout:
                    if worker.idle and not slot.lock.locked() and not self.keep_idle:
                        self._dismiss(worker, slot)
                elif worker.idle and not worker.cancelled:
                    worker.pinged = None
                self._check(worker, slot, now)
            self._refill(now)

    def _check(self, worker: Worker, slot: Slot, now: float) -> None:
        """Replace a worker that hangs: no answer to a ping, or a cancelled handler that goes on."""
        if worker.idle:
            return
        if worker.pinged is not None and now - worker.pinged > self.settings.ping_timeout:
            get_logger().error(
                "a worker does not answer pings; replacing it",
                plugin=slot.plugin.name,
                org=slot.org_id,
                worker=worker.pid,
            )
            worker.kill(f"it did not answer pings for {self.settings.ping_timeout:g} s")
        elif (
            any(now - since > _STUCK_AFTER for since in worker.cancelled.values())
            and not slot.lock.locked()
            and not slot.breaker.refuses_for(now)
        ):
            slot.last_error = "a handler did not end after its request was cancelled; the worker was replaced"
            get_logger().error(slot.last_error, plugin=slot.plugin.name, org=slot.org_id, worker=worker.pid)
            self.spawn(slot.replace("a handler is stuck"))
        else:
            worker.ping(now)

    def _refill(self, now: float) -> None:
        if self._closing or now - self._last_start < _REFILL_AFTER or len(self.workers) >= self.settings.max_workers:
            return
        in_use = {slot.plugin.name: slot.plugin for slot in self.lru.values()}
        for name, plugin in in_use.items():
            spares = self.spares.setdefault(name, deque())
            while spares and spares[0].exit.done():
                spares.popleft()
            version = plugin.current
            if len(spares) < self.settings.spares and version is not None and version.alive and not version.strict:
                self.spawn(self._add_spare(plugin, version, spares))

    async def _add_spare(self, plugin: Plugin, version: Version, spares: "deque[Worker]") -> None:
        try:
            worker = await self._fork(plugin, version)
        except RequestError:
            return  # a start that needs it meets the same error and reports it
        if len(spares) < self.settings.spares and version is plugin.current and self.spares.get(plugin.name) is spares:
            spares.append(worker)
        else:
            worker.kill()

    def remove(self, plugin: Plugin) -> None:
        """Stop all workers of a plugin that is not served any more."""
        self.drop_spares(plugin)
        for key, slot in list(self.slots.items()):
            if slot.plugin is plugin:
                del self.slots[key]
                worker = slot.release()
                slot.close("The plugin is not served any more")
                if worker is not None:
                    self.spawn(self.retire(worker))

    def drop_spares(self, plugin: Plugin) -> None:
        """Kill spares of a version that serves no more."""
        for worker in self.spares.pop(plugin.name, ()):
            worker.kill()

    def version_changed(self, plugin: Plugin) -> None:
        """Another version of ``plugin`` serves: what was ready or failed before counts no more."""
        self.drop_spares(plugin)
        for slot in self._slots_of(plugin):
            if slot.worker is None or slot.worker.version is not plugin.current:
                slot.forgive()

    async def update(self, plugin: Plugin) -> int:
        """Replace all workers that are not of the version that serves, a few at a time; how many there were."""
        limit = asyncio.Semaphore(_AT_ONCE)

        async def update(slot: Slot) -> None:
            async with limit:
                await slot.update()

        slots = [slot for slot in self._slots_of(plugin) if slot.worker and slot.worker.version is not plugin.current]
        await asyncio.gather(*(update(slot) for slot in slots))
        return len(slots)

    def _slots_of(self, plugin: Plugin) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.plugin is plugin]

    async def close(self, hook: str = "on_stop") -> None:
        """Stop all workers: requests in flight finish within the drain limit, then ``hook`` runs in each."""
        self._closing = True
        self._ticker.cancel()
        for slot in self.slots.values():
            slot.close("The host is stopping")
        stops = []
        for worker, serves in list(self.workers.items()):
            if serves is not None:
                serves.release()
                stops.append(self.retire(worker, hook))
            elif worker.lifecycle.state is not WorkerState.DRAINING:
                worker.kill()
        await asyncio.gather(*stops)
        pending = [task for task in self._tasks if task is not asyncio.current_task()]
        if pending:
            await asyncio.wait(pending, timeout=self.settings.hook_timeout + self.settings.drain_timeout + SLACK)
        for worker in list(self.workers):
            worker.kill()
