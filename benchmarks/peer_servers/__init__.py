"""The servers that ``benchmarks.peers`` measures beside the host. Each prints its port."""
