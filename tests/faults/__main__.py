"""The campaign of faults: none may be silent, and none ugly.

    python -m tests.faults --count 1000 --seed 1            a table at the end; exit code 1 if any was
    python -m tests.faults --seed 1 --only 17               one of them again, with all that was printed
    python -m tests.faults --count 50 --seed 1 --kinds disk kill

Fault number n of a seed is always the same. A kill, a signal and a failing disk are met at a counted call of
the process (tests/faults/injected_disk.py), and not after some seconds.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from tests.faults.arena import build
from tests.faults.judge import IDENTICAL, SAID, SILENT, UGLY, Verdict
from tests.faults.kinds import KINDS, Campaign

OUTCOMES = (IDENTICAL, SAID, SILENT, UGLY)


def one_fault(campaign: Campaign, seed: int, number: int, kinds: Sequence[str]) -> tuple[str, str, Verdict]:
    """(kind, what was injected, what became of it) of fault `number`."""
    rng = Random(f"{seed}/{number}")
    kind = rng.choices(kinds, [KINDS[name][0] for name in kinds])[0]
    campaign.arena.restore()
    return kind, *KINDS[kind][1](campaign, rng)


def table(counts: Counter[tuple[str, str]], kinds: Sequence[str]) -> str:
    """Number of faults by kind and outcome."""
    rows = [["kind", "faults", *OUTCOMES]]
    for kind in [*kinds, "all"]:
        numbers = [
            sum(n for (k, o), n in counts.items() if kind in (k, "all") and o == out) for out in OUTCOMES
        ]
        rows.append([kind, str(sum(numbers)), *map(str, numbers)])
    return "\n".join(f"{row[0]:12}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this fault alone")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args(argv)
    numbers = range(args.count) if args.only is None else [args.only]
    counts: Counter[tuple[str, str]] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="motley-faults-") as folder:
        campaign = Campaign(build(Path(folder)))
        print(f"arena made in {time.monotonic() - began:.0f} s", flush=True)
        for done, number in enumerate(numbers, start=1):
            kind, injected, verdict = one_fault(campaign, args.seed, number, args.kinds)
            counts[kind, verdict.outcome] += 1
            if verdict.outcome in (SILENT, UGLY) or args.only is not None:
                print(f"{number}: {verdict.outcome}: {kind}: {injected}\n    {verdict.why}", flush=True)
            if args.only is not None:
                print(campaign.arena.output.read_text(errors="replace"))
            elif done % 25 == 0:
                print(f"{done} of {len(numbers)} faults, {time.monotonic() - began:.0f} s", flush=True)
    print(table(counts, args.kinds))
    bad = sum(count for (_, outcome), count in counts.items() if outcome in (SILENT, UGLY))
    if bad:
        kinds = "" if args.kinds == list(KINDS) else f"--kinds {' '.join(args.kinds)} "
        print(
            f"{bad} silent or ugly. One again: python -m tests.faults --seed {args.seed} {kinds}--only NUMBER"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
