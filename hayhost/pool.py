"""Workers for orgs: taken from spares or forked, stopped when idle or stuck, bounded in number."""

import asyncio
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .catalog import Plugin
from .errors import HostError, RequestError, StartFailedError
from .installs import Installs
from .isolation import Isolation, Quarters
from .logs import PluginLog, get_logger
from .processes import Zygote
from .scratch import Scratches
from .settings import Settings
from .slot import ZYGOTE_REPORTS, Slot
from .states import WorkerState
from .version import Version
from .worker import SLACK, Worker

if TYPE_CHECKING:
    from .tracing import Tracing

__all__ = ["Pool"]

T = TypeVar("T")

_TICK: Final = 0.5
# Handlers that were cancelled and still run after this many seconds are stuck: their worker is replaced.
_STUCK_AFTER: Final = 3.0
# Orgs whose workers are exchanged side by side: enough to be quick, few enough to leave the machine to requests.
_AT_ONCE: Final = 4
# Of workers that have nothing to do, one in this many is looked at in a tick.
_TURNS: Final = 8
# Spares are refilled when nothing has been started for this long, so that no start waits for them.
_REFILL_AFTER: Final = 0.05


class Pool:
    """All workers of the host."""

    def __init__(self, settings: Settings, installs: Installs, isolation: Isolation) -> None:
        self.settings = settings
        self.isolation = isolation
        self.installs = installs
        self.loop = asyncio.get_running_loop()
        self.slots: dict[tuple[str, str], Slot] = {}
        self.workers: dict[Worker, Slot | None] = {}
        """Every live worker, with the slot it serves if it does."""
        self.lru: OrderedDict[Worker, Slot] = OrderedDict()
        """Serving workers, the longest unused first."""
        self.spares: dict[str, deque[Worker]] = {}
        self.told: Callable[[Slot], None] = lambda slot: None
        """Called when the state of an org's plugin has changed."""
        self.serves: Callable[[Worker, Slot], None] = lambda worker, slot: None
        """Called with every worker that begins to serve a slot."""
        self.tracing: Tracing | None = None
        self.keep_idle = False
        """Whether workers stay however long they are idle (``hayhost run``)."""
        self._room: deque[asyncio.Future[None]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._coming = 0  # workers that are not in ``workers`` yet, because their zygote is waited for
        self._closing = False
        self._last_hook = "on_stop"
        self._refilling: asyncio.TimerHandle | None = None
        self._being_refilled: set[str] = set()
        self._measuring: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._turn = 0
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
        if self._refilling is not None:
            self._refilling.cancel()
        self._refilling = self.loop.call_later(_REFILL_AFTER, self._refill)
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
            await asyncio.sleep(ZYGOTE_REPORTS)
            if version is not None or serving is None or serving.alive:
                raise
        return await self._fork(plugin, None)  # its zygote had just died, and nobody knew yet

    async def _fork(self, plugin: Plugin, version: Version | None) -> Worker:
        self._coming += 1
        try:
            worker, zygote = await self._create(plugin, version)
        except BaseException as error:
            self._wake_one()  # the room that was made for it is free again
            if isinstance(error, HostError):
                raise StartFailedError(str(error).partition("\n")[0]) from None
            raise
        finally:
            self._coming -= 1
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

    async def _create(self, plugin: Plugin, version: Version | None) -> tuple[Worker, Zygote]:
        """A worker that has not said hello yet, and what it was forked from."""
        version = version or await plugin.ready_version()
        zygote = (await plugin.twin(version)).zygote if version.strict else version.zygote
        log = PluginLog(plugin=plugin.name, version=version.manifest.version)
        log.counts = plugin.counts.log
        quarters: Quarters | None = None
        try:
            quarters = await self._quarters(zygote)
            worker = Worker(version, zygote, quarters, self.isolation, log, self._gone)
            worker.hooked = partial(self._hooked, plugin)
            return worker, zygote
        except BaseException:
            if quarters is not None and quarters.scratch:
                self._scratches(zygote).drop(quarters.name)
            if zygote is not version.zygote:
                zygote.kill()
            raise

    def _hooked(self, plugin: Plugin, worker: Worker, name: str, started: int, ended: int, failed: bool) -> None:
        plugin.counts.hook(name, (ended - started) / 1e9, failed)
        if self.tracing is not None and worker.installation is not None and name != "on_start":  # that is in its start
            self.tracing.hook(name, plugin.name, worker.installation.org_id, started, ended, failed)

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
                slot.plugin.counts.stopped["evicted"] += 1
                self._dismiss(worker, slot)
                return True
        return False

    def _dismiss(self, worker: Worker, slot: Slot) -> None:
        """Make an idle worker leave, and forget its slot unless there is something to remember."""
        slot.release()
        worker.lifecycle.to(WorkerState.DRAINING, "on_stop")
        self.spawn(self.retire(worker))
        self.forget(slot)

    def forget(self, slot: Slot) -> None:
        """Give up a slot that has no worker, unless there is something to remember, or somebody who needs it."""
        if slot.is_idle and self.slots.get(key := (slot.plugin.name, slot.org_id)) is slot:
            del self.slots[key]

    def serving(self, worker: Worker, slot: Slot) -> None:
        """``worker`` serves ``slot`` from now on."""
        self.workers[worker] = slot
        self.lru[worker] = slot
        self.serves(worker, slot)

    def touch(self, worker: Worker) -> None:
        """A request of ``worker`` has ended."""
        if worker in self.lru:
            self.lru.move_to_end(worker)
        if self._room and worker.idle:
            self._wake_one()

    @property
    def waiting_for_room(self) -> int:
        """Starts that wait until a worker leaves."""
        return sum(not room.done() for room in self._room)

    def _wake_one(self) -> None:
        while self._room:
            room = self._room.popleft()
            if not room.done():
                room.set_result(None)
                return

    def _gone(self, worker: Worker, reason: str) -> None:
        slot = self.workers.pop(worker, None)
        self.lru.pop(worker, None)
        if worker.quarters.scratch:
            self._scratches(worker.zygote).drop(worker.quarters.name)
        self.loop.call_later(2 * ZYGOTE_REPORTS, self.isolation.left, worker.quarters.name)
        if worker.zygote is not worker.version.zygote:
            worker.zygote.close()
        if slot is not None and not self._closing:
            slot.crashed(worker, reason)
        self._wake_one()

    async def _quarters(self, zygote: Zygote) -> Quarters:
        name = secrets.token_hex(8)
        if not zygote.spec.plan.layers:
            return Quarters(name, "")
        return Quarters(name, await self._scratches(zygote).make(name))

    def _scratches(self, zygote: Zygote) -> Scratches:
        return zygote.keeper or self.isolation.folders.of(zygote.spec.plan)

    async def retire(self, worker: Worker, hook: str = "") -> None:
        """Stop a worker that is out of service already; without ``hook``, with the one that is due now."""
        if not worker.exit.done():
            await worker.stop(hook or self._last_hook, self.settings.drain_timeout, self.settings.hook_timeout)

    def give_up(self, worker: Worker) -> None:
        """End a worker that nobody waits for any more: with its hook, if it has begun to start for an org."""
        if worker.has_begun:
            self.spawn(self.retire(worker))
        else:
            worker.kill()

    # ---- upkeep

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            now = self.loop.time()
            for worker, slot in list(self.lru.items()):
                if worker.used < now - self.settings.idle_timeout:
                    if worker.idle and not slot.lock.locked() and not self.keep_idle:
                        slot.plugin.counts.stopped["idle"] += 1
                        self._dismiss(worker, slot)
                elif worker.idle and not worker.cancelled:
                    worker.pinged = None
                self._check(worker, slot, now)
            if self._refilling is None:
                self._refill()
            if self.isolation.measures and (self._measuring is None or self._measuring.done()):
                self._measuring = self.spawn(self._measure())
            if self.isolation.watches and (self._watching is None or self._watching.done()):
                self._watching = self.spawn(self._watch())

    async def _measure(self) -> None:
        """Replace workers whose scratch folders have grown too large, where they have no file system of their own."""
        workers = {worker.quarters.scratch: worker for worker in self.lru if worker.quarters.scratch}
        for path in await self.loop.run_in_executor(None, self.isolation.oversized, list(workers)):
            workers[path].kill("its scratch folder grew beyond its limit")

    async def _watch(self) -> None:
        """End workers that take more of the machine than they may. Looks at the busy ones and some of the others."""
        workers = {worker.pid: worker for worker in self.workers if worker.pid}
        self._turn = (self._turn + 1) % _TURNS
        plans = {
            pid: worker.zygote.spec.plan
            for number, (pid, worker) in enumerate(workers.items())
            if not worker.idle or number % _TURNS == self._turn
        }
        found = await self.loop.run_in_executor(None, self.isolation.overusing, plans, list(workers))
        for pid, problem in found.items():
            workers[pid].kill(problem)

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
            any(now - since > _STUCK_AFTER for since in worker.told.values())
            and not slot.lock.locked()
            and not slot.breaker.refuses_for(now)
        ):
            slot.last_error = "a handler did not end after its request was cancelled; the worker was replaced"
            get_logger().error(slot.last_error, plugin=slot.plugin.name, org=slot.org_id, worker=worker.pid)
            self.spawn(slot.replace("a handler is stuck"))
        else:
            worker.ping(now)

    def _refill(self) -> None:
        self._refilling = None
        if self._closing or len(self.workers) >= self.settings.max_workers:
            return
        in_use = {slot.plugin.name: slot.plugin for slot in self.lru.values()}
        for name, plugin in in_use.items():
            spares = self.spares.setdefault(name, deque())
            while spares and spares[0].exit.done():
                spares.popleft()
            version = plugin.current
            if (
                len(spares) < self.settings.spares
                and version is not None
                and version.alive
                and not version.strict
                and name not in self._being_refilled
            ):
                self._being_refilled.add(name)
                self.spawn(self._add_spares(plugin, version, spares))

    async def _add_spares(self, plugin: Plugin, version: Version, spares: "deque[Worker]") -> None:
        """Fork spares one after the other, until there are enough or an org's start comes in between."""
        try:
            while len(spares) < self.settings.spares and len(self.workers) < self.settings.max_workers:
                worker = await self._fork(plugin, version)
                if version is plugin.current and self.spares.get(plugin.name) is spares and not self._closing:
                    spares.append(worker)
                else:
                    worker.kill()
                    return
                if self._refilling is not None:
                    return
        except RequestError:
            pass  # a start that needs it meets the same error and reports it
        finally:
            self._being_refilled.discard(plugin.name)

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
        self._closing, self._last_hook = True, hook
        self._ticker.cancel()
        if self._refilling is not None:
            self._refilling.cancel()
        for slot in self.slots.values():
            slot.close("The host is stopping")
        stops = []
        for worker, serves in list(self.workers.items()):
            if serves is not None:
                serves.release()
                stops.append(self.retire(worker))
            elif worker.lifecycle.state is not WorkerState.DRAINING:
                self.give_up(worker)
        await asyncio.gather(*stops)
        pending = [task for task in self._tasks if task is not asyncio.current_task()]
        if pending:
            await asyncio.wait(pending, timeout=self.settings.hook_timeout + self.settings.drain_timeout + SLACK)
        for worker in list(self.workers):
            worker.kill()
