"""``hayhost check`` on every kind of right and wrong plugin, and that ``serve`` and ``run`` say the same."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import hayhost.sdk
import sandbox

from .commands import Done, environment, run_hayhost
from .conftest import LIMIT, HostProcess, Serve, all_gone, wait_until, write_plugin

HOST_FILES = [str(Path(str(package.__file__)).parent) for package in (hayhost.sdk, sandbox)]
ALL = ("routes", "config", "auth", "mcp", "ui")
IMPORT = "from hayhost.sdk import *\n"
GOOD = f"{IMPORT}@define_hay_plugin\nclass Plugin:\n    name = 'good'\n"


class Case(NamedTuple):
    """A plugin, and what ``check`` has to say of it."""

    make: Callable[[Path], object]
    expected: tuple[str, ...]


def load(source: str, *expected: str, **options: Any) -> Case:
    """A plugin with a right manifest and ``source`` for its ``plugin.py``."""
    return Case(lambda folder: write_plugin(folder, source, **options), expected)


def init(body: str, *expected: str, **options: Any) -> Case:
    """A plugin whose ``on_initialize(self, ctx)`` is ``body``; it has a ``handler``, and a config field ``f``."""
    source = f"{IMPORT}@define_hay_plugin\nclass Plugin:\n    name = 'x'\n    def handler(self, req): ...\n"
    source += f"    def on_initialize(self, ctx):\n{textwrap.indent(textwrap.dedent(body), ' ' * 8)}\n"
    return load(source, *expected, **options)


def field(descriptor: str, *expected: str) -> Case:
    """A plugin that registers the config field ``f`` as ``descriptor``."""
    return init(f"ctx.register.config({{'f': {descriptor}}})", "'f'", *expected, env=("LISTED",))


def definition(body: str, *expected: str) -> Case:
    """A plugin whose class has ``body``."""
    return load(f"{IMPORT}@define_hay_plugin\nclass Plugin:\n{textwrap.indent(body, '    ')}\n", *expected)


def named(body: str, *expected: str) -> Case:
    """As ``definition``, with a name."""
    return definition(f"name = 'x'\n{body}", *expected)


def without(capability: str, body: str, call: str) -> Case:
    """A plugin that makes a register call without declaring its capability."""
    capabilities = tuple(item for item in ALL if item != capability)
    wanted = f"{call} needs the capability '{capability}': add it to `capabilities`"
    return init(body, wanted, capabilities=capabilities)


def manifest(old: str, new: str, *expected: str) -> Case:
    """A plugin with a good ``plugin.py`` and a ``pyproject.toml`` in which ``old`` has become ``new``."""

    def make(folder: Path) -> None:
        file = write_plugin(folder, GOOD, files={"other.txt": ""}) / "pyproject.toml"
        text = file.read_text().replace(f'"{folder.name}"', '"x"')
        assert old in text
        file.write_text(text.replace(old, new))

    return Case(make, ("pyproject.toml: ", *expected))


def entry(value: str, files: dict[str, str], *expected: str) -> Case:
    """A plugin with ``entry = value`` and ``files``."""

    def make(folder: Path) -> None:
        file = write_plugin(folder, files=files) / "pyproject.toml"
        file.write_text(file.read_text().replace("./plugin.py", value))
        if "plugin.py" not in files:
            (folder / "plugin.py").unlink()

    return Case(make, expected)


def package(text: str, *expected: str) -> Case:
    """A plugin with nothing but a ``package.json``."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "package.json").write_text(text)

    return Case(make, ("package.json: ", *expected))


def linked(folder: Path) -> None:
    outside = folder.parent / "outside.txt"
    outside.write_text(GOOD)
    (write_plugin(folder) / "plugin.py").unlink()
    (folder / "plugin.py").symlink_to(outside)


def latin(folder: Path) -> None:
    (write_plugin(folder) / "plugin.py").write_bytes(b"name = '\xff'\n")


ROUTE, FIELD = "ctx.register.route('GET', '/a', self.handler)\n", "ctx.register.config({'f': {'type': 'string'}})\n"
OAUTH = "ctx.register.auth.oauth2(id='o', label='O', authorization_url='https://a/', token_url='https://a/', "
FIELDS = "client_id=ctx.config.field('f'), client_secret=ctx.config.field('f'))"

MANIFESTS = {
    "entry-missing": manifest('entry = "./plugin.py"', "", "hay-plugin.entry: found nothing; allowed: "),
    "entry-no-file": manifest("./plugin.py", "./gone.py", "hay-plugin.entry: found './gone.py'", "No such file"),
    "entry-absolute": manifest("./plugin.py", "/etc/passwd", "hay-plugin.entry: found '/etc/passwd'"),
    "entry-above": manifest("./plugin.py", "./../x.py", "hay-plugin.entry: found './../x.py'"),
    "entry-symlink": Case(linked, ("hay-plugin.entry: found './plugin.py' (it is outside of the plugin's folder)",)),
    "entry-no-python": manifest("./plugin.py", "./other.txt", "it is not a .py file"),
    "entry-bad-attribute": manifest("./plugin.py", "./plugin.py:a-b", "hay-plugin.entry: ", "./file.py:attribute"),
    "entry-module-alone": manifest("./plugin.py", "plugin", "hay-plugin.entry: ", "package.module:attribute"),
    "entry-module-gone": manifest("./plugin.py", "pkg.mod:plugin", "no pkg/mod.py in the plugin's folder"),
    "display-name-missing": manifest("displayName", "#", "hay-plugin.displayName: found nothing"),
    "display-name-empty": manifest('displayName = "x"', 'displayName = " "', "hay-plugin.displayName: found ' '"),
    "category": manifest('"tool"', '"toys"', "category: found 'toys'; allowed: one of integration, channel, tool"),
    "category-missing": manifest("category", "#", "hay-plugin.category: found nothing; allowed: one of integration"),
    "capabilities-missing": manifest("capabilities", "#", "hay-plugin.capabilities: found nothing; allowed: a list"),
    "capability": manifest('"mcp"', '"mpc"', "capabilities[3]: found 'mpc'; allowed: one of routes, mcp, auth"),
    "env-name": manifest("env = []", 'env = ["A-B"]', "hay-plugin.env[0]: found 'A-B'"),
    "env-of-the-host": manifest("env = []", 'env = ["HAY_ORG_AUTH"]', "env[0]", "the host's own secrets"),
    "network": manifest("env = []", 'permissions = {network = ["10.0.0.1:80"]}', "permissions.network[0]", "by name"),
    "memory": manifest("env = []", 'permissions = {memory = "lots"}', "permissions.memory: found 'lots'", "256MiB"),
    "permission": manifest("env = []", "permissions = {disk = 1}", "permissions.disk", "unknown key", "cpu_seconds"),
    "unknown-key": manifest("env = []", "evn = []", "hay-plugin.evn", "did you mean env?", "allowed: the keys entry"),
    "name-missing": manifest('name = "x"', "", "project.name: found nothing; allowed: 1 to 64 letters"),
    "name-scoped": manifest('name = "x"', 'name = "@hay/x"', "project.name: found '@hay/x'"),
    "name-long": manifest('name = "x"', f'name = "{"x" * 65}"', "project.name: "),
    "version": manifest('"1.2.3"', "3", "project.version: found 3"),
    "no-toml": manifest("[project]", "[project", "allowed: valid TOML", "line 1"),
    "no-json": package('{"name": ', "allowed: valid JSON"),
    "json-no-object": package('{"name": "x", "hay-plugin": []}', "hay-plugin: found []"),
    "json-wrong-key": package(
        '{"name": "x", "hay-plugin": {"entry": "./x.py", "displayName": "X", "category": "tool", "capabilites": []}}',
        "capabilites",
        "did you mean capabilities?",
    ),
}

PLUGINS = {
    # the module and what it exports
    "no-export": load("x = 1", "exports no result of define_hay_plugin(...); exactly one is needed"),
    "empty": load("", "exports no result of define_hay_plugin(...)"),
    "two-exports": load(
        f"{GOOD}Other = define_hay_plugin(Plugin.wrapped)", "exports 2 results", "(Plugin, Other)", "file.py:attribute"
    ),
    "attribute-missing": entry("./plugin.py:other", {"plugin.py": GOOD}, "has no attribute 'other'"),
    "attribute-of-another-kind": entry(
        "./plugin.py:other", {"plugin.py": f"{GOOD}other = 3"}, "the result of define_hay_plugin(...); it is int"
    ),
    "attribute-of-a-module": entry(
        "pkg.mod:other", {"pkg/__init__.py": "", "pkg/mod.py": GOOD}, "module 'pkg.mod' has no attribute 'other'"
    ),
    "undecorated": load(f"{IMPORT}class Plugin:\n    name = 'x'\n", "exports no result of define_hay_plugin(...)"),
    # what define_hay_plugin takes
    "of-a-mapping": load(f"{IMPORT}p = define_hay_plugin({{'name': 'x'}})", "takes a class or a factory, not dict"),
    "applied-twice": load(f"{GOOD}Plugin = define_hay_plugin(Plugin)", "define_hay_plugin was applied twice"),
    "class-with-arguments": definition("def __init__(self, x): ...", "must be callable with no arguments"),
    "class-that-raises": definition("def __init__(self): raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "factory-without-context": load(
        f"{IMPORT}@define_hay_plugin\ndef make():\n    return {{'name': 'x'}}\n",
        "make() must be callable with exactly one, its HayGlobalContext",
    ),
    "factory-of-nothing": load(f"{IMPORT}@define_hay_plugin\ndef make(ctx): ...\n", "make() returned None"),
    "factory-async": load(f"{IMPORT}@define_hay_plugin\nasync def make(ctx): ...\n", "make() must be a plain function"),
    "factory-that-raises": load(f"{IMPORT}@define_hay_plugin\ndef make(ctx): 1 / 0\n", "ZeroDivisionError: "),
    # the definition
    "no-name": definition("pass", "`name` must be a non-empty string, not None"),
    "empty-name": definition("name = ' '", "`name` must be a non-empty string, not ' '"),
    "name-of-another-type": definition("name = 3", "`name` must be a non-empty string, not 3"),
    "hook-not-callable": named("on_start = 3", "`on_start` must be callable, not int"),
    "hook-without-context": named("def on_stop(self): ...", "`on_stop` must take exactly its one"),
    "hook-with-two": named("def on_enable(self, a, b): ...", "`on_enable` must take exactly its one"),
    "hook-with-a-default": named("def on_start(self, a, b=1): ...", "`on_start` must take exactly"),
    "hook-by-keyword": named("def on_start(self, *, ctx): ...", "`on_start` must take exactly"),
    "all-at-once": definition(
        "name = 3\non_start = 3\nasync def on_stop(self): ...", "`name` must be", "`on_start` must be", "`on_stop` must"
    ),
    "mapping-without-name": load(f"{IMPORT}@define_hay_plugin\ndef make(ctx): return {{}}\n", "`name` must be"),
    "mapping-hook": load(
        f"{IMPORT}@define_hay_plugin\ndef make(ctx): return {{'name': 'x', 'on_disable': 'no'}}\n",
        "`on_disable` must be callable, not str",
    ),
    # on_initialize
    "initialize-raises": init("raise ValueError('not today')", "ValueError: not today"),
    "initialize-async-raises": definition(
        "name = 'x'\nasync def on_initialize(self, ctx): raise ValueError('not today')", "ValueError: not today"
    ),
    "initialize-exits": init("import sys; sys.exit(0)", "the plugin called sys.exit(0) while it was loading"),
    "initialize-org": init("ctx.org", "HayGlobalContext has no 'org'; it is in every hook but on_initialize"),
    "initialize-mcp": init("ctx.mcp", "HayGlobalContext has no 'mcp'; it is in on_start"),
    # capabilities
    "undeclared-config": without("config", FIELD, "register.config()"),
    "undeclared-route": without("routes", ROUTE, "register.route()"),
    "undeclared-api-key": without(
        "auth", f"{FIELD}ctx.register.auth.api_key(id='k', label='K', config_field='f')", "register.auth.api_key()"
    ),
    "undeclared-oauth2": without("auth", FIELD + OAUTH + FIELDS, "register.auth.oauth2()"),
    "undeclared-ui": without("ui", "ctx.register.ui(slot='s', component='c')", "register.ui()"),
    "undeclared-page": without("ui", "ctx.register.page(id='p', title='P', component='c')", "register.page()"),
    # config
    "config-no-mapping": init("ctx.register.config([])", "argument 'schema' of Register.config()", "got list"),
    "config-key": field("{'type': 'string', 'lable': 'L'}", "lable"),
    "config-type": field("{'type': 'text'}", "'string', 'number', 'boolean', 'json'"),
    "config-no-type": field("{}", "type"),
    "config-label": field("{'type': 'string', 'label': 3}", "label", "not an instance of str"),
    "config-required": field("{'type': 'string', 'required': 'yes'}", "required", "not an instance of bool"),
    "config-env": field("{'type': 'string', 'env': 'HOME'}", "'HOME' is not in the manifest's `env`", "lists LISTED"),
    "config-twice": init(FIELD + FIELD, "config field 'f' is registered twice"),
    "config-no-name": init("ctx.register.config({'': {'type': 'string'}})", "a config field name must not be empty"),
    "default-string": field("{'type': 'string', 'default': 3}", "default 3 is not a valid string"),
    "default-number-bool": field("{'type': 'number', 'default': True}", "default True is not a valid number"),
    "default-number-nan": field("{'type': 'number', 'default': float('nan')}", "default nan is not a valid number"),
    "default-number-inf": field("{'type': 'number', 'default': float('inf')}", "default inf is not a valid number"),
    "default-number-huge": field("{'type': 'number', 'default': 10**400}", "is not a valid number"),
    "default-number-text": field("{'type': 'number', 'default': '3'}", "default '3' is not a valid number"),
    "default-boolean": field("{'type': 'boolean', 'default': 1}", "default 1 is not a valid boolean"),
    "default-json": field("{'type': 'json', 'default': [1j]}", "is not a valid json"),
    # auth
    "auth-field": init(
        "ctx.register.auth.api_key(id='k', label='K', config_field='nope')", "'nope', which is not registered"
    ),
    "auth-reference": init("ctx.config.field('nope')", "config field 'nope' is not registered"),
    "auth-twice": init(
        f"{FIELD}for _ in '12': ctx.register.auth.api_key(id='k', label='K', config_field='f')",
        "auth method id 'k' is registered twice",
    ),
    "auth-two-kinds-of-one-id": init(
        f"{FIELD}ctx.register.auth.api_key(id='o', label='K', config_field='f')\n{OAUTH}{FIELDS}",
        "auth method id 'o' is registered twice",
    ),
    "auth-no-id": init(f"{FIELD}ctx.register.auth.api_key(id='', label='K', config_field='f')", "id must not be empty"),
    "oauth2-field": init(
        f"{FIELD}{OAUTH}client_id=ctx.config.field('f'), client_secret='f')",
        "argument 'client_secret' of RegisterAuth.oauth2(): expected ConfigFieldReference, got str",
    ),
    "oauth2-url": init(
        FIELD + OAUTH.replace("https://a/", "/authorize") + FIELDS, "must be an absolute http(s) URL, not '/authorize'"
    ),
    "oauth2-scopes": init(f"{FIELD}{OAUTH}scopes='read', {FIELDS}", "scopes must be a list of strings"),
    # routes
    "route-twice": init(ROUTE + ROUTE, "route GET /a is registered twice"),
    "route-twice-by-shape": init(
        "for name in 'ab': ctx.register.route('GET', '/x/{' + name + '}', self.handler)",
        "route GET /x/{b} is registered twice (as /x/{a})",
    ),
    "route-no-slash": init(ROUTE.replace("/a", "a"), "route path 'a' must start with '/'"),
    "route-method": init(ROUTE.replace("GET", "HEAD"), "argument 'method' of Register.route()", "'PATCH'"),
    "route-lower-case": init(ROUTE.replace("GET", "get"), "argument 'method' of Register.route()"),
    "route-handler": init(ROUTE.replace("self.handler", "3"), "argument 'handler' of Register.route()", "got int"),
    "route-arity": init(ROUTE.replace("self.handler", "lambda: 3"), "the handler of GET /a", "exactly one Request"),
    "route-segment": init(ROUTE.replace("/a", "/a b"), "segment 'a b' is neither plain URL characters nor one"),
    "route-half-parameter": init(ROUTE.replace("/a", "/x{id}"), "segment 'x{id}' is neither"),
    "route-parameter-twice": init(ROUTE.replace("/a", "/{a}/{a}"), "names a parameter twice"),
    "routes-without-end": init(
        "for n in range(2000): ctx.register.route('GET', f'/{n}', self.handler)", "more than 1000 routes"
    ),
    # pages and UI
    "page-twice": init(
        "for _ in '12': ctx.register.page(id='p', title='P', component='c')", "page id 'p' is registered twice"
    ),
    "page-slot": init(
        "ctx.register.page(id='p', title='P', component='c', slot='top')", "argument 'slot'", "before-settings"
    ),
    "page-title": init("ctx.register.page(id='p', component='c')", "missing", "'title'"),
    "ui-slot": init("ctx.register.ui(slot='', component='c')", "slot must not be empty"),
    "too-much": init(
        "for n in range(900): ctx.register.config({str(n): {'type': 'string', 'description': 'x' * 4000}})",
        "the plugin's metadata is 3",
        "; at most ",
    ),
    # importing it
    "syntax-error": load("x = 1\ndef f(:\n", "SyntaxError: ", "(plugin.py, line 2)"),
    "indentation": load("if 1:\nx = 1\n", "IndentationError: ", "(plugin.py, line 2)"),
    "syntax-error-in-helper": load("import helper", "SyntaxError", "(helper.py, line 1)", files={"helper.py": "x ="}),
    "import-error": load("import hay_there_is_none", "ModuleNotFoundError: No module named 'hay_there_is_none'"),
    "import-name": load("from hayhost.sdk import Nothing", "ImportError: cannot import name 'Nothing'"),
    "name-error": load("x = y", "NameError: name 'y' is not defined"),
    "exception-without-text": load("raise AssertionError", "AssertionError"),
    "interrupt": load("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "base-exception": load("class Odd(BaseException): ...\nraise Odd('very')", "Odd: very"),
    "recursion": load("def f(): f()\nf()", "RecursionError: "),
    "not-utf-8": Case(latin, ("SyntaxError: ", "utf-8")),
    "exit": load("import sys\nsys.exit(3)", "the plugin called sys.exit(3) while it was loading"),
    "exit-with-text": load("import sys\nsys.exit('bye')", "the plugin called sys.exit('bye') while it was loading"),
    "hard-exit": load("import os\nos._exit(0)", "its process exited with code 0 while it was loading"),
    "killed": load(
        "import os\nos.kill(os.getpid(), 9)", "its process was killed by signal 9 (Killed) while it was loading"
    ),
    "surrogate": load("raise ValueError('\\ud800')", "ValueError: \\ud800"),
    "error-without-text": load(
        "class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "E: its text cannot be had"
    ),
    "long-error": load("raise ValueError('x' * 1_000_000)", "ValueError: xxx"),
    "error-in-lines": load("raise ValueError('a\\n\\x1b[31mERROR b')", "ValueError: a\n"),
}
BAD = {**MANIFESTS, **PLUGINS}

REGISTERED = textwrap.dedent(
    """
    ctx.register.config({
        "f": {"type": "string", "label": "F", "env": "F_KEY", "sensitive": True, "required": True},
        "n": {"type": "number", "default": 1.5},
        "b": {"type": "boolean", "default": False},
        "j": {"type": "json", "default": {"a": [1]}},
    })
    ctx.register.config({"more": {"type": "string", "default": ""}})
    ctx.register.auth.api_key(id="k", label="The key", config_field="f")
    ctx.register.route("GET", "/items/{id}", self.handler)
    ctx.register.route("POST", "/items/{id}", self.handler)
    ctx.register.ui(slot="side", component="Side.vue")
    ctx.register.page(id="p", title="Page", component="Page.vue", slot="standalone", requires_setup=False)
    """
)
HOOKS = "\n".join(
    f"    async def {hook}(self, ctx): ..." for hook in ("on_start", "on_stop", "on_disable", "on_enable")
)
DECORATED = f"{IMPORT}@define_hay_plugin\n"
MAPPING = "return {'name': 'x', 'on_initialize': lambda ctx: ctx.register.route('GET', '/m', print), 'on_start': print}"


def both_forms(folder: Path) -> None:
    write_plugin(folder, GOOD, files={"package.json": '{"name": "other", "hay-plugin": {}}'})


def json_form(folder: Path) -> None:
    (write_plugin(folder, GOOD) / "pyproject.toml").unlink()
    table = {"entry": "./plugin.py", "displayName": "J", "category": "channel", "capabilities": []}
    (folder / "package.json").write_text(json.dumps({"name": "From-JSON", "version": "2", "hay-plugin": table}))


RIGHT = {
    "least": load(GOOD, '"hooks": []', '"sharing": "fork"'),
    "everything": init(REGISTERED, '"warnings": []', '"sensitive": true', '"requiresSetup": false', env=("F_KEY",)),
    "hooks": load(GOOD + HOOKS, '"hooks": ["on_disable", "on_enable", "on_start", "on_stop"]'),
    "attribute": entry(
        "./plugin.py:Other",
        {"plugin.py": f"{GOOD}@define_hay_plugin\nclass Other:\n{HOOKS}\n    name = 'o'"},
        "on_stop",
    ),
    "two-names-of-one": load(f"{GOOD}alias = Plugin", '"hooks": []'),
    "module": entry(
        "pkg.mod:Plugin",
        {"pkg/__init__.py": "", "pkg/mod.py": f"from .a import *\n{GOOD}", "pkg/a.py": ""},
        '"ok": true',
    ),
    "file-in-package": entry(
        "./pkg/mod.py", {"pkg/__init__.py": "", "pkg/mod.py": f"from . import a\n{GOOD}", "pkg/a.py": ""}, '"ok": true'
    ),
    "called-as-a-module-of-python": entry("./json.py", {"json.py": GOOD}, '"ok": true'),
    "factory": load(f"{DECORATED}def make(ctx):\n    class P: name = 'x'\n    return P()\n", '"hooks": []'),
    "factory-that-registers": load(
        f"{DECORATED}def make(ctx):\n    ctx.register.route('GET', '/f', print)\n    return {{'name': 'x'}}\n", '"/f"'
    ),
    "mapping": load(f"{DECORATED}def make(ctx):\n    {MAPPING}\n", '"hooks": ["on_initialize", "on_start"]', '"/m"'),
    "mapping-by-lambda": load(f"{IMPORT}plugin = define_hay_plugin(lambda ctx: {{'name': 'x'}})", '"ok": true'),
    "static-and-class-hooks": named(
        "@staticmethod\ndef on_start(ctx): ...\n@classmethod\ndef on_stop(cls, ctx, *more): ...", '"on_stop"'
    ),
    "async-initialize": named(
        "async def on_initialize(self, ctx): ctx.register.route('GET', '/late', print)", '"/late"'
    ),
    "reserved-route": init(ROUTE.replace("/a", "/health"), "route GET /health is never reached: the host answers"),
    "both-forms": Case(
        both_forms, ("package.json: hay-plugin: ignored, because pyproject.toml has [tool.hay-plugin]",)
    ),
    "json-form": Case(json_form, ('"name": "from-json"', '"version": "2"', '"category": "channel"')),
    "no-version": manifest('version = "1.2.3"', "", 'project.version: found nothing; \\"0.0.0\\" is used'),
    "chatty": load(f"import os\nprint('hello')\nos.write(1, b'raw')\n{GOOD}", '"ok": true'),
    "threads-at-import": load(
        f"import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n{GOOD}",
        '"sharing": "strict"',
        "sharing is strict, so starts are slower: its import left 1 thread(s) running",
    ),
}


RIGHT_ENVIRONMENT = init(
    """
    import os, subprocess
    for name in os.environ:
        ctx.register.route("GET", f"/{name}", self.handler)
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    ctx.register.route("GET", f"/{child.pid}", self.handler)
    """
)

# The plugins whose errors are compared with those of `hayhost run`, which starts a process for each.
SAMPLE = (
    "entry-symlink",
    "json-wrong-key",
    "no-export",
    "two-exports",
    "all-at-once",
    "undeclared-route",
    "default-number-nan",
    "route-twice",
    "page-slot",
    "syntax-error",
    "exit",
    "hard-exit",
    "error-in-lines",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the wrong plugins in one folder, and a right one."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, case in BAD.items():
        case.make(folder / name)
    write_plugin(folder / "good", GOOD)
    return folder


Command = Callable[[str], Done]


@pytest.fixture(scope="module")
def command(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """``command("check NAME")`` or ``command("run NAME")``: what that says of the plugin.

    They are run ahead, side by side, unless pytest itself is what runs side by side.
    """
    right = tmp_path_factory.mktemp("right")
    for name, case in RIGHT.items():
        case.make(right / name)
    run = ("--org-id", "acme", "--port", "0", "--mode", "test")
    lines: dict[str, tuple[object, ...]] = {
        **{f"check {name}": ("check", "--json", folder / name) for name in BAD},
        **{f"run {name}": ("run", "--plugin-path", folder / name, *run) for name in SAMPLE},
        **{f"check {name}": ("check", right / name, "--json") for name in RIGHT},
    }
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        ahead: dict[str, Future[Done]] = {}
        if "PYTEST_XDIST_WORKER" not in os.environ:
            ahead = {key: threads.submit(run_hayhost, *line) for key, line in lines.items()}
        yield lambda key: ahead[key].result() if ahead else run_hayhost(*lines[key])
        for result in ahead.values():
            result.cancel()


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[HostProcess]:
    """``serve`` on the folder with all the wrong plugins."""
    host = HostProcess(["serve", str(folder), "--mode", "test", "--port", "0", "--log-format", "json"])
    yield host.wait_ready()
    host.kill()


def errors_of(done: Done) -> list[str]:
    report = done.json()
    assert done.code == 1
    assert report["ok"] is False
    assert "metadata" not in report
    assert isinstance(report["errors"], list)
    return report["errors"]


def reported(host: HostProcess, name: str) -> list[str]:
    """What a host logged as errors of one plugin."""
    records = [record for record in host.records() if name in (record.get("folder"), record.get("plugin"))]
    return [record["reason"] for record in records if record["level"] == "error"]


@pytest.mark.parametrize("name", BAD)
def test_check_and_serve_say_what_is_wrong(command: Command, served: HostProcess, name: str) -> None:
    done = command(f"check {name}")
    errors = errors_of(done)
    assert any(all(part in error for part in BAD[name].expected) for error in errors), errors
    assert done.err == ""
    traceback = done.json().get("traceback", "")
    assert 'File "<' not in traceback
    assert not any(f'File "{ours}/' in traceback for ours in HOST_FILES), traceback
    assert reported(served, name) == errors


def test_the_others_are_served(served: HostProcess) -> None:
    assert served.get("/plugins/good/acme/metadata").status == 200
    assert served.health("good", "acme")["status"] == "healthy"
    refused = served.get("/plugins/no-export/acme/metadata")
    assert refused.status == 503
    assert "exports no result of define_hay_plugin" in refused.json()["error"]
    health = served.get("/plugins/no-export/acme/health")
    assert (health.status, health.json()["status"], health.json()["state"]) == (503, "unhealthy", "error")
    assert "exports no result of define_hay_plugin" in health.json()["lastError"]
    assert served.get("/plugins/category/acme/health").status == 404
    states = served.get("/readyz").json()["plugins"]
    assert states == {**dict.fromkeys(PLUGINS, "error"), "good": "ready"}


@pytest.mark.parametrize("name", SAMPLE)
def test_run_exits_with_the_same(command: Command, served: HostProcess, name: str) -> None:
    done = command(f"run {name}")
    assert done.code == 1
    own = [line for line in done.err.splitlines() if not line.startswith("{")]
    shown = [json.dumps(error)[1:-1].replace('\\"', '"') for error in reported(served, name)]
    prefix = "hayhost: " if name in MANIFESTS else f"hayhost: {name}: "
    assert own == [prefix + error.replace("\\u001b", "\\x1b") for error in shown]
    assert done.out == ""


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(command: Command, name: str) -> None:
    done = command(f"check {name}")
    report = done.json()
    assert done.code == 0
    assert report["ok"] is True
    assert report["errors"] == []
    said = json.dumps(report)
    assert [part for part in RIGHT[name].expected if part not in said] == []
    assert list(Path(report["folder"]).rglob("__pycache__")) == []


def test_metadata_as_it_is_served(tmp_path: Path) -> None:
    RIGHT["everything"].make(tmp_path / "p")
    assert run_hayhost("check", "--json", tmp_path / "p").json()["metadata"] == {
        "configSchema": {
            "f": {"type": "string", "label": "F", "env": "F_KEY", "sensitive": True, "required": True},
            "n": {"type": "number", "default": 1.5},
            "b": {"type": "boolean", "default": False},
            "j": {"type": "json", "default": {"a": [1]}},
            "more": {"type": "string", "default": ""},
        },
        "authMethods": [{"type": "apiKey", "id": "k", "label": "The key", "configField": "f"}],
        "uiExtensions": [{"slot": "side", "component": "Side.vue"}],
        "pages": [{"id": "p", "title": "Page", "component": "Page.vue", "slot": "standalone", "requiresSetup": False}],
        "routes": [{"method": "GET", "path": "/items/{id}"}, {"method": "POST", "path": "/items/{id}"}],
    }


def report_level(folder: Path) -> str:
    """The isolation that this machine gives, as a program reads it."""
    level: str = run_hayhost("check", "--json", folder / "p").json()["isolation"]
    assert level in ("limited", "confined", "namespaced", "hardened")
    return level


def test_for_people(tmp_path: Path) -> None:
    RIGHT["everything"].make(tmp_path / "p")
    done = run_hayhost("check", "p", cwd=tmp_path)
    assert done == Done(
        0,
        "p 1.2.3\n"
        "  displayName   p\n"
        "  category      tool\n"
        "  sharing       fork\n"
        f"  isolation     {report_level(tmp_path)}\n"
        "  capabilities  routes, config, auth, mcp, ui\n"
        "  hooks         on_initialize\n"
        "  route         GET    /items/{id}\n"
        "  route         POST   /items/{id}\n"
        "  config        f: string, required, sensitive, env F_KEY\n"
        "  config        n: number\n"
        "  config        b: boolean\n"
        "  config        j: json\n"
        "  config        more: string\n"
        "  auth          k (apiKey): The key\n"
        "  page          p: Page\n"
        "  ui            side: Side.vue\n"
        "ok\n",
        "",
    )


def test_for_people_with_an_error_and_its_lines(tmp_path: Path) -> None:
    source = "import helper\n\nhelper.fail()\n"
    write_plugin(tmp_path / "p", source, files={"helper.py": "def fail():\n    raise ValueError('\\x1b[2J no')\n"})
    (tmp_path / "p" / "package.json").write_text('{"hay-plugin": {}}')
    done = run_hayhost("check", tmp_path / "p")
    assert done.code == 1
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    assert "warning: p/package.json: hay-plugin: ignored, because pyproject.toml has [tool.hay-plugin]" in lines
    assert "error: ValueError: \\x1b[2J no" in lines
    assert f'    |   File "{tmp_path}/p/plugin.py", line 3, in <module>' in lines
    assert f'    |   File "{tmp_path}/p/helper.py", line 2, in fail' in lines
    assert lines[-1] == "    | ValueError: \\x1b[2J no"
    assert "ok" not in lines


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_on_a_terminal_only(tmp_path: Path, env: dict[str, str], coloured: bool) -> None:
    write_plugin(tmp_path / "p", GOOD)
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hayhost", "check", str(tmp_path / "p")], stdout=slave, env=environment(env)
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: nobody writes any more
        while data := os.read(master, 4096):
            shown += data
    os.close(master)
    assert process.wait(LIMIT) == 0
    assert b"ok" in shown
    assert (b"\x1b[32mok\x1b[0m" in shown) is coloured


def test_all_errors_of_a_manifest_at_once(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "pyproject.toml").write_text(
        '[project]\nname = "A_B"\nversion = 1\n[tool.hay-plugin]\nentry = "x"\ncategory = "y"\nenv = "z"\nother = 1\n'
        'capabilities = ["routes", "db"]\n[tool.hay-plugin.permissions]\nnetwork = "all"\ncpu_seconds = 0\n'
    )
    own = ("entry", "displayName", "category", "env", "other", "capabilities[1]")
    limits = ("permissions.network", "permissions.cpu_seconds")
    keys = ["project.name", "project.version", *(f"tool.hay-plugin.{key}" for key in (*own, *limits))]
    errors = errors_of(run_hayhost("check", "--json", tmp_path / "p"))
    assert sorted(error.split(": ")[1] for error in errors) == sorted(keys)
    assert all(error.startswith("p/pyproject.toml: ") and "; allowed: " in error for error in errors)
    plain = run_hayhost("check", tmp_path / "p")
    assert plain.code == 1
    assert [line for line in plain.out.splitlines() if line.startswith("error: ")] == [f"error: {e}" for e in errors]
    run = run_hayhost("run", "--plugin-path", tmp_path / "p", "--org-id", "acme", "--port", "0", "--mode", "test")
    assert (run.code, run.err.splitlines()) == (1, [f"hayhost: {error}" for error in errors])


def test_two_folders_with_one_name(serve: Serve, tmp_path: Path) -> None:
    route = f"{IMPORT}@define_hay_plugin\nclass P:\n    name = 'x'\n    def on_initialize(self, ctx):\n"
    for folder in ("b-second", "a-first", "c-third"):
        body = f"        ctx.register.route('GET', '/who', lambda req: '{folder}')\n"
        write_plugin(tmp_path / folder, route + body, name="Same" if folder == "c-third" else "same")
    host = serve()
    assert host.get("/plugins/same/acme/who").body == b"a-first"
    reasons = {record["folder"]: record["reason"] for record in host.records() if "folder" in record}
    assert reasons == {
        folder: f"{folder}: the name 'same' is taken by the folder 'a-first', which is served; "
        "give one of them another name"
        for folder in ("b-second", "c-third")
    }
    assert all(run_hayhost("check", tmp_path / folder).code == 0 for folder in ("a-first", "c-third"))


def test_warnings_of_both_forms_in_serve_and_run(
    serve: Serve, start: Callable[..., HostProcess], tmp_path: Path
) -> None:
    both_forms(tmp_path / "p")
    warning = "p/package.json: hay-plugin: ignored, because pyproject.toml has [tool.hay-plugin]"
    arguments = ["--org-id", "acme", "--port", "0", "--mode", "test", "--log-format", "json"]
    for host in (serve(), start("run", "--plugin-path", tmp_path / "p", *arguments).wait_ready()):
        assert [record["event"] for record in host.records() if record["level"] == "warning"] == [warning]


@pytest.mark.parametrize("name", ["gone", "file"])
def test_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    [error] = errors_of(run_hayhost("check", tmp_path / name, "--json"))
    assert error == f"{tmp_path / name}: found no folder; allowed: a plugin's folder with a manifest"


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    [error] = errors_of(run_hayhost("check", tmp_path, "--json"))
    assert error.endswith("allowed: [tool.hay-plugin] in pyproject.toml, or the key hay-plugin in package.json")


def test_no_argument() -> None:
    done = run_hayhost("check")
    assert (done.code, done.out) == (2, "")
    assert done.err == "hayhost check: Missing argument 'PLUGIN_DIR'; see `hayhost check --help`\n"


def test_it_is_loaded_without_the_environment_and_leaves_no_process(tmp_path: Path) -> None:
    RIGHT_ENVIRONMENT.make(tmp_path / "p")
    done = run_hayhost("check", "--json", tmp_path / "p", env={"TOP_SECRET": "s3cr3t", "HAYHOST_ISOLATION": "limited"})
    *names, pid = (route["path"][1:] for route in done.json()["metadata"]["routes"])
    assert sorted(names) == ["HOME", "LANG", "LOGNAME", "PATH", "TMPDIR", "USER"]
    wait_until(lambda: all_gone([int(pid)]), "the plugin's child is gone", limit=2)


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", GOOD, name="p")
    odd = os.fsencode(tmp_path) + b"/p\xff"
    os.rename(tmp_path / "p", odd)
    done = run_hayhost("check", "--json", os.fsdecode(odd))
    assert (done.code, done.json()["folder"]) == (0, f"{tmp_path}/p\\xff")
