"""Attacks from inside a plugin, through the real host: each is stopped, and nobody else notices.

What may be attacked is in ``tests/attacks``. Every attack is also run without confinement, where it has to work: a test
that cannot fail proves nothing. And some are run with one layer alone and with all but one, against what was measured.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .attacks.catalogue import (
    ATTACKS,
    FAMILIES,
    IMPOSSIBLE,
    LAYERS,
    LEVELS,
    RESIDUAL,
    SUBSET,
    load_matrix,
    may_fail_unconfined,
    only_stopper,
)
from .attacks.judge import Arena, Result, arena
from .attacks.options import options_for, supported

Arenas = Iterator["Stage"]
BY_FAMILY = sorted(ATTACKS, key=lambda name: FAMILIES.index(ATTACKS[name].family))
LOG = os.environ.get("HAYHOST_ATTACK_LOG", "")

confining = pytest.mark.skipif(not supported(), reason="this host does not confine workers")


class Stage:
    """One arena at a time, kept while the next attack wants the same one and its host lives."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._wanted: tuple[str, str] | None = None
        self._arena: Arena | None = None
        self._context = arena(folder)
        self._broken: dict[tuple[str, str], str] = {}

    def run(self, configuration: str, name: str, plugin: str = "") -> tuple[Result, str]:
        """Run an attack on a host in ``configuration``: its result and the level that the host says it has."""
        wanted = (configuration, "crossorg" if plugin else ATTACKS[name].family)
        if wanted in self._broken:
            pytest.fail(f"plugins do not work on such a host: {self._broken[wanted]}")
        if self._arena is None or wanted != self._wanted or self._arena.host.process.poll() is not None:
            self.close()
            kinds = sorted({other.plugin for other in ATTACKS.values() if other.family == wanted[1]} - {"attacks"})
            self._number += 1
            folder = self._folder / str(self._number)
            folder.mkdir()
            self._context = arena(folder, options_for(configuration), kinds)
            try:
                self._arena, self._wanted = self._context.__enter__(), wanted
            except AssertionError as error:
                if "hayhost: layers: " in str(error):
                    pytest.skip(f"this machine does not give it: {str(error).splitlines()[-1]}")
                self._broken[wanted] = str(error)
                raise
        level = self._arena.level()
        result = self._arena.run(name, plugin)
        if LOG:
            with open(LOG, "a") as file:
                file.write(f"{configuration} {result}\n")
        return result, level

    def close(self) -> None:
        """End the host."""
        if self._arena is not None:
            self._arena = None
            self._context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Hosts on hostile plugins, on which attacks can be run."""
    folder = tmp_path_factory.mktemp("arena")
    for above in (folder, *folder.parents[:2]):
        above.chmod(0o755)
    found = Stage(folder)
    yield found
    found.close()


@confining
@pytest.mark.parametrize("name", BY_FAMILY)
def test_an_attack_is_stopped_and_nobody_notices(stage: Stage, name: str) -> None:
    result, level = stage.run("all", name)
    at, _ = RESIDUAL.get(name, ("none", ""))
    if not at or LEVELS.index(level) < LEVELS.index(at):
        assert "host" not in result.disturbed
        return
    _assert_stopped(result)


@confining
@pytest.mark.parametrize("name", [name for name in SUBSET if ATTACKS[name].plugin == "attacks"])
def test_an_attack_from_a_worker_that_was_not_forked_is_stopped(stage: Stage, name: str) -> None:
    result, level = stage.run("all", name, "import-thread")
    at, _ = RESIDUAL.get(name, ("none", ""))
    if at and LEVELS.index(level) >= LEVELS.index(at):
        # Each of these workers has a process tree of its own, in which the other one's number may be its own.
        _assert_stopped(result, ends=ATTACKS[name].harm == "peer")


def _assert_stopped(result: Result, *, ends: bool = False) -> None:
    attack = ATTACKS[result.name]
    allowed = {"refused", "harmless", "killed"} if ends or attack.ends or attack.host else {"refused", "harmless"}
    assert result.verdict in allowed, result
    assert result.harms == (), result
    assert result.disturbed == (), result


@pytest.mark.parametrize("name", BY_FAMILY)
def test_an_attack_works_without_confinement(stage: Stage, name: str) -> None:
    """Or it is said why not; what the host withstands by itself, it does here."""
    result, _ = stage.run("none", name)
    attack = ATTACKS[name]
    if attack.host:
        assert result.verdict != "succeeded", result
        assert result.disturbed == (), result
    elif result.verdict != "succeeded":
        assert may_fail_unconfined(attack), result
    elif attack.harm:
        assert attack.harm in result.harms, result


@confining
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_alone_stops_what_was_measured(stage: Stage, layer: str) -> None:
    matrix = _matrix(layer)
    for name in SUBSET:
        if expected := matrix["attacks"].get(name, {}).get(layer):
            result, _ = stage.run(layer, name)
            assert (result.verdict == "succeeded") == (expected == "succeeded"), result


@confining
@pytest.mark.parametrize("layer", LAYERS)
def test_an_attack_with_one_stopper_works_without_it(stage: Stage, layer: str) -> None:
    matrix = _matrix(layer)
    names = [name for name in SUBSET if only_stopper(matrix["attacks"].get(name, {})) == layer]
    assert names or layer == "uid", (
        "each layer but the user, which others stand in for, has to be the only one somewhere"
    )
    for name in names:
        result, _ = stage.run(f"without-{layer}", name)
        assert result.verdict == "succeeded", result


def _matrix(layer: str) -> dict[str, dict[str, dict[str, str]]]:
    matrix = load_matrix()
    if layer not in matrix.get("layers", ()) or matrix["machine"]["root"] != (os.getuid() == 0):
        pytest.skip("not measured on a machine and as a user like this")
    return matrix


def test_there_are_enough_attacks_and_what_is_said_about_them_is_about_them() -> None:
    assert {attack.family for attack in ATTACKS.values()} == set(FAMILIES)
    assert all(sum(attack.family == family for attack in ATTACKS.values()) >= 20 for family in FAMILIES)
    assert {*IMPOSSIBLE, *RESIDUAL, *SUBSET} <= set(ATTACKS)
    assert all(level in (*LEVELS, "") for level, _ in RESIDUAL.values())
    sure = [attack for attack in ATTACKS.values() if not may_fail_unconfined(attack)]
    assert len(sure) >= 200
