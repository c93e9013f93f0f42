"""What another process changed is followed, however long the store cannot be read."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hayhost import management
from hayhost.errors import StoreUnavailableError
from hayhost.management import Management
from hayhost.pool import Pool


def test_a_change_elsewhere_is_followed_when_the_store_can_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(management, "_AGAIN", 0.0)

    async def main() -> None:
        tries, failed = 3, list[BaseException | None]()
        retired = asyncio.Event()
        worker: Any = object()

        async def load(_plugin: str, _org: str) -> None:
            nonlocal tries
            tries -= 1
            if tries:
                raise StoreUnavailableError("away")

        async def retire(stopped: Any) -> None:
            assert stopped is worker
            retired.set()

        def spawn(work: Any) -> None:
            asyncio.ensure_future(work).add_done_callback(lambda task: failed.append(task.exception()))

        plugin = SimpleNamespace(name="p")
        slot = SimpleNamespace(plugin=plugin, org_id="acme", lock=asyncio.Lock(), users=0, queue=(), worker=worker)
        slot.release = lambda: slot.worker
        pool = SimpleNamespace(slots={("p", "acme"): slot}, slot=lambda _plugin, _org: slot, forget=lambda _slot: None)
        pool.installs, pool.retire, pool.spawn = SimpleNamespace(load=load), retire, spawn
        pool.loop = asyncio.get_running_loop()
        Management(cast(Pool, pool)).changed_elsewhere("p", "acme")
        async with asyncio.timeout(10):
            await retired.wait()
        await asyncio.sleep(0)
        assert set(failed) == {None}

    asyncio.run(main())
