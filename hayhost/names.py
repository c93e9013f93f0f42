"""What orgs and plugins may be called. Both stand in URLs as they are: no encoded form of them is recognised."""

import re
from typing import Final

__all__ = ["ORG_ID", "PLUGIN_NAME"]

ORG_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
PLUGIN_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
