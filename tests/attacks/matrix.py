"""Measures which layer of isolation stops which attack: ``python -m tests.attacks.matrix --output FILE.md``.

Runs every attack without any layer, with each alone, with all, and with all but one; writes a table, and the outcomes
to ``matrix.json`` beside this file, which tests hold the host to.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .catalogue import ATTACKS, FAMILIES, LAYERS, LEVELS, MATRIX, RESIDUAL, load_matrix, may_fail_unconfined
from .judge import Arena, arena
from .options import CONFIGURATIONS, options_for, supported

__all__ = ["available_layers", "main", "measure", "table"]

_SIGNS = {"succeeded": "**works**", "refused": "-", "harmless": "-", "killed": "ended", "": " "}


def available_layers(folder: Path) -> tuple[str, ...]:
    """The layers that this machine gives: those that a host starts with when it is asked for them alone."""
    found = []
    for layer in LAYERS if supported() else ():
        place = folder / f"try-{layer}"
        place.mkdir()
        try:
            with arena(place, options_for(layer), ()):
                found.append(layer)
        except AssertionError as error:
            print(f"{layer}: not available: {str(error)[-300:]}", file=sys.stderr)
    return tuple(found)


def measure(folder: Path, configuration: str, names: Sequence[str], layers: Sequence[str] = LAYERS) -> dict[str, str]:
    """The verdict of each attack in one configuration; a host that did not bear one is replaced."""
    verdicts: dict[str, str] = {}
    waiting = list(names)
    kinds = sorted({ATTACKS[name].plugin for name in names} - {"attacks"})
    for attempt in range(20):
        if not waiting:
            break
        place = folder / f"{configuration}-{attempt}"
        place.mkdir()
        with arena(place, options_for(configuration, layers), kinds) as found:
            while waiting and _one(found, waiting, verdicts):
                pass
    return verdicts


def _one(found: Arena, waiting: list[str], verdicts: dict[str, str]) -> bool:
    name = waiting.pop(0)
    try:
        result = found.run(name)
    except (AssertionError, OSError) as error:
        print(f"{name}: {error!r}"[:300], file=sys.stderr)
        verdicts[name] = "succeeded"
        return False
    verdicts[name] = result.verdict
    if "host" in result.disturbed:
        verdicts[name] = "succeeded"
        return False
    return True


def table(outcomes: dict[str, dict[str, str]], level: str) -> str:
    """The outcomes as Markdown."""
    columns = ["none", *LAYERS, "all"]
    lines = [
        "# Attacks\n",
        "What each attack comes to without any layer of isolation, with one layer alone, and with all of",
    ]
    lines += [f"them (`{level}`). **works**: it succeeds. -: it is refused. ended: its worker is. Empty: not measured."]
    lines += ["Made by `python -m tests.attacks.matrix`.\n"]
    for family in FAMILIES:
        lines += [f"## {family.capitalize()}\n", "| attack | | " + " | ".join(columns) + " |"]
        lines += ["|---|---|" + "---|" * len(columns)]
        for attack in (attack for attack in ATTACKS.values() if attack.family == family):
            cells = [_SIGNS[outcomes.get(attack.name, {}).get(column, "")] for column in columns]
            lines.append(f"| `{attack.name}` | {attack.about} | " + " | ".join(cells) + " |")
        lines.append("")
    works = [name for name in ATTACKS if outcomes.get(name, {}).get("all") == "succeeded"]
    lines += ["## What remains\n"]
    lines += [f"- `{name}`: {RESIDUAL.get(name, ('', 'not expected'))[1]}" for name in works] or [
        "Nothing of this list."
    ]
    lower = [f"- `{name}`, below `{at}`: {why}" for name, (at, why) in RESIDUAL.items() if at and name not in works]
    lines += ["\nBelow the highest level also:\n", *lower] if lower else []
    never = [attack for attack in ATTACKS.values() if outcomes.get(attack.name, {}).get("none", "") != "succeeded"]
    lines += ["\n## What did not work without any layer either\n"]
    lines += [f"- `{attack.name}`: {may_fail_unconfined(attack) or 'not expected'}" for attack in never]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.matrix", description=__doc__)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--json", type=Path, default=MATRIX, help="file for the outcomes")
    parser.add_argument("--configurations", default=",".join(CONFIGURATIONS), help="those to measure; others are kept")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="those to measure")
    options = parser.parse_args(arguments)
    names, wanted = options.attacks.split(","), options.configurations.split(",")
    known = load_matrix() if options.json == MATRIX else {}
    outcomes: dict[str, dict[str, str]] = known.get("attacks", {})
    level = known.get("level", "none")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        layers = available_layers(folder)
        for configuration in wanted:
            layer = configuration.removeprefix("without-")
            if configuration != "none" and (not supported() or (layer in LAYERS and layer not in layers)):
                print(f"{configuration}: not available", file=sys.stderr)
                continue
            for name, verdict in measure(folder, configuration, names, layers).items():
                outcomes.setdefault(name, {})[configuration] = verdict
            print(f"{configuration}: done", file=sys.stderr)
        if supported():
            (folder / "level").mkdir()
            with arena(folder / "level", (), ()) as found:
                level = found.level()
    assert level in LEVELS
    machine = {"kernel": platform.release(), "machine": platform.machine(), "root": os.getuid() == 0}
    data: dict[str, Any] = {"level": level, "layers": list(layers), "machine": machine, "attacks": outcomes}
    options.json.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    if options.output:
        options.output.write_text(table(outcomes, level))


if __name__ == "__main__":
    main()
