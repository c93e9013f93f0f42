"""What counts as a plugin's content."""

import os
from pathlib import Path

import pytest

from hayhost.digest import Digests, content_files, is_dropping, signature


def _write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def _digest(folder: Path) -> str:
    return Digests().of(folder).digest


def test_equal_content_has_an_equal_digest_wherever_and_whenever_it_is(tmp_path: Path) -> None:
    one, two = (_write(tmp_path / name, b_py="b", a_py="a", pkg__c_html="c") for name in ("one", "two"))
    os.utime(two / "a.py", (1, 1))
    os.chmod(two / "b.py", 0o600)
    assert _digest(one) == _digest(two) != ""


@pytest.mark.parametrize("change", ["content", "same size", "new", "gone", "renamed", "nested", "hidden", "empty"])
def test_every_change_of_content_changes_the_digest(tmp_path: Path, change: str) -> None:
    _write(tmp_path, plugin_py="value = 1", pkg__deep__data_txt="data", pyproject_toml="")
    before = _digest(tmp_path)
    match change:
        case "content":
            (tmp_path / "plugin.py").write_text("value = 12")
        case "same size":
            (tmp_path / "plugin.py").write_text("value = 2")
        case "new":
            (tmp_path / "other.py").write_text("")
        case "gone":
            (tmp_path / "plugin.py").unlink()
        case "renamed":
            (tmp_path / "plugin.py").rename(tmp_path / "plug.py")
        case "nested":
            (tmp_path / "pkg/deep/data.txt").write_text("Data")
        case "hidden":
            (tmp_path / ".env").write_text("A=1")
        case "empty":
            (tmp_path / "pyproject.toml").write_text("\n")
    assert _digest(tmp_path) != before


@pytest.mark.parametrize(
    "path",
    [
        "plugin.pyc", "__pycache__/plugin.cpython-311.pyc", "pkg/__pycache__/x.pyc", "plugin.py~", ".plugin.py.swp",
        ".#plugin.py", "#plugin.py#", "4913", "plugin.py.tmp", ".goutputstream-X1", "plugin.py___jb_tmp___",
        ".git/index", ".hg/store", ".venv/lib/x.py", "node_modules/x/index.js", ".DS_Store", ".mypy_cache/x",
        ".~lock.data.ods#",
    ],
)  # fmt: skip
def test_droppings_do_not_count(tmp_path: Path, path: str) -> None:
    _write(tmp_path, plugin_py="value = 1")
    before = _digest(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("x")
    assert _digest(tmp_path) == before


@pytest.mark.parametrize("name", ["plugin.py", "template.html", "data.json", ".env", "tmp", "swap.txt", "a~b.py", "#1"])
def test_what_looks_like_a_dropping_and_is_none(name: str) -> None:
    assert not is_dropping(name)


def test_content_that_was_swapped_under_the_old_times_and_size_is_seen(tmp_path: Path) -> None:
    file = _write(tmp_path, plugin_py="value = 1") / "plugin.py"
    os.utime(file, (1, 1))
    digests = Digests()
    before = digests.of(tmp_path)
    with file.open("r+") as opened:  # in place: the inode stays
        opened.write("value = 2")
    os.utime(file, (1, 1))
    assert digests.of(tmp_path).digest != before.digest


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, plugin_py="value = 1")
    digests = Digests()
    before = digests.of(tmp_path)
    stamp = (tmp_path / "plugin.py").stat().st_mtime_ns
    monkeypatch.setattr("hayhost.digest.time.time_ns", lambda: stamp + int(1e9))
    read: list[str] = []
    real = os.open

    def note(path: str, flags: int) -> int:
        read.append(path)
        return real(path, flags)

    monkeypatch.setattr("hayhost.digest.os.open", note)
    assert digests.of(tmp_path) == before
    assert len(read) == 1, "so young a file may have changed again within one tick of its time stamp"
    monkeypatch.setattr("hayhost.digest.time.time_ns", lambda: stamp + int(10e9))
    assert digests.of(tmp_path) == before
    assert len(read) == 1


def test_the_same_written_again_is_another_content_with_the_same_digest(tmp_path: Path) -> None:
    file = _write(tmp_path, plugin_py="value = 1") / "plugin.py"
    digests = Digests()
    before = digests.of(tmp_path)
    assert digests.of(tmp_path) == before
    replacement = tmp_path / "new.tmp"
    replacement.write_text("value = 1")
    replacement.rename(file)
    after = digests.of(tmp_path)
    assert (after.digest == before.digest, after == before) == (True, False)


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    shared = _write(tmp_path / "shared", x_py="1")
    plugin = _write(tmp_path / "plugin", plugin_py="1")
    (plugin / "shared").symlink_to(shared)
    (plugin / "self").symlink_to(plugin)
    (plugin / "broken").symlink_to(tmp_path / "nowhere")
    assert [path for path, _ in content_files(plugin)] == ["plugin.py", "shared/x.py"]
    before = _digest(plugin)
    (shared / "x.py").write_text("2")
    assert _digest(plugin) != before


def test_a_linked_folder_has_the_digest_of_what_it_links_to(tmp_path: Path) -> None:
    real = _write(tmp_path / "real", plugin_py="1")
    (tmp_path / "link").symlink_to(real)
    assert _digest(tmp_path / "link") == _digest(real)


def test_a_folder_that_is_gone_has_no_digest_and_leaves_nothing_behind(tmp_path: Path) -> None:
    digests = Digests()
    assert digests.of(_write(tmp_path / "p", plugin_py="1")).digest
    (tmp_path / "p/plugin.py").unlink()
    (tmp_path / "p").rmdir()
    assert digests.of(tmp_path / "p") == ("", {})
    assert digests._known == {}


def test_what_is_no_file_or_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    _write(tmp_path, plugin_py="1")
    before = _digest(tmp_path)
    os.mkfifo(tmp_path / "pipe.py")
    assert _digest(tmp_path) == before


def test_names_that_are_not_utf8_count(tmp_path: Path) -> None:
    _write(tmp_path, plugin_py="1")
    before = _digest(tmp_path)
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "wb"):
        pass
    assert _digest(tmp_path) != before


def test_the_signature_tells_what_the_digest_would(tmp_path: Path) -> None:
    _write(tmp_path, plugin_py="1", junk_pyc="1")
    before = signature(tmp_path)
    assert list(before) == ["plugin.py"]
    (tmp_path / "junk.pyc").write_text("2")
    assert signature(tmp_path) == before
    (tmp_path / "plugin.py").write_text("2")
    assert signature(tmp_path) != before
