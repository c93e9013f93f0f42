"""The command line. Commands import what they need when they run, so that ``--help`` answers at once."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from hayhost import __version__
from hayhost.errors import HostError
from hayhost.settings import FIELDS

from .managing import COMMANDS
from .options import FILE, FOLDER, NEW_FILE, complete_orgs, complete_plugins
from .options import settings as _settings

__all__ = ["main"]

_NOT_FOR_ONE = (
    *("host", "port", "mode", "max_workers", "spares", "idle_timeout", "reload", "poll", "debounce"),
    *("store", "key_file", "orgs", "allowed_hosts", "route_tokens", "org_rate", "plugin_rate"),
    *("log_memory", "log_records"),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hayhost")
def cli() -> None:
    """Run many organisations' plugins on one machine, each in a worker process of its own.

    \b
    Start here:
      hayhost new my-plugin          make a plugin that runs, with its test
      hayhost dev .                  serve the plugins of this folder while you write them
      hayhost check my-plugin        load a plugin as the host would, and see all that is wrong
      hayhost bench my-plugin        how fast and how small it is on this machine
      hayhost doctor                 what isolation this machine gives, and what to do about the rest
      hayhost serve plugins/         the host
      hayhost logs --follow          what a running host says
      hayhost install my-plugin acme, hayhost org, config, token, keys, audit
                                     what the host keeps, from the command line
    """


@cli.command()
@click.argument("plugins_dir", type=FOLDER)
@_settings()
@click.option("--dry-run", is_flag=True, help="Only say what the file of orgs would change in the store.")
def serve(plugins_dir: Path, config: Path | None, dry_run: bool, **flags: Any) -> None:
    """Serve every plugin in PLUGINS_DIR, for every installed org.

    Each (plugin, org) answers under /plugins/<name>/<org>/. Every setting can also be given as an environment variable
    (--max-workers as HAYHOST_MAX_WORKERS) or in the file of --config (max_workers = 100). A flag wins over the
    environment, and that over the file.

    \b
      hayhost serve plugins/ --mode test             every org is known
      hayhost serve plugins/                         the orgs of the store, hayhost.db here
      hayhost serve plugins/ --orgs orgs.toml        the same, once it has the orgs of a file
    """
    _end_on_signals()
    from hayhost.settings import load

    from .serve import serve as run_host

    run_host(plugins_dir, load(flags, config), instrument=False, dry_run=dry_run)


@cli.command()
@click.argument("plugins_dir", type=FOLDER)
@_settings("mode", "spares", "orgs")
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
@_settings(*_NOT_FOR_ONE)
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
@_settings(*(name for name in FIELDS if name not in ("hook_timeout", "isolation", "require", "layers", "writable")))
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object on stdout.")
def check(plugin_dir: Path, as_json: bool, config: Path | None, **flags: Any) -> None:
    """Load the plugin in PLUGIN_DIR as the host would, and print its metadata, warnings and all errors.

    Exit code 1 if there is an error.
    """
    from hayhost.settings import load

    from .check import check as run_check

    sys.exit(run_check(plugin_dir, load(flags, config), as_json))


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
@click.argument("plugin_dir", type=FOLDER)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(["cold", "hooks", "routes", "memory", "reload"]),
    help="Measure this part only; may be repeated.",
)
@click.option("--rounds", type=click.IntRange(4), default=40, show_default=True, help="Cold starts and hooks to time.")
@click.option(
    "--seconds", type=click.FloatRange(0.05), default=0.7, show_default=True, help="Length of each round of load."
)
@click.option(
    "--orgs", type=click.IntRange(1), default=1000, show_default=True, help="Workers at most, to measure memory with."
)
@click.option("--route", default="", metavar="'METHOD /PATH'", help="The request to make.  [default: the first route]")
@click.option("--body", default="{}", show_default=True, help="Its body, unless it is a GET or DELETE.")
@click.option("--json", "json", type=NEW_FILE, help="Keep the result in this file.")
@click.option("--plot", "plot", type=NEW_FILE, help="Draw the result into this file (.svg or .png).")
@click.option("--compare", "compare", type=FILE, help="Say what changed since this file was written by --json.")
@_settings(*(name for name in FIELDS if name not in ("isolation", "require", "layers")))
def bench(plugin_dir: Path, config: Path | None, **given: Any) -> None:
    """Measure how fast and how small the plugin in PLUGIN_DIR is on this machine, isolated as it would be served.

    A copy of it is served to orgs that do not exist, in test mode: without settings and credentials. Its hooks and the
    route run many times; what they do outside, they do that often. It takes about a minute, in five parts:

    \b
      cold     the first request to an org that has no worker, phase by phase, without and with a spare
      hooks    from the call in the host to the result in the host; on_initialize once, in the plugin's zygote
      routes   latency and throughput at 1, 8 and 32 connections, in turn with a bare Tornado server that gives
               the same answer: the difference is what the host costs, and how fast the machine is does not matter
      memory   of each idle worker at 1, 10, 100 and 1000 orgs. PSS counts shared pages by the share
      reload   from the save of a file until a worker with the new code has the org

    \b
      hayhost bench my-plugin --route 'POST /echo' --body '{"a": 1}'
      hayhost bench my-plugin --json before.json              keep it, change something, and then
      hayhost bench my-plugin --compare before.json           what got better or worse, noise considered
      hayhost bench my-plugin --only memory --orgs 100        a part of it
      hayhost bench my-plugin --plot bench.svg                needs matplotlib: pip install 'hayhost[bench]'

    With --compare, a change counts if it is beyond what rounds differ by within the runs, beyond 5 %, and beyond what
    the Tornado server, which has nothing of the host in it, changed between the runs.
    """
    from hayhost.settings import load

    from .bench import Options
    from .bench import bench as run_bench

    settings = load({name: given.pop(name) for name in ("isolation", "require", "layers")}, config)
    run_bench(plugin_dir, settings, Options(**given))


@cli.command()
@click.argument("name")
@click.option(
    "--directory", type=FOLDER, default=".", help="Where to make the plugin's folder.  [default: this folder]"
)
def new(name: str, directory: Path) -> None:
    """Make a plugin that runs, in the folder NAME, with its test."""
    from .new import new as make

    make(name, directory)


_url = click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the host listens.")
_token_file = click.option("--token-file", type=FILE, help="File with the bearer token, if the host needs one.")


@cli.command()
@click.argument("plugin", required=False, shell_complete=complete_plugins)
@click.argument("org", required=False, shell_complete=complete_orgs)
@click.option("--follow", "-f", is_flag=True, help="Go on with lines as they come.")
@click.option(
    "--level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="debug",
    help="The least level.  [default: all that is logged]",
)
@click.option("--since", metavar="AGE|TIME", help="Not older than 5m, 2h or 2027-01-31T12:00:00Z.")
@click.option("--grep", "text", metavar="TEXT", help="Only lines with this in their message, traceback or meta.")
@click.option("--request", metavar="ID", help="Only lines of this request.")
@click.option(
    "-n", "--lines", "count", type=click.IntRange(0, 1000), default=100, show_default=True, help="Lines at most."
)
@click.option("--file", type=FILE, help="Read this file (of the setting log_file) instead of asking a host.")
@click.option("--json", "as_json", is_flag=True, help="For programs: one JSON object per line.")
@_url
@_token_file
def logs(
    url: str,
    token_file: Path | None,
    file: Path | None,
    follow: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Show the log of a running host: its last lines, of PLUGIN and of ORG if they are given.

    While it follows, it waits for a host that is gone, and goes on where it was. A host with tokens needs one, in the
    file of --token-file or in the environment as HAYHOST_TOKEN; an org's shows what is of that org.

    \b
      hayhost logs --follow                             everything
      hayhost logs stripe acme --level warning          what is odd about one org's plugin
      hayhost logs --since 10m --grep timeout --json
      hayhost logs --file hayhost.log -n 1000           without a host
    """
    from .logs import Asked
    from .logs import logs as show

    show(Asked(**asked), url, token_file, file, follow=follow, programs=as_json)


@cli.command()
@click.argument("plugin", shell_complete=complete_plugins)
@_url
@_token_file
def rollback(plugin: str, url: str, token_file: Path | None) -> None:
    """Have a running host serve the version of PLUGIN that it served before.

    It is still loaded, so this takes as long as a worker's start. The next change of the plugin's files is served.
    A host with tokens needs an admin's: in the file of --token-file, or in the environment as HAYHOST_TOKEN.
    """
    from .rollback import rollback as roll_back

    roll_back(plugin, url, token_file)


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


for _command in COMMANDS:
    cli.add_command(_command)


def _end_on_signals() -> None:
    """Until the host itself handles signals there is nothing to stop: one of them is the end, and a clean one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)


def _leave(*_: object) -> None:
    _flush_log()
    os._exit(0)


def _flush_log() -> None:
    """What was logged comes before what is said next; a command that has no log does not import it for that."""
    flush = getattr(sys.modules.get("hayhost.logs"), "flush", None)  # a signal may come while it is being imported
    if flush is not None:
        flush()


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
            command = error.ctx.command_path if error.ctx is not None else "hayhost"
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
        from hayhost.logs import escape, flush

        flush()
        for line in str(error).splitlines():
            click.echo(f"hayhost: {escape(line)}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        code = 141
    sys.exit(code or 0)
