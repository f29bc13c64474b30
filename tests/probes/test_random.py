from __future__ import annotations

import pytest
import torch

from hessdiag_probes import gaussian, generator, rademacher, sphere

DRAWS = [gaussian, rademacher, sphere]


@pytest.mark.parametrize("draw", DRAWS)
def test_one_seed_is_one_vector_in_every_dtype(draw):
    double = draw(50, generator=generator(3, "a"))
    single = draw(50, generator=generator(3, "a"), dtype=torch.float32)
    assert single.dtype == torch.float32
    assert torch.equal(double.float(), single)


@pytest.mark.gpu
@pytest.mark.parametrize("draw", DRAWS)
def test_one_seed_is_one_vector_on_every_device(draw):
    there = draw(50, generator=generator(3, "a"), device="cuda")
    assert torch.equal(there.cpu(), draw(50, generator=generator(3, "a")))


def test_seeds_and_labels_each_change_the_draw():
    keys = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "b", "a"), (-1,)]
    first = [float(gaussian(1, generator=generator(*key))) for key in keys]
    assert len(set(first)) == len(keys)


def test_a_draw_is_pinned_across_sessions():
    assert generator(0, "layer", "start").initial_seed() == 1004427552605946532


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    for draw in DRAWS:
        draw(50, generator=generator(3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_distributions_are_what_they_say():
    n = 40_000
    normal = gaussian(n, generator=generator(1))
    signs = rademacher(n, generator=generator(1))
    five = 5 / n**0.5  # five standard errors of a mean of unit variance
    assert abs(float(normal.mean())) < five
    assert abs(float(normal.square().mean()) - 1) < 5 * (2 / n) ** 0.5
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < five
    assert float(torch.linalg.vector_norm(sphere(n, generator=generator(1)))) == pytest.approx(1)
