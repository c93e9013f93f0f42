"""The OpenAPI document is true: schemathesis finds no answer that it does not describe, and no 5xx."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from .conftest import Answer, descriptors_of, wait_until, write_plugin
from .hosting import PREAMBLE
from .managing import API, Manager, managed, write_recorder

# A longer look: HAYHOST_TEST_SCHEMATHESIS=600 goes on for so many seconds.
SECONDS = int(os.environ.get("HAYHOST_TEST_SCHEMATHESIS", "0"))
EXAMPLES = 12

# Statuses beyond schemathesis's own that a request may get although it fits the document: what fits a plugin's schema
# only the plugin knows, whether an ETag is the present one depends on who was there before, and JSON schema cannot say
# that text deep in a config has no NUL and a number no more than 64 bits.
STREAMS = ("events", "streamLogs")

CONFIGURATION = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", "400", "401", "403", "404", "409", "412", "422", "429"]
"""

# It may revoke every token that it finds but the one that it uses.
HOOKS = """
import os
import schemathesis

@schemathesis.hook
def before_call(context, case, kwargs):
    if case.path_parameters.get("token") == os.environ["OWN_TOKEN"].split("_")[1]:
        case.path_parameters["token"] = "0" * 16
"""

PLAIN = PREAMBLE + "@define_hay_plugin\nclass Plain:\n    name = 'Plain'\n"


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    folder = tmp_path_factory.mktemp("schema")
    write_recorder(folder / "plugins")
    write_plugin(folder / "plugins" / "plain", PLAIN)
    with managed(folder, "--spares", 0) as manager:
        yield manager


def _document(manager: Manager) -> dict[str, Any]:
    document: dict[str, Any] = manager.get("/openapi.json")
    return document


def _schemathesis(manager: Manager, folder: Path, *options: str) -> None:
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    (folder / "hooks.py").write_text(textwrap.dedent(HOOKS))
    url = f"http://127.0.0.1:{manager.host.port}{API}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run", url]
    command += ["--checks", "all", "--continue-on-failure", "--request-timeout", "30", "--no-color", "--seed", "1"]
    for stream in STREAMS:  # which have no end; see below
        command += ["--exclude-operation-id", stream]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(folder), "OWN_TOKEN": "hay_none_none"}
    if manager.token is not None:
        command += ["-H", f"Authorization: Bearer {manager.token}"]
        environment["OWN_TOKEN"] = manager.token
    done = subprocess.run(
        [*command, *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120 + 2 * SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    assert "Traceback" not in manager.host.log
    assert '"level":"error"' not in "\n".join(
        line for line in manager.host.log.splitlines() if '"source":"plugin"' not in line
    )


def test_the_document_is_valid_openapi(manager: Manager) -> None:
    document = _document(manager)
    assert document["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(document).validate()


def test_every_operation_is_named_once_and_says_what_it_answers(manager: Manager) -> None:
    operations = [one for path in _document(manager)["paths"].values() for one in path.values()]
    names = [one["operationId"] for one in operations]
    assert len(names) == len(set(names)) > 20
    for one in operations:
        assert one["summary"]
        assert any(status[0] in "23" for status in one["responses"])


def test_links_lead_from_what_was_made_to_what_can_be_done_with_it(manager: Manager) -> None:
    paths = _document(manager)["paths"]
    links = paths[f"{API}/orgs"]["post"]["responses"]["201"]["links"]
    assert links["deleteOrg"] == {"operationId": "deleteOrg", "parameters": {"org": "$response.body#/id"}}
    links = paths[f"{API}/orgs/{{org}}/plugins/{{name}}"]["put"]["responses"]["201"]["links"]
    assert {"getInstallation", "patchInstallation", "disable", "restart", "validate"} <= set(links)
    links = paths[f"{API}/tokens"]["post"]["responses"]["201"]["links"]
    assert links["revokeToken"]["parameters"] == {"token": "$response.body#/token/id"}


@pytest.mark.timeout(300 + 3 * SECONDS)
def test_schemathesis_without_tokens(manager: Manager, tmp_path: Path) -> None:
    # Were it allowed to make a token, the rest would be one 401 after the other.
    _schemathesis(manager, tmp_path, "--phases", "coverage", "--exclude-operation-id", "createToken")


@pytest.mark.timeout(300 + 3 * SECONDS)
def test_schemathesis_with_an_admins_token(manager: Manager, tmp_path: Path) -> None:
    if manager.token is None:
        manager.token = manager.new_token("fuzzer")
    longer = ("--max-time", str(SECONDS)) if SECONDS else ()
    _schemathesis(manager, tmp_path, "--max-examples", str(EXAMPLES), *longer)


@pytest.mark.timeout(300)
def test_schemathesis_with_an_orgs_token(manager: Manager, tmp_path: Path) -> None:
    if manager.token is None:
        manager.token = manager.new_token("fuzzer")
    manager.put("acme")
    _schemathesis(Manager(manager.host, manager.new_token("acme's", "acme")), tmp_path, "--max-examples", "5")


def test_once_there_is_a_token_the_document_says_that_one_is_needed(manager: Manager) -> None:
    if manager.token is None:
        manager.token = manager.new_token("fuzzer")
    document = _document(manager)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            concrete = path.format(org="acme", name="recorder", token="0" * 16).removeprefix(API)
            if operation["operationId"] in STREAMS:
                continue
            answer = Manager(manager.host).call(method.upper(), concrete)
            assert (answer.status == 401) == (operation["security"] != []), (method, path, answer)
            assert {} not in operation["security"]
            if answer.status == 401:
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def _events(manager: Manager, query: str = "", path: str = "/events") -> Answer:
    """The head of a stream, and its first line."""
    connection = manager.host.connect()
    headers = {"Authorization": f"Bearer {manager.token}"} if manager.token else {}
    connection.request("GET", f"{API}{path}{query}", headers=headers)
    response = connection.getresponse()
    body = response.readline() if response.status == 200 else response.read()
    response.close()
    connection.close()
    return Answer(response.status, response.headers, body)


@pytest.mark.parametrize("path", ["/events", "/logs/stream"])
def test_streams_answer_as_described(manager: Manager, path: str) -> None:
    described = _document(manager)["paths"][f"{API}{path}"]["get"]["responses"]
    assert list(described["200"]["content"]) == ["text/event-stream"]
    answer = _events(manager, path=path)
    assert (answer.status, answer.headers["Content-Type"], answer.body) == (200, "text/event-stream", b": hello\n")
    stranger = Manager(manager.host, "hay_nonsense")
    wrong = [_events(manager, "?x=1", path), _events(manager, "?%ff", path), _events(stranger, path=path)]
    for answer in wrong:
        assert str(answer.status) in described
        assert json.loads(answer.body)["error"]


@pytest.mark.parametrize("path", ["/events", "/logs/stream"])
def test_nothing_of_a_stream_stays_when_its_client_leaves(manager: Manager, path: str) -> None:
    for _ in range(20):
        assert _events(manager, path=path).status == 200
    before = descriptors_of(manager.host.pid)
    for _ in range(20):
        assert _events(manager, path=path).status == 200
    wait_until(lambda: descriptors_of(manager.host.pid) <= before + 2, "connections are closed")
