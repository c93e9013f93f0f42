"""Everything that runs in a child process, and the wire format it shares with the front."""
