"""The packages as wholes: what they export, and what they say of themselves."""

import importlib
import pkgutil
import re
import types
from pathlib import Path

import pytest

import hayhost
import sandbox

ROOT = Path(__file__).parent.parent
MODULES = [
    info.name
    for package in (hayhost, sandbox)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not info.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_and_exports(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    exported = getattr(module, "__all__", None)
    if name == "sandbox":
        return
    assert exported is not None, f"{name} has no __all__"
    for public in exported:
        value = getattr(module, public)
        if isinstance(value, type | types.FunctionType) and value.__module__ == name:
            assert value.__doc__, f"{name}.{public} has no docstring"


def test_the_version_is_in_the_changelog() -> None:
    assert f"## {hayhost.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_types_are_shipped() -> None:
    for package in (hayhost, sandbox):
        assert (Path(package.__path__[0]) / "py.typed").exists()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/internals.md"])
def test_files_that_the_docs_name_exist(page: str) -> None:
    for path in re.findall(r"`((?:hayhost|sandbox|plugins|scripts|docs|tests)/[\w./-]+)`", (ROOT / page).read_text()):
        assert (ROOT / path).exists(), f"{page} names {path}"


def test_the_guides_code_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/plugins.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "docs/plugins.md", "exec")


def test_the_readmes_plugin_runs(tmp_path: Path) -> None:
    from sandbox.testing import PluginHarness

    text = (ROOT / "README.md").read_text()
    toml, python = re.findall(r"```(?:toml|python)\n(.*?)```", text, re.DOTALL)[:2]
    (tmp_path / "pyproject.toml").write_text(toml)
    (tmp_path / "plugin.py").write_text(python)
    with PluginHarness(tmp_path) as plugin:
        assert plugin.request("GET", "/hello/Ada").json() == {"message": "Hello, Ada!"}
