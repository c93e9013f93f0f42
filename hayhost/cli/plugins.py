"""The folder of plugins, for commands that can do without being told."""

from pathlib import Path

from hayhost.errors import SettingsError
from hayhost.manifest import is_plugin_folder

__all__ = ["plugins_folder"]


def plugins_folder(given: Path | None) -> Path:
    """``given``, else ``plugins`` here, else this folder if there are plugins in it. Raises ``SettingsError``."""
    if given is not None:
        return given
    here = Path()
    if (here / "plugins").is_dir():
        return here / "plugins"
    if any(is_plugin_folder(path) for path in here.iterdir()):
        return here
    raise SettingsError(
        "this needs the plugin's schema and hooks, and there is no folder of plugins here: "
        "give --plugins DIR, or set HAYHOST_PLUGINS"
    )
