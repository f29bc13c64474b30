"""The verdict in words."""

from __future__ import annotations

from collections.abc import Sequence

from hessdiag.plain import printable
from hessdiag.quantity import Quantity
from hessdiag.tables.lines import TIED
from hessdiag.tables.marks import MEANINGS, certified, times
from hessdiag.variants.grammar import RAW
from hessdiag.verdict import HORIZON, Ranking, Verdict

NAMES_SHOWN = 3
DIGITS = 3
NEAR = "≈"


def verdict_sentence(verdict: Verdict) -> str:
    """One sentence: which variant helps most by either measure, how surely, and if they agree.

    Returns:
        Text with tied spaces; empty where there is nothing to compare.
    """
    parts = []
    if verdict.forecast is not None:
        where = "whole" if verdict.forecast.whole else _over("sum", verdict.forecast)
        about = [f"T{TIED}={TIED}{HORIZON}", where, *_estimated(verdict.forecast)]
        gain = _gain(verdict.forecast, verdict.penalised)
        parts.append(f"by forecast ({', '.join(about)}) {gain}")
    elif verdict.penalised:
        parts.append(f"by forecast nothing is compared: {_penalty(verdict)}")
    if verdict.kappa is not None:
        about = [f"ratio to raw, {_over('median', verdict.kappa)}"]
        about += ["weight decay in each variant's own units"] * bool(verdict.penalised)
        about += _estimated(verdict.kappa)
        parts.append(f"by κ at the median λ ({', '.join(about)}) {_conditioning(verdict.kappa)}")
    if not parts:
        return ""
    if len(parts) == 2:
        parts.append(_agreement(verdict))
    return f"Verdict: {'; '.join(part for part in parts if part)}."


def leader_name(ranking: Ranking | None) -> str:
    """The leader alone: marked where it is an estimate or not separated from another."""
    if ranking is None:
        return "–"
    leader = ranking.leader
    if leader is None:
        return "?"
    name = "none" if leader.variant == RAW else printable(leader.variant)
    if leader.amount.status == "estimate":
        return f"~ {name}"
    return f"{NEAR} {name}" if ranking.level else name


def _estimated(ranking: Ranking) -> list[str]:
    leader = ranking.leader
    return ["an estimate"] * (leader is not None and leader.amount.status == "estimate")


def _gain(ranking: Ranking, penalised: Sequence[str]) -> str:
    leader, raw, doubts = ranking.leader, ranking.raw, _doubts(ranking, penalised)
    if leader is None:
        return f"nothing can be said{doubts}"
    if leader.variant == RAW:
        return f"no variant helps, raw gains most: {_amount(leader.amount)}{doubts}"
    against = "" if raw is None else f", raw{TIED}{_amount(raw.amount)}"
    return f"{printable(leader.variant)} helps most: {_amount(leader.amount)}{against}{doubts}"


def _penalty(verdict: Verdict) -> str:
    if verdict.decoupled:
        return "each variant has its own penalty λ|z|²/2 (decoupled weight decay)"
    return "each network has its own penalty λ|p|²/2 (weight decay)"


def _conditioning(ranking: Ranking) -> str:
    leader = ranking.leader
    if leader is None:
        return f"nothing can be said{_doubts(ranking)}"
    if len(ranking.ranked) == 1:
        return f"no variant helps{_doubts(ranking)}"
    best = leader if leader.variant != RAW else ranking.ranked[1]
    on = f" on {best.blocks} of {ranking.blocks}" if best.blocks != ranking.blocks else ""
    reached = f"{_ratio(best.amount)}{on}{_doubts(ranking)}"
    if best is not leader:
        return f"no variant helps, {printable(best.variant)} comes nearest: {reached}"
    return f"{printable(best.variant)} helps most: {reached}"


def _agreement(verdict: Verdict) -> str:
    forecast, kappa = verdict.forecast, verdict.kappa
    if forecast is None or kappa is None or forecast.leader is None or kappa.leader is None:
        return ""
    if verdict.agree:
        return "the two agree"
    return "the two disagree" if verdict.agree is False else "whether the two agree is open"


def _doubts(ranking: Ranking, penalised: Sequence[str] = ()) -> str:
    """What keeps the leader from being certain, and who was not ranked."""
    leader = ranking.leader
    open_ = [s.variant for s in ranking.unranked if leader is None or s.variant in ranking.level]
    said = []
    if leader is not None and leader.amount.status != "estimate":
        near = [name for name in ranking.level if name not in open_]
        said += [f"not separated from {_names(near)}"] * bool(near)
    said += [f"{_names(open_)}: not resolved"] * bool(open_)
    few = [standing.variant for standing in ranking.partial]
    said += [f"{_names(few)}: on no more than half of the blocks"] * bool(few)
    if penalised:
        each = "each " if len(penalised) > 1 else ""
        said.append(f"{_names(penalised)}: not compared, {each}with its own weight penalty")
    return f" ({'; '.join(said)})" if said else ""


def _over(word: str, ranking: Ranking) -> str:
    return f"{word} over {ranking.blocks} blocks" if ranking.blocks > 1 else "1 block"


def _names(names: Sequence[str]) -> str:
    shown = [printable(name) for name in names[:NAMES_SHOWN]]
    if len(names) > NAMES_SHOWN:
        shown.append(f"{len(names) - NAMES_SHOWN} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _amount(quantity: Quantity) -> str:
    mark = certified(quantity, DIGITS)
    if mark.kind in {"?", "0", "–"}:
        return MEANINGS[mark.kind]
    return str(mark).replace(" ", TIED)


def _ratio(quantity: Quantity) -> str:
    return str(certified(quantity, DIGITS, times)).replace("= ", "").replace(" ", TIED)
