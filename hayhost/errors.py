"""The host's errors, one class per condition; each knows the HTTP status or exit code that it amounts to."""

from collections.abc import Mapping
from itertools import islice
from typing import ClassVar

__all__ = [
    "BreakerOpenError",
    "ConflictError",
    "ExistsError",
    "HostError",
    "InvalidError",
    "ManifestError",
    "NoWorkerError",
    "NotAllowedError",
    "NotFoundError",
    "PluginLoadError",
    "QueueFullError",
    "RequestError",
    "RequestTimeoutError",
    "SecretKeyError",
    "SettingsError",
    "StartFailedError",
    "StoreError",
    "StoreUnavailableError",
    "StoreVersionError",
    "UnavailableError",
    "WorkerLostError",
]


class HostError(Exception):
    """A condition that ends a command with one clear line; ``exit_code`` is what the command exits with."""

    exit_code: ClassVar[int] = 1


class SettingsError(HostError):
    """A flag, environment variable or configuration file says something that cannot be."""


class ManifestError(HostError):
    """A plugin's manifest is wrong; ``problems`` has every one of its errors."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class PluginLoadError(HostError):
    """A plugin did not load. ``traceback`` is for its author and goes to the log only."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class StoreError(HostError):
    """The store cannot do what it was asked for. Its message has no secret in it; over HTTP it is ``status``."""

    status: ClassVar[int] = 503


class StoreUnavailableError(StoreError):
    """The database cannot be reached, read or written now."""


class StoreVersionError(StoreError):
    """The database is not one that this version can work with."""


class SecretKeyError(StoreError):
    """A secret key is malformed, missing, open to others, or not the one that something was encrypted with."""


class NotAllowedError(StoreError):
    """A value that the store does not take, such as a malformed org id."""

    status = 422


class NotFoundError(StoreError):
    """There is no such org, installation or token."""

    status = 404


class ExistsError(StoreError):
    """There is one of that id already."""

    status = 409


class ConflictError(StoreError):
    """Somebody else changed it in between. ``current`` is the revision that it has now; 0: it is not there."""

    status = 412

    def __init__(self, message: str, current: int) -> None:
        super().__init__(message)
        self.current = current


class InvalidError(HostError):
    """What was given for an installation is wrong; ``fields`` says what, by field (``config.apiKey``).

    Of very many wrong fields, only the first ``MOST`` are told.
    """

    MOST: ClassVar[int] = 100

    def __init__(self, fields: Mapping[str, str]) -> None:
        fields = dict(islice(fields.items(), self.MOST))
        super().__init__("\n".join(f"{field}: {problem}" for field, problem in fields.items()))
        self.fields = fields


class RequestError(Exception):
    """A request that is answered with ``status`` and ``{"error": message}``; the fault is named by the subclass."""

    status: int = 500
    reason: ClassVar[str] = "other"
    """What it is called in the metrics."""

    def __init__(self, message: str, *, status: int | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or type(self).status
        self.headers = headers or {}


class UnavailableError(RequestError):
    """Nothing can serve the request now. ``retry_after`` is in seconds."""

    status = 503
    reason = "unavailable"

    def __init__(self, message: str, retry_after: float = 1) -> None:
        super().__init__(message, headers={"Retry-After": str(max(1, round(retry_after)))})


class QueueFullError(UnavailableError):
    """As many requests wait as may."""

    reason = "queue_full"


class NoWorkerError(UnavailableError):
    """No worker took the request within its time limit."""

    reason = "no_worker"


class BreakerOpenError(UnavailableError):
    """Starts of the worker failed so often that it is given a rest."""

    reason = "breaker_open"


class StartFailedError(UnavailableError):
    """The worker never became ready."""

    reason = "start_failed"


class WorkerLostError(RequestError):
    """The worker died, or broke the protocol, with the request in its hands. It is never sent again."""

    status = 502
    reason = "worker_lost"


class RequestTimeoutError(RequestError):
    """The handler did not begin to answer within the request's time limit."""

    status = 504
    reason = "timeout"
