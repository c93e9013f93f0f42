"""Attacks on the sandbox: plugins that try to get out (``plugin/``), who they aim at, and who judges them."""
