"""What changes an org's plugin on purpose: credentials checked, settings changed, the plugin disabled."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import msgspec

from sandbox import wire

from .errors import RequestError
from .installs import Auth, Installation
from .logs import get_logger
from .pool import Pool
from .slot import Slot
from .worker import Worker

__all__ = ["disable", "update_config", "validate_auth"]

# It goes to the worker in one frame, with the credentials and perhaps a second time with these merged in.
_MAX_CONFIG: Final = wire.MAX_FRAME // 4


async def validate_auth(
    pool: Pool, slot: Slot, installation: Installation, auth: Auth, config: Mapping[str, Any] | None
) -> bool:
    """Whether the plugin accepts ``auth``, asked in a throwaway worker: a hang or crash there touches nothing else.

    The hook sees the stored config, overlaid with ``config``, overlaid with the credentials. Without the hook every
    credential is valid; a hook that raises, hangs or dies says no.
    """
    if "on_validate_auth" not in (await slot.plugin.ready_version()).hooks:
        return True
    merged = {**installation.config, **(config or {}), **auth.credentials}
    candidate = msgspec.structs.replace(installation, config=merged, auth=auth)
    try:
        async with _throwaway(slot, candidate) as worker:
            done = await worker.hook("on_validate_auth", merged, auth, pool.settings.hook_timeout)
    except RequestError as error:
        get_logger().error(
            "credentials could not be checked", plugin=slot.plugin.name, org=slot.org_id, reason=error.message
        )
        return False
    return done.value and not done.error


async def update_config(pool: Pool, slot: Slot, installation: Installation, config: dict[str, Any]) -> None:
    """Keep a new config, tell the plugin with ``on_config_update``, and swap in a worker that was started with it.

    What goes wrong after the config is kept is logged; the update still succeeds. Raises ``RequestError`` with status
    413, and changes nothing, if no worker could be given the config, and 404 if the plugin has been disabled meanwhile.
    """
    if len(msgspec.json.encode(config)) > _MAX_CONFIG:
        raise RequestError(f"The config is larger than {_MAX_CONFIG} bytes", status=413)
    async with slot.lock:
        current = pool.installs.find(slot.plugin.name, slot.org_id)
        if current is None or not current.enabled:
            raise RequestError("This plugin is not installed for this organisation", status=404)
        changed = msgspec.structs.replace(current, config=config, problem="")
        pool.installs.save(slot.plugin.name, changed)
        await _config_hook(pool, slot, changed)
        await slot.replace_locked("new config")


async def _config_hook(pool: Pool, slot: Slot, installation: Installation) -> None:
    try:
        if "on_config_update" not in (await slot.plugin.ready_version()).hooks:
            return
        async with contextlib.AsyncExitStack() as stack:
            worker = slot.worker
            if worker is None:
                worker = await stack.enter_async_context(_throwaway(slot, installation))
            await worker.hook("on_config_update", installation.config, installation.auth, pool.settings.hook_timeout)
    except RequestError as error:
        get_logger().error("on_config_update failed", plugin=slot.plugin.name, org=slot.org_id, reason=error.message)


async def disable(pool: Pool, slot: Slot, installation: Installation) -> None:
    """Run ``on_disable`` once, stop the worker, and serve the org no more. Disabling what is disabled does nothing."""
    async with slot.lock:
        current = pool.installs.find(slot.plugin.name, slot.org_id)
        if current is None or not current.enabled:
            return
        worker = slot.release()
        pool.installs.save(slot.plugin.name, msgspec.structs.replace(current, enabled=False))
        if worker is None:
            try:
                if "on_disable" in (await slot.plugin.ready_version()).hooks:
                    worker = await slot.launch(installation)
            except RequestError as error:
                get_logger().error(
                    "on_disable could not run", plugin=slot.plugin.name, org=slot.org_id, reason=error.message
                )
        if worker is not None:
            await pool.retire(worker, "on_disable")
        slot.last_error = ""
        if slot.queue:
            slot.ensure_starting()  # which tells those who wait that there is nothing to wait for


@contextlib.asynccontextmanager
async def _throwaway(slot: Slot, installation: Installation) -> AsyncIterator[Worker]:
    worker = await slot.launch(installation, serve=False)
    try:
        yield worker
    finally:
        worker.kill()
