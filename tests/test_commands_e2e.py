"""The other ``hayhost`` commands as a shell runs them: ``new``, ``dev``, ``serve``, ``completion``, and all help."""

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hayhost import __version__
from hayhost.cli import cli
from hayhost.cli.new import render
from hayhost.settings import FIELDS

from .commands import environment, run_hayhost
from .conftest import LIMIT, HostProcess, Serve, all_gone, routes, wait_until, write_plugin

Start = Callable[..., HostProcess]

REPOSITORY = Path(__file__).parents[1]
ECHO = routes("", size="async def: return {'size': len(req.body)}")


def assert_refused(arguments: list[object], code: int, *lines: str, env: dict[str, str] | None = None) -> None:
    """The command ends at once with ``code``, and says these lines on stderr and nothing else."""
    done = run_hayhost(*arguments, env=env)
    assert (done.code, done.out, done.err.splitlines()) == (code, "", list(lines))


def wait_console(host: HostProcess) -> str:
    """Wait until a host with a console log is ready; its URL."""
    host.wait_for_log("try http://")
    found = re.search(r"listening url=(http://\S+:(\d+))", host.log)
    assert found
    host.port = int(found[2])
    return found[1]


# ---- help


@pytest.mark.parametrize("command", ["", *cli.commands])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(command: str, option: str) -> None:
    done = run_hayhost(*command.split(), option)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"Usage: hayhost {command}".strip())


@pytest.mark.parametrize(
    ("command", "mentioned"),
    [
        ("", [*cli.commands, "hayhost new my-plugin", "--version"]),
        ("serve", ["PLUGINS_DIR", "HAYHOST_MAX_WORKERS", "--config", "--orgs orgs.toml", "127.0.0.1", "10MiB", "300"]),
        ("dev", ["PLUGINS_DIR", "test mode", "annotations", "--port"]),
        ("run", ["--plugin-path", "--org-id", "HAY_ORG_CONFIG", "HAY_ORG_AUTH", "Exit codes: 0", "2 the server"]),
        ("check", ["PLUGIN_DIR", "--json", "Exit code 1"]),
        ("new", ["NAME", "--directory", "test"]),
        ("completion", ["bash", "zsh", "fish", 'eval "$(hayhost completion bash)"']),
    ],
)
def test_help_mentions_what_matters(command: str, mentioned: list[str]) -> None:
    text = " ".join(run_hayhost(*command.split(), "--help", env={"COLUMNS": "200"}).out.split())
    assert [each for each in mentioned if each not in text] == []


def test_every_setting_is_a_flag_of_serve_with_its_default() -> None:
    text = " ".join(run_hayhost("serve", "--help").out.partition("Options:")[2].split())
    for name, field in FIELDS.items():
        flag = name.replace("_", "-")
        [entry] = re.findall(rf"--{flag}(?: / --no-{flag})? .*?(?= --| -h|$)", text)
        assert field.metadata["help"] in entry
        assert ("[default: " in entry) is (field.default not in (None, ()))


def test_no_command_is_a_question_for_help() -> None:
    done = run_hayhost()
    assert "Usage: hayhost [OPTIONS] COMMAND" in done.out + done.err
    assert "Error" not in done.err


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([*each, "--help"] for each in (["serve"], ["bench"], ["config", "set"])), ["completion", "fish"]],
)
def test_help_answers_at_once(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "hayhost", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"click", "hayhost.cli", "hayhost.settings"} <= imported
    heavy = {"tornado", "msgspec", "multiprocess", "dill", "structlog", "asyncio", "typeguard", "watchdog", "multipart"}
    heavy |= {"sqlalchemy", "alembic", "cryptography", "dns", "matplotlib", "ssl", "socket", "http", "email", "json"}
    heavy |= {"prometheus_client", "opentelemetry", "hayhost.metrics"}
    heavy |= {"sandbox", "hayhost.sdk", "hayhost.host", "hayhost.front", "hayhost.logs", "hayhost.bench"}
    assert imported & heavy == set()


@pytest.mark.parametrize("command", [[sys.executable, "-m", "hayhost"], [Path(sys.executable).with_name("hayhost")]])
def test_version(command: list[str]) -> None:
    assert subprocess.check_output([*command, "--version"], text=True) == f"hayhost, version {__version__}\n"


def test_unknown_commands_and_options() -> None:
    assert_refused(["srve"], 2, "hayhost: No such command 'srve'. Did you mean 'serve'?; see `hayhost --help`")
    assert_refused(["--quiet"], 2, "hayhost: No such option '--quiet'; see `hayhost --help`")
    assert_refused(["serve"], 2, "hayhost serve: Missing argument 'PLUGINS_DIR'; see `hayhost serve --help`")
    done = run_hayhost("serve", ".", "--prot", "1")
    assert done.code == 2
    assert re.fullmatch(r"hayhost serve: No such option '--prot'.*--port.*; see `hayhost serve --help`\n", done.err)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["completion", "bash"], ["check", "--json", REPOSITORY / "plugins/echo"]]
)
def test_output_that_nobody_reads(arguments: list[object]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "hayhost", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), stdout=writer, stderr=subprocess.PIPE, timeout=LIMIT)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode != 0


# ---- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    done = run_hayhost("completion", shell)
    assert (done.code, done.err) == (0, "")
    assert f"_HAYHOST_COMPLETE={shell}_complete" in done.out


def test_the_script_for_bash_is_taken_by_bash() -> None:
    script = f'eval "$({sys.executable} -m hayhost completion bash)" && complete -p hayhost'
    done = subprocess.run(["bash", "-c", script], env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "hayhost_completion hayhost" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("hayhost ", set(cli.commands)),
        ("hayhost ser", {"serve"}),
        ("hayhost serve --log-f", {"--log-format", "--log-file", "--log-file-size", "--log-files"}),
        ("hayhost run --mode ", {"production", "test"}),
        ("hayhost completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_completions(words: str, expected: set[str]) -> None:
    position = str(len(words.split()) - (not words.endswith(" ")))
    done = run_hayhost(env={"_HAYHOST_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": position})
    assert {line.partition(",")[2] for line in done.out.splitlines()} == expected


def test_an_unknown_shell() -> None:
    done = run_hayhost("completion", "tcsh")
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"hayhost completion: .*'tcsh' is not one of 'bash', 'zsh', 'fish'; see .*\n", done.err)


# ---- new


def test_a_new_plugin_is_right_and_its_test_passes(tmp_path: Path) -> None:
    done = run_hayhost("new", "my-plugin", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == "made my-plugin"
    folder = tmp_path / "my-plugin"
    assert {file.name: file.read_text() for file in folder.iterdir()} == render("my-plugin")
    report = run_hayhost("check", "--json", folder).json()
    assert (report["ok"], report["name"], report["displayName"]) == (True, "my-plugin", "My Plugin")
    assert (report["errors"], report["warnings"]) == ([], [])
    assert report["metadata"]["routes"] == [
        {"method": "POST", "path": "/echo"},
        {"method": "GET", "path": "/hello/{name}"},
    ]
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "my-plugin"]
    tested = subprocess.run(pytest_run, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert tested.returncode == 0, tested.stdout
    assert "3 passed" in tested.stdout


def test_what_new_says_to_do_next_works(tmp_path: Path, start: Start) -> None:
    said = run_hayhost("new", "x", "--directory", tmp_path).out
    assert f"hayhost check {tmp_path}/x " in said
    assert f"pytest {tmp_path}/x " in said
    [path] = re.findall(rf"hayhost dev {tmp_path} +serve it: http://127\.0\.0\.1:8000(\S+)", said)
    host = start("dev", tmp_path, "--port", "0")
    wait_console(host)
    assert host.get(path).json() == {"message": "Hello, you!"}


def test_the_echo_plugin_is_what_new_makes() -> None:
    echo = REPOSITORY / "plugins" / "echo"
    files = {file.name: file.read_text() for file in echo.iterdir() if file.is_file()}
    assert files == render("echo")


@pytest.mark.parametrize(
    "name", ["A", "my_plugin", "my.plugin", "a b", "", "ä", "@hay/x", "../x", "a/b", "x" * 65, "a\n"]
)
def test_bad_names(tmp_path: Path, name: str) -> None:
    said = f"hayhost: {name!r} is not a plugin name: a-z, 0-9 and - only, at most 64, not beginning with -"
    assert_refused(["new", "--directory", tmp_path, "--", name], 1, said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_exists_is_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    said = f"hayhost: {tmp_path}/x exists already; choose another name"
    assert_refused(["new", "x", "--directory", tmp_path], 1, said)
    assert [each.name for each in tmp_path.rglob("*")] == ["x"]


def test_new_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = run_hayhost("new", "x", "--directory", tmp_path / "gone")
    assert done.code == 2
    assert f"Directory '{tmp_path}/gone' does not exist" in done.err


_SPECIAL = ["none", "true", "any", "request", "hay-global-context", "2fa", "0", "a--b", "a-", "class", "x" * 64]


@settings(deadline=None)
@given(name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,63}", fullmatch=True) | st.sampled_from(_SPECIAL))
def test_whatever_its_name_a_new_plugin_is_python(name: str) -> None:
    files = render(name)
    table = tomllib.loads(files["pyproject.toml"])
    assert table["project"]["name"] == name
    assert table["tool"]["hay-plugin"]["displayName"].strip()
    for file in ("plugin.py", "test_plugin.py"):
        compile(files[file], file, "exec")
    tree = ast.parse(files["plugin.py"])
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    [plugin] = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert plugin.name.isidentifier()
    assert plugin.name not in imported
    assert "__" not in "".join(files.values()).replace("__file__", "")


# ---- settings


def test_flag_over_environment_over_file(start: Start, tmp_path: Path) -> None:
    write_plugin(tmp_path / "plugins/p", ECHO)
    write_plugin(tmp_path / "plugins/slow", "import time\nwhile True: time.sleep(0.01)")
    file = tmp_path / "hayhost.toml"
    file.write_text('mode = "production"\nmax_body = 5\nhook_timeout = 0.7\nlog_format = "json"\nport = 1\n')
    env = {"HAYHOST_CONFIG": str(file), "HAYHOST_MAX_BODY": "10", "HAYHOST_MODE": "production", "HAYHOST_PORT": "2"}
    host = start("serve", tmp_path / "plugins", "--mode=test", "--port=0", env=env).wait_ready()
    assert host.post("/plugins/p/acme/size", b"x" * 10).json() == {"size": 10}
    assert host.post("/plugins/p/acme/size", b"x" * 11).status == 413
    assert "importing the plugin did not finish within 0.7 s" in host.log


@pytest.mark.parametrize("command", ["serve", "dev", "run"])
def test_wrong_settings_are_all_named_with_their_source(command: str, tmp_path: Path) -> None:
    file = tmp_path / "hayhost.toml"
    file.write_text("max_boddy = 1\nmax_queue = 0\n")
    folder = ["--plugin-path", tmp_path, "--org-id=a", "--port=0"] if command == "run" else [tmp_path]
    done = run_hayhost(
        *(command, *folder, "--config", file, "--hook-timeout=soon", "--max-body", "big"),
        env={"HAYHOST_HOST": "", "HAYHOST_LOG_LEVEL": "loud"},
    )
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines() == [
        f"hayhost: {file}: max_boddy: no such setting; there are {', '.join(FIELDS)}",
        f"hayhost: {file}: max_queue: 0 is not from 1 to 1e+09",
        "hayhost: environment: HAYHOST_HOST: '' is not a non-empty string",
        "hayhost: environment: HAYHOST_LOG_LEVEL: 'loud' is not one of debug, info, warning, error",
        "hayhost: --hook-timeout: 'soon' is not a number",
        "hayhost: --max-body: 'big' is not a size such as 10MiB",
    ]


def test_a_settings_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "hayhost.toml").write_text("port = ")
    done = run_hayhost("serve", tmp_path, "--config", tmp_path / "hayhost.toml")
    assert done.code == 1
    assert done.err.startswith(f"hayhost: {tmp_path}/hayhost.toml: not valid TOML: ")
    assert done.err.count("\n") == 1


# ---- serve


def test_test_mode_has_no_use_for_orgs(tmp_path: Path) -> None:
    (tmp_path / "orgs.toml").touch()
    said = "hayhost: --orgs is for production mode: in test mode every org is known"
    assert_refused(["serve", "--mode=test", tmp_path, "--orgs", tmp_path / "orgs.toml"], 1, said)


def test_every_problem_of_the_orgs_at_once(tmp_path: Path) -> None:
    file = tmp_path / "orgs.toml"
    file.write_text('orgz = 1\n[orgs."a/b"]\n[orgs.acme]\nnmae = "x"\n[orgs.beta.plugins.p]\nauth = {}\n')
    done = run_hayhost("serve", tmp_path, "--orgs", file)
    assert done.code == 1
    begins = ["orgz: no such key", "orgs.a/b: not an org id", "orgs.acme: ", "orgs.beta: "]
    lines = done.err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"hayhost: {file}: {begin}") for line, begin in zip(lines, begins, strict=True))


def test_orgs_of_a_file(start: Start, tmp_path: Path) -> None:
    show = "def:\n auth = req.ctx.auth.get()\n"
    show += " return {'n': req.ctx.config.get('n'), 'auth': auth.credentials['k'], 'org': req.ctx.org.name}"
    source = routes("", show=show)
    register = "ctx.register.config({'n': {'type': 'number'}, 'k': {'type': 'string', 'sensitive': True}})\n        "
    register += "ctx.register.auth.api_key(id='k', label='Key', config_field='k')\n        "
    source = source.replace("ctx.register.route", register + "ctx.register.route", 1)
    write_plugin(tmp_path / "plugins/p", source)
    file = tmp_path / "orgs.toml"
    file.write_text(
        '[orgs.acme]\nname = "Acme Ltd"\n[orgs.acme.plugins.p]\nconfig = { n = 3 }\n'
        'auth = { methodId = "k", credentials = { k = "sk_5ecret" } }\n'
        "[orgs.off.plugins.p]\nenabled = false\n[orgs.acme.plugins.gone]\n"
    )
    file.chmod(0o644)
    host = start("serve", tmp_path / "plugins", "--orgs", file, "--port=0", "--log-format=json").wait_ready()
    assert host.get("/plugins/p/acme/show").json() == {"n": 3, "auth": "sk_5ecret", "org": "Acme Ltd"}
    for org in ("off", "other", "ACME"):
        assert host.get(f"/plugins/p/{org}/show").status == 404
        assert host.get(f"/plugins/p/{org}/health").status == 404
    warnings = {record["event"]: record for record in host.records() if record["level"] == "warning"}
    assert f"{file} may hold credentials and is readable by others; use `chmod 600 {file}`" in warnings
    problems = [record["reason"] for record in host.records() if record["event"] == "orgs: not as declared"]
    assert problems == ["acme/gone: there is no plugin of this name"]
    assert "sk_5ecret" not in host.log
    assert b"sk_5ecret" not in b"".join(part.read_bytes() for part in Path(host.folder.name).iterdir())


@pytest.mark.parametrize(
    ("command", "address"),
    [
        ("dev", "0.0.0.0"),
        *(
            ("serve", each)
            for each in ("0.0.0.0", "::", "192.0.2.1", "example.com", "127.0.0.1.example.com", "2130706433")
        ),
    ],
)
def test_only_loopback_addresses(tmp_path: Path, command: str, address: str) -> None:
    mode = ["--mode=test"] if command == "serve" else []
    done = run_hayhost(command, tmp_path, *mode, "--port=0", "--host", address)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"hayhost: {address} is not a loopback address")
    if command == "serve":  # and without a token it makes no difference that there is a store
        kept = run_hayhost(command, tmp_path, "--port=0", "--host", address)
        assert (kept.code, kept.err) == (1, done.err)
    assert done.err.count("\n") == 1


def test_run_listens_on_loopback_only(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "p", ECHO)
    arguments = ["run", "--plugin-path", folder, "--org-id=a", "--port=0", "--mode=test"]
    done = run_hayhost(*arguments, env={"HAYHOST_HOST": "0.0.0.0"})
    assert done.code == 1
    assert "0.0.0.0 is not a loopback address" in done.err


def test_the_other_loopback_address(start: Start, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    host = start("serve", tmp_path, "--mode=test", "--port=0", "--host=::1", "--log-format=json").wait_ready()
    [listening] = [record for record in host.records() if record["event"] == "listening"]
    assert listening["url"] == f"http://[::1]:{host.port}"
    with socket.create_connection(("::1", host.port)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\nHost: [::1]\r\n\r\n")
        assert connection.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"


def test_no_plugins(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    host = serve()
    [warning] = [record for record in host.records() if record["level"] == "warning"]
    assert warning["event"] == "no plugin to serve; `hayhost new NAME` makes one"
    assert warning["folder"] == str(tmp_path)
    assert host.get("/readyz").json() == {"status": "ready", "plugins": {}}
    assert host.get("/plugins/any/acme/health").status == 404
    assert host.stop() == 0


@pytest.mark.parametrize("command", [["serve", "--mode=test"], ["dev"]])
def test_a_signal_while_plugins_are_loading(start: Start, tmp_path: Path, command: list[str]) -> None:
    write_plugin(tmp_path / "slow", "print('begun', flush=True)\nimport time\nwhile True: time.sleep(0.01)\n")
    host = start(*command, tmp_path, "--port=0")
    host.wait_for_log("begun")
    pids = host.pids()
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(10) == 0  # and not after the 30 s that an import may take
    wait_until(lambda: all_gone(pids), "all processes are gone", limit=2)
    assert "Traceback" not in host.log


@pytest.mark.parametrize("command", ["serve", "dev"])
def test_no_folder(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").touch()
    see = f"; see `hayhost {command} --help`"
    for name, why in (("gone", "does not exist"), ("file", "is a file")):
        place = f"Invalid value for 'PLUGINS_DIR': Directory '{tmp_path}/{name}' {why}"
        assert_refused([command, tmp_path / name], 2, f"hayhost {command}: {place}{see}")


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for command in (["serve", "--mode=test"], ["dev"]):
            done = run_hayhost(*command, tmp_path, "--port", port, "--log-level=error")
            said = f"hayhost: cannot listen on 127.0.0.1:{port}: Address already in use\n"
            assert (done.code, done.out, done.err) == (2, "", said)


# ---- dev

TYPED = """
from hayhost.sdk import *
import helper
from package import inner
import package.deep.module

def own(number: int) -> int:
    return number

@define_hay_plugin
class Plugin:
    name = "typed"

    def on_initialize(self, ctx):
        for name in ("own", "helper", "inner", "deep", "fine"):
            ctx.register.route("GET", "/" + name, getattr(self, name))

    def own(self, req):
        return str(own("x"))

    async def helper(self, req):
        return str(helper.function("x"))

    def inner(self, req):
        return str(inner.function("x"))

    def deep(self, req):
        return str(package.deep.module.function("x"))

    def fine(self, req):
        print("fine indeed")
        return str(own(3))
"""
FUNCTION = "def function(number: int) -> int:\n    return number\n"
MODULES = {
    **dict.fromkeys(("helper.py", "package/inner.py", "package/deep/module.py"), FUNCTION),
    **dict.fromkeys(("package/__init__.py", "package/deep/__init__.py"), ""),
}


def test_dev_checks_annotations_and_shows_requests(start: Start, tmp_path: Path) -> None:
    write_plugin(tmp_path / "typed", TYPED, files=MODULES)
    alone = TYPED.replace("import helper\nfrom package import inner\nimport package.deep.module\n", "")
    folder = write_plugin(tmp_path / "named", files={"json.py": alone})  # a module of Python is called so too
    (folder / "pyproject.toml").write_text((folder / "pyproject.toml").read_text().replace("plugin.py", "json.py"))
    host = start("dev", tmp_path, "--port=0")
    url = wait_console(host)
    assert f"try {url}/plugins/typed/my-org/metadata" in host.log
    places = {
        "own": f'File "{tmp_path}/typed/plugin.py", line 7, in own',
        "helper": f'File "{tmp_path}/typed/helper.py", line 1, in function',
        "inner": f'File "{tmp_path}/typed/package/inner.py", line 1, in function',
        "deep": f'File "{tmp_path}/typed/package/deep/module.py", line 1, in function',
    }
    for name, place in places.items():
        assert host.get(f"/plugins/typed/my-org/{name}").status == 500
        text = host.wait_for_log(f"GET /{name} status=500")
        assert (
            f'typed/my-org GET /{name} failed: TypeCheckError: argument "number" (str) is not an instance of int'
            in text
        )
        assert f"    |   {place}" in text.splitlines()
    assert host.get("/plugins/named/my-org/own").status == 500
    assert host.get("/plugins/typed/my-org/fine").body == b"3"
    text = host.wait_for_log("GET /fine status=200")
    assert re.search(r"^\d\d:\d\d:\d\d info    typed/my-org GET /fine status=200 ms=[\d.]+ request=\S+$", text, re.M)
    assert re.search(r"^\d\d:\d\d:\d\d info    typed/my-org fine indeed ", text, re.M)
    host.get("/nowhere")
    host.wait_for_log("GET /nowhere status=404")
    assert "\x1b" not in host.log
    assert not [line for line in host.log.splitlines() if line.startswith("{")]
    assert host.stop() == 0


def test_serve_does_neither(serve: Serve, tmp_path: Path) -> None:
    write_plugin(tmp_path / "typed", TYPED, files=MODULES)
    host = serve()
    for name in ("own", "helper", "inner", "deep"):
        assert host.get(f"/plugins/typed/acme/{name}").body == b"x"
    assert "status=" not in host.log
    assert '"status"' not in host.log


def test_dev_is_test_mode_and_takes_the_other_settings(start: Start, tmp_path: Path) -> None:
    write_plugin(tmp_path / "p", ECHO)
    done = run_hayhost("dev", tmp_path, "--mode=production")
    assert (done.code, "No such option '--mode'" in done.err) == (2, True)
    env = {"HAYHOST_MODE": "production", "HAYHOST_LOG_FORMAT": "json", "HAYHOST_MAX_BODY": "3"}
    host = start("dev", tmp_path, "--port=0", env=env).wait_ready()
    assert host.post("/plugins/p/any-org/size", b"123").json() == {"size": 3}
    assert host.post("/plugins/p/any-org/size", b"1234").status == 413
    [listening] = [record for record in host.records() if record["event"] == "listening"]
    assert listening["mode"] == "test"
    shown: list[Any] = wait_until(lambda: [r for r in host.records() if r.get("status") == 413], "the access line")
    assert (shown[0]["event"], shown[0]["level"]) == ("POST /plugins/p/any-org/size", "info")


# ---- started by hand


@pytest.mark.parametrize("arguments", [[], ["x"], ["0"], ["99999"], ["-1"], ["1", "2"], ["9" * 30]])
def test_the_nursery_by_hand(arguments: list[str]) -> None:
    command = [sys.executable, "-I", "-m", "sandbox.nursery", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("This is the nursery of hayhost, the process that plugin workers are forked from.")
    assert "hayhost serve PLUGINS_DIR" in done.stderr


def test_json_of_check_is_the_only_thing_on_stdout() -> None:
    done = run_hayhost("check", "--json", REPOSITORY / "plugins" / "echo")
    assert json.loads(done.out)["ok"] is True
    assert done.err == ""
