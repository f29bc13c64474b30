from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy.stats import beta

from hessdiag_probes import (
    Breakdown,
    gauss,
    gauss_radau,
    gaussian,
    generator,
    lanczos,
    next_above,
    quantile,
    ranked,
    sphere,
    stochastic_quadrature,
)
from hessdiag_probes.counts import least_count, most_count

DRAWS = 400  # on each of twelve counts

# Uniform starts make a diagonal matrix as good as any; n = 100 unless the name says otherwise.
BLOCKS = {
    "spread": torch.logspace(-3, 0, 100, dtype=torch.float64),
    "even": torch.linspace(0.01, 1, 100, dtype=torch.float64),
    "clustered": torch.cat([c + 1e-6 * torch.arange(25) for c in (1.0, 2.0, 3.0, 9.0)]).double(),
    "outlier": torch.cat([torch.linspace(0, 0.01, 98), torch.tensor([1.0, 10.0])]).double(),
    "indefinite": torch.linspace(-0.5, 1, 100, dtype=torch.float64),
    "low rank": torch.cat([torch.zeros(90), torch.linspace(1, 2, 10)]).double(),
    "singular": torch.cat([torch.zeros(30), torch.logspace(-2, 0, 70)]).double(),
}


def draw(spectrum, *, probes=4, steps=12, seed=0, **options):
    labelled = generator(seed, "quadrature")
    return stochastic_quadrature(
        lambda v: spectrum.to(v) * v, len(spectrum), probes, steps, generator=labelled, **options
    )


def shares(spectrum, *, probes=4, seed=0):
    """What each eigenvector holds of the probes of :func:`draw`."""
    labelled = generator(seed, "quadrature")
    squares = sum(gaussian(len(spectrum), generator=labelled).square() for _ in range(probes))
    return squares / squares.sum()


def thresholds(spectrum):
    top = float(spectrum.abs().max())
    between = (spectrum[1:] + spectrum[:-1]) / 2
    return [*between[spectrum.diff() > 1e-9 * top].tolist(), -2 * top, -1e-6 * top, 2 * top]


# --- rules ---------------------------------------------------------------------------------------


def decrease(steps, rate):
    """What gradient descent takes off ``l x²`` in ``steps``; all its odd derivatives negative."""

    def function(values):
        safe = torch.where(values == 0, torch.ones_like(values), values)
        found = -torch.expm1(2 * steps * torch.log1p(-rate * values)) / (2 * safe)
        return torch.where(values == 0, torch.full_like(values, steps * rate), found)

    return function


@pytest.mark.parametrize("horizon", [3, 40, 300])
@pytest.mark.parametrize("name", BLOCKS)
def test_gauss_is_below_and_gauss_radau_above_and_both_tighten(name, horizon):
    spectrum = BLOCKS[name]
    # 1 / 1.001 ‖H‖: at a rate of 1 / l_1 the logarithm would be infinite.
    function = decrease(horizon, 1 / (1.001 * float(spectrum.abs().max())))
    start = sphere(100, generator=generator(1))
    truth = float(start.square() @ function(spectrum))
    node = float(spectrum.min()) - 1e-3
    gaps = []
    for steps in (1, 2, 5, 10, 20, 60):
        run = lanczos(lambda v: spectrum * v, start, steps)
        low = gauss(run).integral(function)
        high = gauss_radau(run, node).integral(function)
        assert low <= truth * (1 + 1e-12)
        assert truth * (1 - 1e-12) <= high
        gaps.append(high - low)
    assert all(b <= a + 1e-12 * truth for a, b in pairwise(gaps))
    assert gaps[-1] <= 1e-12 * truth


def test_the_radau_rule_holds_its_node_and_integrates_polynomials_exactly():
    spectrum = BLOCKS["indefinite"]
    start = sphere(100, generator=generator(2))
    run = lanczos(lambda v: spectrum * v, start, 4)
    rule = gauss_radau(run, -0.7)
    assert rule.node[0] == pytest.approx(-0.7, abs=1e-14)
    assert rule.node.numel() == 5
    assert rule.weight.min() >= 0
    for degree in range(9):  # 2k
        truth = float(start.square() @ spectrum**degree)
        assert rule.integral(lambda t, d=degree: t**d) == pytest.approx(truth, rel=1e-12)
    for degree in range(8):  # 2k - 1
        truth = float(start.square() @ spectrum**degree)
        assert gauss(run).integral(lambda t, d=degree: t**d) == pytest.approx(truth, rel=1e-12)


def test_both_rules_of_an_invariant_run_are_the_measure():
    spectrum = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    run = lanczos(lambda v: spectrum * v, torch.tensor([3.0, 0.0, 4.0]).double(), 3)
    for rule in (gauss(run), gauss_radau(run, 0.5)):
        assert rule.node.tolist() == pytest.approx([1, 5])
        assert rule.weight.tolist() == pytest.approx([0.36, 0.64])


def test_a_radau_node_on_a_ritz_value_is_refused():
    run = lanczos(lambda v: torch.tensor([1.0, 3.0]).double() * v, torch.ones(2).double(), 1)
    with pytest.raises(ValueError, match=r"node = 2\.0 is a Ritz value of the run; prescribe one"):
        gauss_radau(run, 2.0)
    with pytest.raises(ValueError, match=r"node = inf; prescribe a finite one"):
        gauss_radau(run, math.inf)


# --- brackets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_bracket_holds_the_share_of_these_probes(name, steps):
    spectrum = BLOCKS[name]
    found = draw(spectrum, probes=2, steps=steps)
    mine = shares(spectrum, probes=2)
    for threshold in thresholds(spectrum):
        low, high = found.bracket(threshold)
        assert low <= float(mine[spectrum > threshold].sum()) <= high


def test_the_bracket_holds_next_to_a_ritz_value():
    spectrum = BLOCKS["even"]
    found = draw(spectrum, probes=1, steps=9)
    mine = shares(spectrum, probes=1)
    for node in found.rule.node.tolist():
        for shift in (0.0, 1e-15, -1e-15, 1e-12, -1e-12, 1e-8, -1e-8):
            low, high = found.bracket(node + shift)
            truth = float(mine[spectrum > node + shift].sum())
            assert low <= truth <= high
            assert high - low < 0.4
            pinned, _ = found.runs[0].pinned(node + shift)
            # At a Ritz value itself, and within rounding of it, the Gauss rule's node is the one.
            assert abs(pinned - (node + shift)).min() <= found.rounding
            assert abs(pinned).max() <= 20


def test_a_gap_is_resolved_though_the_bulk_is_not():
    spectrum = BLOCKS["outlier"]
    found = draw(spectrum, steps=12)
    low, high = found.bracket(0.1)
    assert high - low < 1e-10
    assert low > 0
    low, high = found.bracket(0.005)
    assert high - low > 0.01


def test_an_invariant_run_resolves_all():
    found = draw(BLOCKS["low rank"], steps=40)
    low, high = found.bracket(0.5)
    truth = float(shares(BLOCKS["low rank"])[90:].sum())
    assert low <= truth <= high
    assert high - low < 1e-11
    assert found.resolution == 0


def test_the_resolution_is_the_rule_of_thumb_for_an_open_run():
    found = draw(BLOCKS["even"], steps=10)
    assert found.steps == 10
    assert found.resolution == pytest.approx(5 * found.span / 100)
    assert 0.9 < found.span < 0.99


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "probes"), [(7, 1), (50, 3), (1000, 10)])
@pytest.mark.parametrize("share", [0.0, 1e-9, 0.02, 0.5, 0.97, 1.0])
def test_the_counts_invert_the_beta_law(share, n, probes):
    tail = 0.025

    def below(k):
        if k in {0, n}:
            return float(share >= k / n)
        return float(beta.cdf(share, probes * k / 2, probes * (n - k) / 2))

    def beyond(k):
        if k in {0, n}:
            return float(share <= k / n)
        return float(beta.sf(share, probes * k / 2, probes * (n - k) / 2))

    most = max(k for k in range(n + 1) if k == 0 or below(k) > tail)
    least = min(k for k in range(n + 1) if k == n or beyond(k) > tail)
    assert most_count(share, n, probes, tail) == most
    assert least_count(share, n, probes, tail) == least


def test_a_share_of_zero_does_not_prove_a_count_of_zero_unless_it_is_small_enough():
    million = 1_000_000
    assert most_count(1e-10, million, 1, 0.025) == 0
    # A single eigenvector holds less than 1e-9 of one probe with probability 0.025.
    assert most_count(2e-9, million, 1, 0.025) >= 1


def covered(spectrum, count, seed):
    """Whether the interval of the count above a threshold holds ``count``."""
    ordered = spectrum.sort(descending=True).values
    edge = ordered[count - 1] + (ordered[count] if count < len(ordered) else 0)
    found = draw(spectrum, probes=2, steps=5, seed=seed).above(float(edge) / 2)
    return found.least <= count <= found.most


@pytest.mark.parametrize("count", [1, 2, 30, 99])
def test_intervals_of_counts_cover_as_often_as_they_say(count):
    spectrum = BLOCKS["spread"]
    hits = sum(covered(spectrum, count, seed) for seed in range(200))
    assert hits / 200 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 200)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 10, 30, 50, 99])
@pytest.mark.parametrize("name", ["spread", "even"])
def test_intervals_of_counts_cover_over_many_seeds(name, count):
    hits = sum(covered(BLOCKS[name], count, seed) for seed in range(DRAWS))
    assert hits / DRAWS >= 0.95 - 3.5 * math.sqrt(0.95 * 0.05 / DRAWS)


def test_an_interval_is_not_wider_than_the_law_of_the_shares_asks():
    spectrum = BLOCKS["low rank"]
    found = draw(spectrum, probes=10, steps=40).above(0.5)
    share = float(shares(spectrum, probes=10)[90:].sum())
    assert found.value == pytest.approx(share, abs=1e-11)
    assert found.least == least_count(share, 100, 10, 0.025)
    assert found.most == most_count(share, 100, 10, 0.025)
    assert (found.low, found.high) == (found.least / 100, found.most / 100)
    assert found.stderr == pytest.approx(math.sqrt(2 * share * (1 - share) / 1002))


def test_the_standard_error_is_the_scatter_over_seeds():
    spectrum = BLOCKS["low rank"]
    found = [draw(spectrum, steps=40, seed=seed).above(0.5) for seed in range(100)]
    scatter = float(torch.tensor([mass.value for mass in found]).std())
    # The standard deviation of 100 draws is known to 7 %.
    assert scatter == pytest.approx(math.sqrt(2 * 0.1 * 0.9 / 402), rel=0.22)


def test_what_is_known_without_doubt_is_said_without_doubt():
    found = draw(BLOCKS["clustered"], steps=40)
    above = [found.above(t) for t in (-1.0, 0.5, 20.0)]
    assert [(mass.least, mass.most) for mass in above] == [(100, 100), (100, 100), (0, 0)]
    below = found.below(0.5)
    assert (below.least, below.most) == (0, 0)


def test_the_masses_of_a_partition_agree():
    found = draw(BLOCKS["indefinite"], steps=20)
    above, below, inside = found.above(0.2), found.below(-0.1), found.between(-0.1, 0.2)
    assert above.value + below.value + inside.value == pytest.approx(1, abs=1e-12)
    truth = shares(BLOCKS["indefinite"])
    middle = (BLOCKS["indefinite"] >= -0.1) & (BLOCKS["indefinite"] <= 0.2)
    assert inside.resolution_low <= float(truth[middle].sum()) <= inside.resolution_high
    assert inside.resolution_high - inside.resolution_low < 0.2


def test_a_threshold_known_to_a_range_takes_the_worse_end_on_each_side():
    found = draw(BLOCKS["even"], steps=30)
    narrow, wide = found.above(0.4), found.above(0.4, upto=0.6)
    assert wide.resolution_high == narrow.resolution_high
    assert wide.resolution_low == found.above(0.6).resolution_low
    wide = found.below(0.6, downto=0.4)
    assert wide.resolution_high == found.below(0.6).resolution_high
    assert wide.resolution_low == found.below(0.4).resolution_low


# --- single eigenvalues --------------------------------------------------------------------------


def holds(span, truth, rounding):
    return span.low - rounding <= truth <= span.high + rounding


@pytest.mark.parametrize("name", BLOCKS)
def test_single_eigenvalues_lie_in_their_spans(name):
    spectrum = BLOCKS[name].sort(descending=True).values
    positive = spectrum[spectrum > 1e-9]
    misses = {"rank": 0, "quantile": 0, "next": 0}
    for seed in range(5):
        found = draw(BLOCKS[name], probes=3, steps=14, seed=seed)
        for rank in (1, 40):
            span = ranked(found, rank)
            misses["rank"] += not holds(span, float(spectrum[rank - 1]), found.rounding)
        least = max(found.above(1e-9).least, 1)
        span = quantile(found, 0.9, base=1e-9, least=least).span
        truth = float(positive[math.ceil(0.9 * len(positive)) - 1])
        misses["quantile"] += not holds(span, truth, found.rounding)
        misses["next"] += not holds(next_above(found, 1e-9), float(positive[-1]), found.rounding)
    # Nominal 0.25 of 5, and 0.5 of 10 for the ranks.
    assert max(misses.values()) <= 3, misses


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_single_eigenvalues_lie_in_their_spans_over_many_seeds(name):
    spectrum = BLOCKS[name].sort(descending=True).values
    positive = spectrum[spectrum > 1e-9]
    hits = dict.fromkeys(("rank", "median", "ninth", "next"), 0)
    for seed in range(300):  # 2100 over the seven spectra
        found = draw(BLOCKS[name], probes=3, steps=14, seed=seed)
        hits["rank"] += holds(ranked(found, 40), float(spectrum[39]), found.rounding)
        for key, q in (("median", 0.5), ("ninth", 0.9)):
            least = max(found.above(1e-9, confidence=0.99).least, 1)
            span = quantile(found, q, base=1e-9, least=least, confidence=0.96).span
            truth = float(positive[math.ceil(q * len(positive)) - 1])
            hits[key] += holds(span, truth, found.rounding)
        hits["next"] += holds(next_above(found, 1e-9), float(positive[-1]), found.rounding)
    assert min(hits.values()) / 300 >= 0.95 - 3.5 * math.sqrt(0.95 * 0.05 / 300), hits


@pytest.mark.parametrize("least", [3, 10, 40])
@pytest.mark.parametrize(("name", "steps"), [("low rank", 40), ("singular", 25)])
def test_the_span_of_a_quantile_ends_where_the_beta_law_says(name, steps, least):
    found = draw(BLOCKS[name], probes=6, steps=steps)
    span = quantile(found, 0.5, base=1e-3, least=least).span
    law = beta(6 * least / 4, 6 * least / 4)
    base_low, base_high = found.bracket(1e-3)

    def too_large(threshold):
        return law.sf(found.bracket(threshold)[0] / base_high) <= 0.025

    def too_small(threshold):
        return law.cdf(min(found.bracket(threshold)[1] / base_low, 1)) <= 0.025

    assert too_large(span.low * (1 - 1e-3)) or span.low == 1e-3
    assert not too_large(span.low * (1 + 1e-3))
    assert too_small(span.high * (1 + 1e-3))
    assert not too_small(span.high * (1 - 1e-3))


@pytest.mark.parametrize("confidence", [0.6, 0.95, 0.999])
def test_a_gap_ends_where_the_beta_law_allows_an_eigenvalue(confidence):
    found = draw(BLOCKS["even"], steps=20)
    law = beta(4 / 2, 4 * 99 / 2)
    most = found.bracket(1e-3)[1]

    def empty(threshold):
        return law.cdf(most - found.bracket(threshold)[0]) <= 1 - confidence

    low = next_above(found, 1e-3, confidence=confidence).low
    assert 1.1e-3 < low < 0.01
    assert empty(low * (1 - 1e-3))
    assert not empty(low * (1 + 1e-3))


def test_a_gap_never_reaches_past_an_eigenvalue_that_is_proven():
    found = draw(BLOCKS["low rank"], steps=40)
    gap = next_above(found, 0.5, confidence=0.01)
    assert (gap.low, gap.high) == (pytest.approx(1, abs=1e-3), pytest.approx(1, abs=1e-3))


def test_spans_close_in_on_what_is_resolved():
    found = draw(BLOCKS["outlier"], probes=10, steps=20)
    top, second = ranked(found, 1), ranked(found, 2)
    assert top.low > 9.99
    assert top.high < 10.01
    assert second.high < 10.01
    gap = next_above(found, 0.1, confidence=0.9999)
    assert (gap.low, gap.high) == (pytest.approx(1, rel=1e-3), pytest.approx(1, rel=1e-3))


def test_the_two_errors_of_a_quantile_shrink_each_by_its_own_remedy():
    def widths(probes, steps):
        found = quantile(draw(BLOCKS["even"], probes=probes, steps=steps), 0.5)
        spans = (found.probe, found.resolution, found.span)
        assert found.span.low <= found.value <= found.span.high
        return [span.high - span.low for span in spans]

    base, probes, steps = widths(2, 8), widths(32, 8), widths(2, 60)
    assert probes[0] < 0.4 * base[0]
    assert probes[1] > 0.7 * base[1]
    assert steps[1] < 0.4 * base[1]
    assert steps[0] > 0.6 * base[0]
    assert all(row[2] >= max(row[:2]) - 1e-3 for row in (base, probes, steps))


def test_nothing_is_claimed_of_what_the_runs_do_not_bound():
    found = draw(BLOCKS["singular"], probes=3, steps=3)
    assert quantile(found, 0.9, base=1e-9, least=1).span.low == 1e-9
    assert next_above(found, 1e-9).low == 1e-9
    assert next_above(found, 5.0).high == math.inf
    assert ranked(found, 100).low < 0
    # One probe may miss any eigenvector to rounding with a probability of 1e-7.
    alone = ranked(draw(BLOCKS["even"], probes=1), 1, confidence=1 - 1e-12)
    assert alone.high == math.inf


def test_slack_widens_by_what_products_may_have_moved():
    found = draw(BLOCKS["clustered"], steps=40)
    narrow, wide = next_above(found, 1.5), next_above(found, 1.5, slack=0.1)
    assert wide.low == pytest.approx(narrow.low - 0.1, abs=1e-3)
    assert wide.high == pytest.approx(narrow.high + 0.1, abs=1e-3)
    narrow, wide = (quantile(found, 0.9, slack=slack).span for slack in (0.0, 0.1))
    assert wide.low == pytest.approx(narrow.low - 0.1, abs=1e-3)
    assert wide.high == pytest.approx(narrow.high + 0.1, abs=1e-3)


# --- density -------------------------------------------------------------------------------------


def test_the_density_integrates_to_one_and_has_the_error_it_states():
    spectrum = BLOCKS["low rank"]
    grid = draw(spectrum, steps=40).grid(points=400, width=0.1)
    found = [draw(spectrum, steps=15, seed=seed).density(grid, 0.1) for seed in range(100)]
    assert float(torch.trapezoid(found[0].value, grid)) == pytest.approx(1, abs=1e-4)
    kernel = torch.exp(-0.5 * ((grid[:, None] - spectrum) / 0.1) ** 2)
    truth = kernel.mean(dim=1) / (0.1 * math.sqrt(2 * math.pi))
    values = torch.stack([density.value for density in found])
    bump = int(truth[grid > 0.6].argmax()) + int((grid <= 0.6).sum())
    scatter = float(values[:, bump].std())
    stated = float(torch.stack([density.stderr[bump] for density in found]).mean())
    assert stated == pytest.approx(scatter, rel=0.25)
    assert float(values[:, bump].mean()) == pytest.approx(float(truth[bump]), abs=4 * scatter / 10)


def test_a_width_must_be_positive():
    with pytest.raises(ValueError, match=r"width = 0; smooth with a positive one"):
        draw(BLOCKS["even"]).density(torch.zeros(1), 0)


# --- cost and arguments --------------------------------------------------------------------------


def test_products_are_counted_and_stop_ends_it_after_any_of_them():
    spectrum = BLOCKS["even"]
    done = []

    def product(vector):
        done.append(True)
        return spectrum * vector

    def found(last):
        done.clear()
        return stochastic_quadrature(
            product,
            len(spectrum),
            5,
            6,
            generator=generator(0, "quadrature"),
            stop=lambda: len(done) >= last,
        )

    assert (found(99).matvecs, len(found(99).runs)) == (30, 5)
    cut = found(9)
    assert (cut.matvecs, [run.diagonal.size for run in cut.runs]) == (9, [6, 3])
    assert sum(cut.share) == pytest.approx(1)
    assert found(0).matvecs == 1


@pytest.mark.parametrize("spectrum", [[-3.0], [0.0, 0.0], [1.0, 2.0]])
def test_tiny_and_zero_operators_have_counts_that_hold(spectrum):
    values = torch.tensor(spectrum, dtype=torch.float64)
    found = draw(values, probes=3, steps=60)
    for threshold in (-10.0, 1.5, 10.0):
        mass = found.above(threshold)
        assert mass.least <= int((values > threshold).sum()) <= mass.most
    assert bool(torch.isfinite(found.density(found.grid()).value).all())


def test_single_precision_states_its_own_floor_and_rounding():
    double, single = (
        draw(BLOCKS["low rank"], steps=40, dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    assert single.rounding > 1e7 * double.rounding
    assert single.floor > 100 * double.floor
    mass = single.above(0.5)
    assert mass.least <= 10 <= mass.most


@pytest.mark.parametrize(
    ("n", "probes", "steps", "message"),
    [
        (0, 1, 1, "n = 0, but an operator acts on at least one number"),
        (3, 0, 1, "probes = 0; a quadrature takes at least 1"),
        (3, 1, 0, "steps = 0; a quadrature takes at least 1"),
    ],
)
def test_counts_must_be_positive(n, probes, steps, message):
    with pytest.raises(ValueError, match=message):
        stochastic_quadrature(lambda v: v, n, probes, steps, generator=generator(0))


def test_questions_without_an_answer_are_refused():
    found = draw(BLOCKS["even"])
    with pytest.raises(ValueError, match=r"rank = 101 lies outside 1\.\.100"):
        ranked(found, 101)
    with pytest.raises(ValueError, match=r"fraction = 1 lies outside \(0, 1\)"):
        quantile(found, 1)
    with pytest.raises(ValueError, match="least = None; say how many eigenvalues exceed base"):
        quantile(found, 0.5, base=0.0)
    with pytest.raises(ValueError, match=r"confidence = 1 lies outside \(0, 1\)"):
        found.above(0.5, confidence=1)


def test_a_product_that_is_not_finite_is_refused():
    with pytest.raises(Breakdown, match="not finite"):
        stochastic_quadrature(lambda v: v / 0, 3, 1, 1, generator=generator(0))
