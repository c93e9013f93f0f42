"""The egress broker: a process that connects for workers, none of which may open a socket.

It knows each worker by the descriptor that the front gave it for that worker, checks names against the manifest's
``permissions.network``, resolves them, refuses special addresses, and passes the connected descriptor on.
"""

__all__: list[str] = []
