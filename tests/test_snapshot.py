"""Imports from a snapshot, in a process of their own."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sandbox.snapshot import Snapshot


def _run(folder: Path, script: str) -> Any:
    """What ``script`` leaves in ``result`` after a snapshot of ``folder`` is installed as the sandbox does it."""
    program = f"""
import json, os, sys, pathlib, importlib
sys.dont_write_bytecode = True
sys.path.insert(0, {str(folder)!r})
folder = pathlib.Path({str(folder)!r})
from sandbox.snapshot import Snapshot
snapshot = Snapshot({str(folder)!r})
snapshot.install()
{textwrap.dedent(script)}
print(json.dumps(result))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _write(folder: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


CHANGES = {
    "changed": "(folder / 'helper.py').write_text('value = 2')",
    "removed": "(folder / 'helper.py').unlink()",
    "replaced by a package": "(folder / 'helper').mkdir(); (folder / 'helper/__init__.py').write_text('value = 2')",
    "the folder moved": "folder.rename(folder.with_name('elsewhere'))",
    "stale bytecode": """
import py_compile
(folder / 'helper.py').write_text('value = 2')
py_compile.compile(str(folder / 'helper.py'))
(folder / 'helper.py').write_text('value = 1')
""",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_late_import_gets_what_the_file_was(tmp_path: Path, change: str) -> None:
    folder = _write(tmp_path / "p", {"helper.py": "value = 1"})
    assert _run(folder, f"{CHANGES[change]}\nimport helper\nresult = helper.value") == 1


def test_packages_nested_namespace_and_vendored_ones(tmp_path: Path) -> None:
    folder = _write(
        tmp_path / "p",
        {
            "pkg/__init__.py": "from .a import a",
            "pkg/a.py": "a = 1",
            "space/deep/b.py": "b = 1",
            "vendor/dep.py": "c = 1",
        },
    )
    script = """
    import shutil
    sys.path.append(str(folder / 'vendor'))
    shutil.rmtree(folder)
    import pkg, space.deep.b, dep
    result = [pkg.a, space.deep.b.b, dep.c]
    """
    assert _run(folder, script) == [1, 1, 1]


def test_a_module_that_was_added_since_is_refused_with_a_clear_error(tmp_path: Path) -> None:
    folder = _write(tmp_path / "p", {"pkg/__init__.py": ""})
    script = """
    (folder / 'late.py').write_text('')
    (folder / 'pkg/late.py').write_text('')
    (folder / 'whole').mkdir()
    (folder / 'whole/__init__.py').write_text('')
    result = []
    for name in ('late', 'pkg.late', 'whole', 'never'):
        try:
            importlib.import_module(name)
        except ImportError as error:
            result.append(str(error))
    """
    late, nested, whole, never = _run(folder, script)
    for file, error in (("late.py", late), ("pkg/late.py", nested), ("whole/__init__.py", whole)):
        assert error.startswith(f"{folder}/{file} was added after")
        assert "next reload" in error
    assert never == "No module named 'never'"


def test_a_file_that_was_added_since_shadows_no_module_of_elsewhere(tmp_path: Path) -> None:
    folder = _write(tmp_path / "p", {"plugin.py": ""})
    script = """
    (folder / 'colorsys.py').write_text('raise SystemExit(3)')
    import colorsys
    result = colorsys.__file__
    """
    assert not _run(folder, script).startswith(str(folder))


def test_two_saves_of_the_same_size_within_a_second_are_never_mistaken(tmp_path: Path) -> None:
    folder = _write(tmp_path / "p", {"helper.py": "value = 0"})
    for number in range(1, 4):  # fast enough that a .pyc of the one before would still count as valid
        (folder / "helper.py").write_text(f"value = {number}")
        os.utime(folder / "helper.py", (1_700_000_000, 1_700_000_000))
        script = "import helper, py_compile; result = helper.value\npy_compile.compile(str(folder / 'helper.py'))"
        assert _run(folder, script) == number
    assert list(folder.glob("__pycache__/*.pyc")), "the bytecode that must not be believed is there"


def test_links_out_of_the_folder_and_to_one_folder_twice(tmp_path: Path) -> None:
    shared = _write(tmp_path / "shared", {"__init__.py": "", "x.py": "value = 1"})
    folder = _write(tmp_path / "p", {"zeta/__init__.py": "", "zeta/y.py": "value = 1"})
    (folder / "common").symlink_to(shared)
    (folder / "alias").symlink_to(folder / "zeta")
    (folder / "zeta/up").symlink_to(folder)
    script = f"""
    pathlib.Path({str(shared)!r}, 'x.py').write_text('value = 2')
    (folder / 'zeta/y.py').write_text('value = 2')
    import common.x, alias.y, zeta.y
    result = [common.x.value, alias.y.value, zeta.y.value]
    """
    assert _run(folder, script) == [1, 1, 1]


def test_a_folder_that_is_itself_a_link(tmp_path: Path) -> None:
    _write(tmp_path / "real", {"helper.py": "value = 1"})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    script = "(folder / 'helper.py').write_text('value = 2')\nimport helper; result = helper.value"
    assert _run(tmp_path / "link", script) == 1


def test_archives_on_the_path_still_work(tmp_path: Path) -> None:
    folder = _write(tmp_path / "p", {"plugin.py": ""})
    script = """
    import zipfile
    with zipfile.ZipFile(folder / 'lib.zip', 'w') as archive:
        archive.writestr('zipped.py', 'value = 1')
    sys.path.append(str(folder / 'lib.zip'))
    import zipped
    result = zipped.value
    """
    assert _run(folder, script) == 1


def test_extension_modules_are_those_of_the_snapshot_or_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "p", {"plugin.py": ""})
    script = """
    import _csv, shutil, importlib.machinery
    from importlib.machinery import EXTENSION_SUFFIXES
    name = 'ext' + EXTENSION_SUFFIXES[-1]
    (folder / name).write_bytes(b'one')
    snapshot.__init__(str(folder))
    found = importlib.machinery.PathFinder.find_spec('ext', [str(folder)])
    result = [found is not None and found.origin == str(folder / name)]
    (folder / name).write_bytes(b'other')
    try:
        importlib.machinery.PathFinder.find_spec('ext', [str(folder)])
    except ImportError as error:
        result.append(str(error))
    """
    found, error = _run(folder, script)
    assert found
    assert "has changed since" in error
    assert "next reload" in error


def test_source_that_is_too_large_to_keep_is_imported_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.snapshot._MAX_BYTES", 10)
    _write(tmp_path, {"a.py": "a = 1", "b.py": "b = 22222222222"})
    snapshot = Snapshot(str(tmp_path))
    assert (set(snapshot.sources), snapshot.complete) == ({str(tmp_path / "a.py")}, False)


def test_what_is_no_source_is_not_kept(tmp_path: Path) -> None:
    _write(tmp_path, {"a.py": "1", ".venv/b.py": "1", "node_modules/c.py": "1", "__pycache__/d.py": "1", "e.txt": "1"})
    os.mkfifo(tmp_path / "pipe.py")
    assert set(Snapshot(str(tmp_path)).sources) == {str(tmp_path / "a.py")}


def test_source_and_tracebacks_are_those_of_the_snapshot(tmp_path: Path) -> None:
    folder = _write(tmp_path / "p", {"helper.py": "def fail():\n    raise ValueError('old line')\n"})
    script = """
    import helper, inspect
    (folder / 'helper.py').write_text('# another file by now')
    result = [inspect.getsource(helper.fail), helper.__file__]
    """
    source, file = _run(folder, script)
    assert "old line" in source
    assert file == str(folder / "helper.py")


def test_a_module_where_no_code_is_read_from(tmp_path: Path) -> None:
    folder = _write(tmp_path, {".venv/lib/helper.py": "X = 1"})
    script = """
    sys.path.insert(0, str(folder / ".venv/lib"))
    try:
        import helper
    except ImportError as error:
        result = str(error)
    """
    assert "begin with a dot" in _run(folder, script)
