"""What the host counts of itself while it works, and ``/metrics``, where that can be read."""

__all__: list[str] = []
