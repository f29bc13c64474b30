"""Which variant helps most: by the loss that it would gain, and by its condition numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from hessdiag.combined import level, median_ratio, total
from hessdiag.comparison import ratio
from hessdiag.quantity import Quantity
from hessdiag.run import Run, VariantResult
from hessdiag.variants.decay import DECOUPLED, named_decoupled
from hessdiag.variants.grammar import NETWORKS, RAW

WHOLE = "whole"
HORIZON = "100"
QUANTILE = "0.5"
UNFINISHED = ("failed", "not begun")
"""How the reason starts where a variant applies to a block and yet has no numbers."""
RANKED = ("exact", "interval", "estimate")
"""A number with a bound to one side joins these where it can only be better than its bound."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a variant comes by one measure.

    Attributes:
        variant: Its key.
        amount: The forecast, in units of the loss; or the median ratio to raw.
        blocks: How many blocks it rests on; 1 for the forecast of ``whole``.
    """

    variant: str
    amount: Quantity
    blocks: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """The variants by one measure, ``raw`` among them.

    Attributes:
        ranked: Those whose amount has a place in the order, best first.
        unranked: Those known by a bound to the wrong side, or not at all.
        partial: Those that apply to no more than half of the blocks: a median over these does not
            speak for the network, and they are not ranked.
        blocks: How many blocks the measure rests on for a variant that applies to all.
        level: Those whose amounts are not certainly worse than the leader's.
        whole: The measure is that of the block ``whole``.
    """

    ranked: tuple[Standing, ...]
    unranked: tuple[Standing, ...]
    partial: tuple[Standing, ...]
    blocks: int
    level: tuple[str, ...]
    whole: bool = False

    @property
    def leader(self) -> Standing | None:
        """The best; ``raw`` where no variant helps, None where nothing is known of the others."""
        if len(self.ranked) == 1 and self.ranked[0].variant == RAW and self.level:
            return None
        return self.ranked[0] if self.ranked else None

    @property
    def standings(self) -> tuple[Standing, ...]:
        """All that could be compared."""
        return (*self.ranked, *self.unranked, *self.partial)

    @property
    def raw(self) -> Standing | None:
        """What the others are held against."""
        return next((s for s in self.standings if s.variant == RAW), None)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which variant helps most, by two measures.

    Attributes:
        forecast: By ``forecast_positive`` at T = 100, the larger the better: of ``whole`` where
            raw has it, else summed over blocks. A block to which a variant does not apply gains
            what it gains raw. None where there is nothing to compare.
        kappa: By ``kappa_quantile`` at 0.5, the smaller the better: the median over blocks of its
            ratio to raw, over those to which the variant applies. None likewise.
        agree: Both name the same variant (or raw); None where one names none, or where they name
            two and one of them does not certainly beat the other.
        penalised: Those whose weight decay is a penalty of their own: λ|z|²/2 where it is
            decoupled, that of the new parameters where the network is changed. Their forecast is
            of another function than raw's, and has no place in that ranking.
        decoupled: Decoupled decay is the reason for at least one of them.
    """

    forecast: Ranking | None
    kappa: Ranking | None
    agree: bool | None
    penalised: tuple[str, ...] = ()
    decoupled: bool = False


def verdict(run: Run) -> Verdict:
    """Rank the variants of a run that compute the function of the original.

    Returns:
        Two rankings; both None where no variant but raw has numbers.
    Source:
        maths.md 1.3 and 2.3.
    """
    competing = competitors(run)
    if RAW not in competing or len(competing) < 2:
        return Verdict(None, None, None)
    penalties = _penalties(run, competing)
    alike = {variant: found for variant, found in competing.items() if variant not in penalties}
    forecast, kappa = _by_forecast(alike), _by_kappa(competing)
    decoupled = any(penalties.values())
    return Verdict(forecast, kappa, _agree(forecast, kappa), tuple(penalties), decoupled)


def competitors(run: Run) -> dict[str, dict[str, VariantResult]]:
    """By variant and block, the results of those that compute the function of the original.

    Variants without numbers are left out.
    """
    results = {
        variant: {b.name: b.variants[variant] for b in run.blocks if variant in b.variants}
        for variant in run.variants
    }
    return {
        variant: found
        for variant, found in results.items()
        if any(map(solved, found.values())) and _same(found)
    }


def solved(result: VariantResult | None) -> TypeGuard[VariantResult]:
    """There are numbers."""
    return result is not None and result["skipped"] is None


def kappa_ratio(raw: VariantResult | None, result: VariantResult) -> Quantity:
    """κ at the median λ over that of raw, with every ratio that the certificates allow."""
    if raw is None or not solved(raw) or not solved(result):
        return Quantity.absent()
    return ratio(raw["kappa_quantile"][QUANTILE], result["kappa_quantile"][QUANTILE])


def _same(results: Mapping[str, VariantResult]) -> bool:
    """Every block that has numbers is one of the original's function."""
    return all(result["same_function"] for result in results.values() if solved(result))


def _penalties(run: Run, variants: Iterable[str]) -> dict[str, bool]:
    """Those that have a weight penalty of their own, and whether it is one on z."""
    decay = run.provenance.config.get("weight_decay")
    if not isinstance(decay, int | float) or not decay > 0:
        return {}
    trained = run.provenance.environment.get("optimizer") or {}
    trained_by = DECOUPLED if trained.get("decoupled") else trained.get("class")
    found = {}
    for variant in variants:
        network, _, coordinates = variant.rpartition("+")
        if coordinates in NETWORKS:
            network, coordinates = coordinates, RAW
        decoupled = named_decoupled(coordinates, trained_by)
        if network or decoupled:
            found[variant] = decoupled
    return found


def _by_forecast(competing: Mapping[str, Mapping[str, VariantResult]]) -> Ranking | None:
    raw = competing[RAW]
    whole = WHOLE in raw and solved(raw[WHOLE])
    names = [WHOLE] if whole else [name for name in _compared(raw) if solved(raw[name])]
    names = [name for name in names if _forecast(raw[name]).status not in {None, "zero"}]
    standings = []
    for variant, found in competing.items():
        amounts, own = [], 0
        for name in names:
            result = found.get(name)
            if result is not None and solved(result):
                amounts.append(_forecast(result))
                own += 1
            elif not whole and result is not None and not result["skipped"].startswith(UNFINISHED):
                amounts.append(_forecast(raw[name]))
        if own and len(amounts) == len(names):
            standings.append(Standing(variant, total(amounts), own))
    return _ranking(standings, len(names), smallest=False, whole=whole)


def _by_kappa(competing: Mapping[str, Mapping[str, VariantResult]]) -> Ranking | None:
    raw = competing[RAW]
    names = [
        name
        for name in _compared(raw)
        if kappa_ratio(raw[name], raw[name]).status not in {None, "zero"}
    ]
    standings = [Standing(RAW, Quantity.exact(1.0), len(names))] if names else []
    for variant, found in competing.items():
        ratios = [kappa_ratio(raw[name], found[name]) for name in names if name in found]
        ratios = [found for found in ratios if found.status is not None]
        if variant != RAW and ratios:
            standings.append(Standing(variant, median_ratio(ratios), len(ratios)))
    return _ranking(standings, len(names), smallest=True)


def _compared(raw: Mapping[str, VariantResult]) -> list[str]:
    """The blocks that make up the network; ``whole`` holds them all, and counts where alone."""
    return [name for name in raw if name != WHOLE] or list(raw)


def _forecast(result: VariantResult) -> Quantity:
    found = result["forecast_positive"][HORIZON]
    assert isinstance(found, Quantity)  # noqa: S101 - the schema says so, for the type checker
    return found


def _ranking(
    standings: Sequence[Standing], blocks: int, *, smallest: bool, whole: bool = False
) -> Ranking | None:
    if len(standings) < 2:
        return None
    # The rest of the sum over blocks is raw's; a median has no such rest.
    judged = [s for s in standings if not smallest or 2 * s.blocks > blocks]
    ranked, unranked = [], []
    for standing in judged:
        amount = standing.amount
        kinds = (*RANKED, "upper-bound" if smallest else "lower-bound")
        if amount.status in kinds and amount.value is not None:
            ranked.append((amount.value if smallest else -amount.value, standing))
        else:
            unranked.append(standing)
    ranked.sort(key=lambda pair: pair[0])
    numbers = {s.variant: s.amount for s in judged}
    return Ranking(
        ranked=tuple(standing for _, standing in ranked),
        unranked=tuple(unranked),
        partial=tuple(s for s in standings if s not in judged),
        blocks=blocks,
        level=level(numbers, ranked[0][1].variant, smallest=smallest) if ranked else (),
        whole=whole,
    )


def _agree(forecast: Ranking | None, kappa: Ranking | None) -> bool | None:
    first = forecast.leader if forecast else None
    second = kappa.leader if kappa else None
    if forecast is None or kappa is None or first is None or second is None:
        return None
    if first.variant == second.variant:
        return True
    for ranking, leader, other in ((forecast, first, second), (kappa, second, first)):
        if leader.amount.status != "estimate" and other.variant in ranking.level:
            return None
    return False
