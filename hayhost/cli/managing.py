"""The commands that manage a store: what they take, and their help. What they do is imported when they run."""

from pathlib import Path
from typing import Any, Final

import click

from .options import FILE, FOLDER, complete_orgs, complete_plugins, complete_tokens, only

__all__ = ["COMMANDS"]

_store = only("store", "key_file")
_hosting = only("store", "key_file", "isolation", "require", "hook_timeout", "log_level")
_json = click.option("--json", "as_json", is_flag=True, help="For programs: JSON on stdout.")
_yes = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
_org = click.argument("org", shell_complete=complete_orgs)
_plugin = click.argument("plugin", shell_complete=complete_plugins)
_plugins = click.option(
    "--plugins",
    type=FOLDER,
    envvar="HAYHOST_PLUGINS",
    help="The folder of plugins.  [default: plugins here, or this folder]",
)
_pairs = click.argument("pairs", nargs=-1, metavar="[KEY=VALUE]...")
_values = click.option("--values", metavar="FILE|-", help="JSON object with fields of the config; - is standard input.")


def _load(flags: dict[str, Any], config: Path | None) -> Any:
    from .opening import load

    return load(flags, config)


def _run(work: Any) -> None:
    from .opening import run

    run(work)


# ---- orgs


@click.group()
def org() -> None:
    """The organisations of a store.

    \b
      hayhost org add acme --name "Acme Ltd"
      hayhost org show acme              what it has installed, and how that is
      hayhost org apply orgs.toml        orgs, plugins, config and credentials as a file has them
    """


@org.command("list")
@_json
@_store
def list_orgs(as_json: bool, config: Path | None, **flags: Any) -> None:
    """List all orgs, by id."""
    from .orgs import list_orgs as run

    _run(run(_load(flags, config), as_json))


@org.command()
@click.argument("org", metavar="ID")
@click.option("--name", help="What people call it.  [default: its id]")
@_json
@_store
def add(org: str, name: str | None, as_json: bool, config: Path | None, **flags: Any) -> None:
    """Add an org. Its ID stands in URLs: letters, digits and _ . - only."""
    from .orgs import add as run

    _run(run(_load(flags, config), org, name, as_json))


@org.command()
@_org
@click.argument("name")
@_json
@_store
def rename(org: str, name: str, as_json: bool, config: Path | None, **flags: Any) -> None:
    """Change what people call ORG to NAME; its id stays."""
    from .orgs import rename as run

    _run(run(_load(flags, config), org, name, as_json))


@org.command()
@_org
@_json
@_store
def show(org: str, as_json: bool, config: Path | None, **flags: Any) -> None:
    """Show ORG and the plugins that it has."""
    from .orgs import show as run

    _run(run(_load(flags, config), org, as_json))


@org.command()
@_org
@click.option("--allow", metavar="PATTERN", multiple=True, help="Nothing but these; may be repeated.")
@click.option("--deny", metavar="PATTERN", multiple=True, help="None of these; may be repeated.")
@click.option("--clear", is_flag=True, help="Begin with empty lists: all tools may be used.")
@_json
@_store
def tools(
    org: str,
    allow: tuple[str, ...],
    deny: tuple[str, ...],
    clear: bool,
    as_json: bool,
    config: Path | None,
    **flags: Any,
) -> None:
    """Show, or say, which tools the MCP clients of ORG may use.

    A PATTERN is plugin__tool in full, with * and ? for what may be anything. --allow and --deny each replace their
    list; what is not given stays as it is. What is denied is not there, also if it is allowed. Running hosts follow.

    \b
      hayhost org tools acme --allow 'stripe__*' --deny stripe__create_refund
      hayhost org tools acme --clear
    """
    from .orgs import tools as run

    _run(run(_load(flags, config), org, allow, deny, clear, as_json))


@org.command()
@_org
@_yes
@_plugins
@_hosting
def remove(org: str, yes: bool, plugins: Path | None, config: Path | None, **flags: Any) -> None:
    """Remove ORG with its installations and tokens. The audit log stays.

    Every plugin that it has enabled is told first (on_disable), for which the folder of plugins is needed.
    """
    from .orgs import remove as run

    _run(run(_load(flags, config), org, plugins, yes))


@org.command()
@click.argument("file", type=FILE)
@click.option("--dry-run", is_flag=True, help="Only say what would be changed.")
@_json
@_plugins
@_hosting
def apply(file: Path, dry_run: bool, as_json: bool, plugins: Path | None, config: Path | None, **flags: Any) -> None:
    """Have the store as FILE declares it. What FILE does not name stays as it is.

    \b
      [orgs.acme]
      name = "Acme Ltd"
      [orgs.acme.plugins.stripe]
      config = { toleranceSeconds = 60 }
      auth = { methodId = "apiKey", credentials = { apiKey = "sk_..." } }
      [orgs.acme.tools]
      deny = ["stripe__create_*"]

    Prints one line for each org and installation that is made (+) or changed (~). Exit code 1 if something could not be
    done; the rest is.
    """
    from .orgs import apply_file as run

    _run(run(_load(flags, config), file, plugins, dry_run, as_json))


# ---- installations


@click.command()
@_plugin
@_org
@_pairs
@_values
@click.option("--auth", metavar="FILE|-", help='Credentials: {"methodId": "...", "credentials": {...}} as JSON.')
@click.option("--disabled", is_flag=True, help="Keep it without serving it; if it is served, end that.")
@_json
@_plugins
@_hosting
def install(
    plugin: str,
    org: str,
    pairs: tuple[str, ...],
    values: str | None,
    auth: str | None,
    disabled: bool,
    as_json: bool,
    plugins: Path | None,
    config: Path | None,
    **flags: Any,
) -> None:
    """Install PLUGIN for ORG, with config and credentials; or change what is installed.

    It is checked against the plugin's schema, the plugin is asked about the credentials (on_validate_auth) and told
    (on_enable, on_config_update), in a sandboxed process as in `serve`. A running host of the same store follows within
    a second. What is not given stays as it is; if any of the config is given, it replaces all of it.

    \b
      hayhost install stripe acme toleranceSeconds=60 webhookSecret=@secret.txt
      hayhost install stripe acme webhookSecret=-            asked for, or read from standard input
      hayhost install stripe acme --values config.json --auth credentials.json
      vault read ... | hayhost install stripe acme --auth -
      hayhost install stripe acme --disabled
    """
    from .installing import Wanted
    from .installing import install as run

    _run(run(_load(flags, config), plugins, Wanted(plugin, org, pairs, values, auth), not disabled, as_json))


@click.command()
@_plugin
@_org
@_yes
@_plugins
@_hosting
def uninstall(plugin: str, org: str, yes: bool, plugins: Path | None, config: Path | None, **flags: Any) -> None:
    """Uninstall PLUGIN for ORG: it is told (on_disable), and its config and credentials are removed."""
    from .installing import uninstall as run

    _run(run(_load(flags, config), plugins, plugin, org, yes))


@click.group("config")
def config_() -> None:
    """The config of a plugin for an org.

    \b
      hayhost config get stripe acme
      hayhost config set stripe acme toleranceSeconds=60 webhookSecret=@secret.txt
    """


@config_.command("get")
@_plugin
@_org
@click.argument("key", required=False)
@_json
@_store
def get_config(plugin: str, org: str, key: str | None, as_json: bool, config: Path | None, **flags: Any) -> None:
    """Show the config of PLUGIN for ORG, or the value of KEY. Secrets are ********."""
    from .installing import get_config as run

    _run(run(_load(flags, config), plugin, org, key, as_json))


@config_.command("set")
@_plugin
@_org
@_pairs
@click.option("--unset", metavar="KEY", multiple=True, help="Remove this field; may be repeated.")
@_values
@_json
@_plugins
@_hosting
def set_config(
    plugin: str,
    org: str,
    pairs: tuple[str, ...],
    unset: tuple[str, ...],
    values: str | None,
    as_json: bool,
    plugins: Path | None,
    config: Path | None,
    **flags: Any,
) -> None:
    """Change fields in the config of PLUGIN for ORG; the others stay as they are.

    A VALUE is read as the type that the plugin's schema gives KEY: a string, a number, true or false, or JSON.
    KEY=@FILE takes it from a file and KEY=- from standard input, or asks for it on a terminal: what is on a command
    line can be seen by others. @@ stands for an @ at the beginning.

    \b
      hayhost config set stripe acme toleranceSeconds=60 webhookSecret=-
      hayhost config set stripe acme --unset toleranceSeconds
      hayhost config set crm acme 'fields=["name", "city"]'
    """
    from .installing import Wanted
    from .installing import set_config as run

    _run(run(_load(flags, config), plugins, Wanted(plugin, org, pairs, values), unset, as_json))


# ---- tokens, keys, audit log


@click.group()
def token() -> None:
    """Bearer tokens for the management of hosts.

    As soon as a store has one, its hosts want one. Tokens are kept as hashes: their secrets are shown once.

    \b
      hayhost token create ci --expires 90d > token
      hayhost token create acme-admin --org acme
    """


@token.command()
@click.argument("name")
@click.option("--org", shell_complete=complete_orgs, help="Good for this org only.  [default: an admin's]")
@click.option("--expires", metavar="AGE|DATE", help="For how long, as 90d, 12h or 2w, or until when.  [default: never]")
@_json
@_store
def create(name: str, org: str | None, expires: str | None, as_json: bool, config: Path | None, **flags: Any) -> None:
    """Make a token called NAME. Its secret, and nothing else, goes to standard output."""
    from .records import create_token as run

    _run(run(_load(flags, config), name, org, expires, as_json))


@token.command("list")
@click.option("--org", shell_complete=complete_orgs, help="Those of this org only.")
@_json
@_store
def list_tokens(org: str | None, as_json: bool, config: Path | None, **flags: Any) -> None:
    """List tokens, revoked ones too."""
    from .records import list_tokens as run

    _run(run(_load(flags, config), org, as_json))


@token.command()
@click.argument("token", metavar="ID", shell_complete=complete_tokens)
@_store
def revoke(token: str, config: Path | None, **flags: Any) -> None:
    """Have the token ID good for nothing, for good."""
    from .records import revoke_token as run

    _run(run(_load(flags, config), token))


@click.group()
def keys() -> None:
    """The keys that encrypt secrets in the store.

    They are in HAYHOST_SECRET_KEY, by comma, or in the key file, one per line. The first one encrypts, all decrypt.

    \b
    To exchange a key, while hosts run:
      1. hayhost keys new >> hayhost.key                  and restart the hosts, if there are several
      2. put the new line before the old one              and restart the hosts
      3. hayhost keys rotate
      4. remove the old line                              and restart the hosts
    """


@keys.command("list")
@_json
@_store
def list_keys(as_json: bool, config: Path | None, **flags: Any) -> None:
    """List the given keys, by their ids, and what is encrypted with them."""
    from .records import list_keys as run

    _run(run(_load(flags, config), as_json))


@keys.command()
@_json
@_store
def rotate(as_json: bool, config: Path | None, **flags: Any) -> None:
    """Encrypt everything with the first key, so that the others are not needed any more.

    Hosts may run meanwhile. If it is broken off, give it again.
    """
    from .records import rotate_keys as run

    _run(run(_load(flags, config), as_json))


@keys.command("new")
def new_key() -> None:
    """Print a new key. It is used once it is in a key file, or in HAYHOST_SECRET_KEY."""
    from hayhost.store.keys import new_key as make

    click.echo(make())


@click.command()
@click.option("--org", shell_complete=complete_orgs, help="What was done to this org.")
@click.option("--plugin", shell_complete=complete_plugins, help="What was done to this plugin's installations.")
@click.option("--actor", metavar="WHO", help="What this one did: cli:USER, token:ID, host, ...")
@click.option("--action", metavar="WHAT", help="Such as install.put, or mcp.call for calls of tools.")
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=100, show_default=True, help="Entries at most.")
@_json
@_store
def audit(
    org: str | None,
    plugin: str | None,
    actor: str | None,
    action: str | None,
    limit: int,
    as_json: bool,
    config: Path | None,
    **flags: Any,
) -> None:
    """Show who did what, and when: the store's audit log, the latest first.

    Calls of tools by MCP clients are shown only with --action mcp.call: they would hide the rest.

    \b
      hayhost audit --org acme --plugin stripe
      hayhost audit --org acme --action mcp.call
      hayhost audit --limit 100000 --json > audit.json
    """
    from .records import read_audit as run

    _run(run(_load(flags, config), org, plugin, actor, action, limit, as_json))


COMMANDS: Final = (org, install, uninstall, config_, token, keys, audit)
