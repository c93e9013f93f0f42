"""The command line. Commands import what they need when they run, so that ``--help`` answers at once."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import click

from hayhost import __version__
from hayhost.errors import HostError
from hayhost.settings import FIELDS, Settings

__all__ = ["main"]

F = TypeVar("F", bound=Callable[..., Any])

_METAVARS = {int: "N", float: "SECONDS", str: "TEXT", tuple[str, ...]: "FOLDERS"}
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _settings(*without: str) -> Callable[[F], F]:
    """Add an option for each setting but those in ``without``, and ``--config``."""
    hints = get_type_hints(Settings)

    def decorate(function: F) -> F:
        for name, field in reversed(FIELDS.items()):
            if name in without:
                continue
            hint = hints[name]
            text = field.metadata["help"]
            if hint is bool:
                switch = f"--{name}/--no-{name}"
                default = "on" if field.default else "off"
                function = click.option(switch, name, default=None, help=f"{text}  [default: {default}]")(function)
                continue
            kind: Any = str
            if get_origin(hint) is Literal:
                kind = click.Choice(get_args(hint))
            elif hint == Path | None:
                kind = _FILE
            shown_default = _shown(field.default, field.metadata["size"])
            default = "" if field.default in (None, ()) else f"  [default: {shown_default}]"
            option = f"--{name.replace('_', '-')}"
            named = {"network": "NETWORKS", "nameserver": "ADDRESS:PORT"}.get(field.metadata["kind"])
            shown = None if kind is not str else "SIZE" if field.metadata["size"] else named or _METAVARS.get(hint)
            function = click.option(option, name, type=kind, default=None, metavar=shown, help=text + default)(function)
        return click.option(
            "--config",
            type=_FILE,
            envvar="HAYHOST_CONFIG",
            help="TOML file with settings; flags and HAYHOST_* override it.",
        )(function)

    return decorate


def _shown(value: Any, size: bool) -> str:
    return f"{value >> 20}MiB" if size else f"{value:g}" if isinstance(value, float) else str(value)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hayhost")
def cli() -> None:
    """Run many organisations' plugins on one machine, each in a worker process of its own.

    \b
    Start here:
      hayhost new my-plugin          make a plugin that runs, with its test
      hayhost dev .                  serve the plugins of this folder while you write them
      hayhost check my-plugin        load a plugin as the host would, and see all that is wrong
      hayhost doctor                 what isolation this machine gives, and what to do about the rest
      hayhost serve plugins/         the host
    """


@cli.command()
@click.argument("plugins_dir", type=_FOLDER)
@_settings()
def serve(plugins_dir: Path, config: Path | None, **flags: Any) -> None:
    """Serve every plugin in PLUGINS_DIR, for every installed org.

    Each (plugin, org) answers under /plugins/<name>/<org>/. Every setting can also be given as an environment variable
    (--max-workers as HAYHOST_MAX_WORKERS) or in the file of --config (max_workers = 100). A flag wins over the
    environment, and that over the file.

    \b
      hayhost serve plugins/ --mode test             every org is known
      hayhost serve plugins/ --orgs orgs.toml        the orgs of a file
    """
    _end_on_signals()
    from hayhost.settings import load

    from .serve import serve as run_host

    run_host(plugins_dir, load(flags, config), instrument=False)


@cli.command()
@click.argument("plugins_dir", type=_FOLDER)
@_settings("mode", "spares")
def dev(plugins_dir: Path, config: Path | None, **flags: Any) -> None:
    """Serve the plugins in PLUGINS_DIR to their author.

    As `serve` in test mode, with a readable log that shows each request, and with the plugins' own type annotations
    checked at run time. Save a file, and the next request gets the new code; if it does not load, the log has your
    traceback and the old code goes on.
    """
    _end_on_signals()
    from hayhost.settings import load

    from .serve import serve as run_host

    settings = load({**flags, "mode": "test"}, config, log_format="console")
    run_host(plugins_dir, settings, instrument=True)


@cli.command()
@click.option("--plugin-path", required=True, help="The plugin's folder.")
@click.option("--org-id", required=True, help="The org to serve.")
@click.option("--port", required=True, help="Port to listen on, on 127.0.0.1.")
@click.option(
    "--mode",
    type=click.Choice(["production", "test"]),
    default="production",
    show_default=True,
    help="In production the org is read from HAY_ORG_CONFIG and HAY_ORG_AUTH.",
)
@_settings("host", "port", "mode", "orgs", "max_workers", "spares", "idle_timeout", "reload", "poll", "debounce")
def run(plugin_path: str, org_id: str, port: str, mode: str, config: Path | None, **flags: Any) -> None:
    """Serve one plugin for one org, at the root: the worker that Hay Core starts.

    \b
    Production mode reads from the environment
      HAY_ORG_CONFIG   {"org": {"id": "...", "name": "..."}, "config": {...}}
      HAY_ORG_AUTH     {"methodId": "...", "credentials": {...}}   ({} or unset: none)
    What is missing or malformed there leaves the worker degraded, and /health says why.

    \b
    Exit codes: 0 after SIGTERM or SIGINT; 1 bad arguments, manifest, plugin or on_initialize; 2 the server could
    not start (port taken).
    """
    _end_on_signals()
    from hayhost.settings import load

    from .run import run as run_worker

    settings = load({**flags, "port": port, "mode": mode, "spares": 0}, config)
    sys.exit(run_worker(plugin_path, org_id, settings))


@cli.command()
@click.argument("plugin_dir", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object on stdout.")
def check(plugin_dir: Path, as_json: bool) -> None:
    """Load the plugin in PLUGIN_DIR as the host would, and print its metadata, warnings and all errors.

    Exit code 1 if there is an error.
    """
    from .check import check as run_check

    sys.exit(run_check(plugin_dir, as_json))


@cli.command()
@_settings(*(name for name in FIELDS if name not in ("isolation", "require", "layers")))
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object on stdout.")
def doctor(as_json: bool, config: Path | None, **flags: Any) -> None:
    """Say what isolation this machine gives, tried for real, and what to do about the rest.

    Exit code 1 below the required level, or if a worker could do what it must not.
    """
    from hayhost.settings import load

    from .doctor import doctor as run_doctor

    sys.exit(run_doctor(load(flags, config), as_json))


@cli.command()
@click.argument("name")
@click.option(
    "--directory", type=_FOLDER, default=".", help="Where to make the plugin's folder.  [default: this folder]"
)
def new(name: str, directory: Path) -> None:
    """Make a plugin that runs, in the folder NAME, with its test."""
    from .new import new as make

    make(name, directory)


@cli.command()
@click.argument("plugin")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the host listens.")
def rollback(plugin: str, url: str) -> None:
    """Have a running host serve the version of PLUGIN that it served before.

    It is still loaded, so this takes as long as a worker's start. The next change of the plugin's files is served.
    """
    from .rollback import rollback as roll_back

    roll_back(plugin, url)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the tab-completion script of SHELL.

    \b
      eval "$(hayhost completion bash)"              in ~/.bashrc
      eval "$(hayhost completion zsh)"               in ~/.zshrc
      hayhost completion fish > ~/.config/fish/completions/hayhost.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "hayhost", "_HAYHOST_COMPLETE").source())


def _end_on_signals() -> None:
    """Until the host itself handles signals there is nothing to stop: one of them is the end, and a clean one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))


def _open_standard_streams() -> None:
    """A supervisor may start us with some of them closed: nothing else may get their numbers, or miss them."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  # for as long as we live


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command; every failure is one clear line and an exit code."""
    _open_standard_streams()
    name = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    try:
        code = cli.main(arguments, prog_name="hayhost", standalone_mode=False)
    except click.UsageError as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()
        else:
            command = f"hayhost {name}" if name in cli.commands else "hayhost"
            message = " ".join(error.format_message().split()).rstrip(".")
            click.echo(f"{command}: {message}; see `{command} --help`", err=True)
        # Hay Core knows 1 for bad arguments
        code = 1 if name == "run" else error.exit_code
    except click.ClickException as error:
        error.show()
        code = 1
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except HostError as error:
        from hayhost.logs import escape

        for line in str(error).splitlines():
            click.echo(f"hayhost: {escape(line)}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        code = 141
    sys.exit(code or 0)
