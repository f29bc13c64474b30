"""The table of measured coverage in docs/concepts/certificates.md: ``make bench-coverage``."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import density_draws
import interval_draws


def main() -> None:
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    power = "power" in sys.argv
    claims: defaultdict[str, int] = defaultdict(int)
    misses: defaultdict[str, float] = defaultdict(float)
    worst: dict[str, tuple[float, str]] = {}
    level: dict[str, float] = {}
    for name in interval_draws.SPECTRA:
        for record in interval_draws.measure(name, draws, power=power):
            kind = record.kind.split()[0] if record.kind.startswith("forecast") else record.kind
            claims[kind] += record.claims
            misses[kind] += record.misses
            level[kind] = min(record.confidence, level.get(kind, 1.0))
            worst[kind] = min(
                (1 - record.misses / record.claims, name), worst.get(kind, (1.0, name))
            )
        print(name, file=sys.stderr)
    print("| interval | says | held, all spectra | held, worst spectrum | claims |")
    print("|---|---|---|---|---|")
    for kind, count in claims.items():
        held, (least, name) = 1 - misses[kind] / count, worst[kind]
        where = f" ({name})" if least < 1 else ""
        print(f"| {kind} | {level[kind]:g} | {held:.4f} | {least:.4f}{where} | {count} |")


def density(draws: int) -> None:
    """The same for what ``--density`` estimates, from three probes of twelve steps."""
    claims: defaultdict[str, int] = defaultdict(int)
    held: defaultdict[str, int] = defaultdict(int)
    worst: dict[str, float] = defaultdict(lambda: 1.0)
    for name, spectrum in density_draws.BLOCKS.items():
        known = density_draws.truths(spectrum)
        right: defaultdict[object, list[bool]] = defaultdict(list)
        for seed in range(draws):
            values = density_draws.solve(spectrum, seed=seed, probes=3, steps=12).values
            missed = density_draws.wrong(values, known)
            for key in density_draws.claimed(values, known):
                right[key].append(key not in missed)
        for key, found in right.items():
            kind = key[0]  # type: ignore[index]
            claims[kind] += len(found)
            held[kind] += sum(found)
            if len(found) >= draws // 2:
                worst[kind] = min(worst[kind], sum(found) / len(found))
        print(name, file=sys.stderr)
    print("| estimate | says | held | held, worst key of a spectrum | claims |")
    print("|---|---|---|---|---|")
    for kind, count in claims.items():
        print(f"| {kind} | 0.95 | {held[kind] / count:.4f} | {worst[kind]:.4f} | {count} |")


if __name__ == "__main__":
    if "density" in sys.argv:
        density(int(sys.argv[1]))
    else:
        main()
