"""Clients who have nothing to do with an attack and must not notice it."""

import contextlib
import threading
from collections.abc import Iterator

from .conftest import HostProcess, wait_until


class Bystanders:
    """Asks each of some paths again and again, on connections that stay, and keeps every status it gets."""

    def __init__(self, host: HostProcess, paths: tuple[str, ...]) -> None:
        self.rounds = 0
        self.troubles: list[str] = []
        self._host = host
        self._paths = paths
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with contextlib.ExitStack() as stack:
            connections = [
                (stack.enter_context(contextlib.closing(self._host.connect())), path) for path in self._paths
            ]
            while not self._stopped.wait(0.005):
                for connection, path in connections:
                    try:
                        connection.request("GET", path)
                        response = connection.getresponse()
                        response.read()
                        if response.status != 200:
                            self.troubles.append(f"{path}: {response.status}")
                    except OSError as error:
                        self.troubles.append(f"{path}: {error!r}")
                        connection.close()
                self.rounds += 1

    def round(self, count: int = 2) -> None:
        """Wait until they have been through all paths again from now on."""
        wanted = self.rounds + count
        wait_until(lambda: self.rounds >= wanted or not self._thread.is_alive(), "the others are answered")


@contextlib.contextmanager
def bystanders(host: HostProcess, *paths: str) -> Iterator[Bystanders]:
    """Have ``paths`` asked during the block and after it; every answer must be a 200."""
    some = Bystanders(host, paths)
    some._thread.start()
    try:
        some.round()
        yield some
        some.round()
    finally:
        some._stopped.set()
        some._thread.join()
    assert some.troubles == []
