"""``python -m tests.storm --seed N --minutes M``: exits 1, and tells the seed, if something did not hold."""

import argparse
import random
import sys

from .run import Plan, storm


def main() -> None:
    """Run one storm and tell about it."""
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--orgs", type=int, default=50)
    parser.add_argument("--plugins", type=int, default=5)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1.5, help="faults a second")
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    given = parser.parse_args()
    plan = Plan(given.seed, given.minutes * 60, given.orgs, given.plugins, given.clients, given.rate, given.store)
    print(f"seed {plan.seed}", flush=True)
    report = storm(plan, lambda line: print(line, flush=True))
    print(f"answers: {report.statuses}\nfaults: {report.faults}")
    print(f"well again after {report.recovery:.1f} s of calm ({report.allowed:.1f} s were allowed)")
    for part in report.thirds:
        print("medians of a third: {:.0f} KiB, {:.0f} descriptors, {:.0f} threads, {:.0f} processes".format(*part))
    for violation in report.violations:
        print(f"VIOLATION {violation}")
    if report.violations:
        again = " ".join(sys.argv[1:]) if "--seed" in sys.argv else f"--seed {plan.seed} {' '.join(sys.argv[1:])}"
        print(f"again: python -m tests.storm {again}\nlog: {report.log}")
        sys.exit(1)


if __name__ == "__main__":
    main()
