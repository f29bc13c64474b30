"""Every matrix-valued M on every kind of network: invertible, finite, and nothing left behind."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import pytest
import torch

from hessdiag.curvature.loan import bare
from hessdiag.variants.kfac import kfac
from hessdiag.variants.rotations import adadiag, adadiag2
from hessdiag.variants.scene import NotApplicable
from hessdiag.variants.shampoo import shampoo
from lent_scenes import dense, lent_scene, linear_task

MAKERS = {made.__name__: made for made in (shampoo, kfac, adadiag, adadiag2)}


def count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ["shampoo", "adadiag", "adadiag2"])
@pytest.mark.parametrize("empty", [(0, 3), (3, 0), (0,)])
def test_parameters_without_values_stand_by(name, empty):
    gradients = [[torch.randn(2, 2), torch.zeros(empty)] for _ in range(3)]
    with lent_scene(linear_task([(2, 2), empty], gradients)) as scene:
        both = MAKERS[name](scene)
    with lent_scene(linear_task([(2, 2)], [step[:1] for step in gradients])) as scene:
        alone = MAKERS[name](scene)
    torch.testing.assert_close(dense(both.coordinates), dense(alone.coordinates))
    assert both.off_diagonality == alone.off_diagonality


@pytest.mark.parametrize("name", MAKERS)
def test_p_of_the_whole_network_is_finite_and_invertible(name, case):
    model = bare(case.model)
    with lent_scene(case.task, case.trainable) as scene:
        states, hooks = [value.clone() for value in model.state_dict().values()], count(model)
        made = None
        with suppress(NotApplicable) if name == "kfac" else nullcontext():
            made = MAKERS[name](scene).coordinates
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert count(model) == hooks
        if case.mode == "eval":
            assert all(map(torch.equal, states, model.state_dict().values()))
        if made is None:  # every Linear layer there is tied, or unused
            assert {"embed.weight", "unused.weight"} & set(scene.block.parameters)
            return
        p, eye = dense(made), torch.eye(scene.block.size, dtype=torch.float64)
    assert p.isfinite().all()
    torch.testing.assert_close(made.transposed(eye), p)
    torch.testing.assert_close(made.inverse(p.T), eye, atol=1e-8, rtol=0)
