"""Real processes under gloo find what one process finds."""

import numpy as np
import pytest
import torch

import dense_oracle
import rank_program
import ranks
import sample_networks
from hessdiag import analyze, open_run

SIZES = (2, pytest.param(3, marks=pytest.mark.slow))


def test_three_ranks_multiply_as_one(tmp_path):
    exact = sample_networks.dense_hessian(sample_networks.make("tanh"))
    vector = rank_program.probe(len(exact))
    first, *others = ranks.run_program(3, tmp_path, CORE="1")
    error = float((first["product"] - exact @ vector).norm())
    assert error <= 1e-12 * float(exact.norm() * vector.norm())
    assert len(others) == 2
    assert all(torch.equal(first["product"], other["product"]) for other in others)
    assert len(first["rows"]) == 3
    assert max(first["rows"]) <= min(first["rows"]) + 1


@pytest.fixture(scope="module", params=SIZES)
def found(request, tmp_path_factory):
    """By rank; of two ranks the process group is the caller's own."""
    folder = tmp_path_factory.mktemp("ranks")
    own = {"OWN_GROUP": "1"} if request.param == 2 else {}
    return folder, ranks.run_program(request.param, folder, **own)


@pytest.fixture(scope="module")
def alone():
    """The run of one process."""
    return analyze(rank_program.ragged_task(), **rank_program.OPTIONS)


@pytest.mark.parametrize("name", rank_program.NETWORKS)
def test_products_of_ragged_data_are_the_dense_ones(found, name):
    exact = sample_networks.dense_hessian(sample_networks.make(name))
    vector = rank_program.probe(len(exact))
    for kind in ("product", "kept"):
        seen = found[1][0][name][kind]
        error = float((seen - exact @ vector).norm())
        assert error <= 1e-12 * float(exact.norm() * vector.norm())


@pytest.mark.parametrize("name", rank_program.NETWORKS)
def test_losses_and_gradients_are_those_of_one_process(found, name):
    case = sample_networks.make(name)
    with sample_networks.lent(case.task) as (objective, named):
        loss, gradient = objective.value(), objective.gradient(list(named.values()))
    first = found[1][0][name]
    assert first["loss"] == pytest.approx(loss, rel=1e-12)
    assert float((first["gradient"] - gradient).norm()) <= 1e-12 * float(gradient.norm())


@pytest.mark.parametrize("name", rank_program.NETWORKS)
def test_every_rank_has_the_same_bits(found, name):
    first, *others = (one[name] for one in found[1])
    for other in others:
        for kind in ("product", "kept", "noise", "gradient"):
            assert torch.equal(first[kind], other[kind])
        assert first["loss"] == other["loss"]


def test_the_noise_of_a_product_is_that_of_rounding(found):
    noise, product = (found[1][0]["tanh"][kind] for kind in ("noise", "product"))
    relative = float(noise.norm() / product.norm())
    assert 1e-18 < relative < 1e-13


def test_batches_are_cut_unless_rows_see_each_other(found):
    cut, whole = (found[1][0][name]["rows"] for name in ("tanh", "batchnorm train"))
    assert max(cut) <= min(cut) + 1
    assert max(whole) > min(whole) + 1


def test_a_long_vector_is_summed_as_a_short_one(found):
    size = len(found[1])
    assert found[1][0]["long"] == 100_000 * size * (size + 1) / 2


def test_a_part_that_raises_on_one_rank_raises_on_all(found):
    last = len(found[1]) - 1
    for one in found[1]:
        assert one["raised"] == f"this part is broken (on rank {last})"


def test_a_rank_that_diverges_is_an_error_that_names_it(found):
    last = len(found[1]) - 1
    for one in found[1]:
        assert f"what rank {last} multiplied differs" in one["diverged"]


def test_all_ranks_return_the_run_that_rank_0_stores(found):
    folder, outcomes = found
    stored = open_run(folder / "run.h5")
    assert outcomes[0]["run"] == stored.to_dict()
    for one in outcomes:
        assert one["again"] == stored.to_dict()
    assert not (folder / "run.h5.parts").exists()


def test_the_spectra_are_those_of_the_dense_hessian(found):
    task = rank_program.ragged_task()
    sizes = [len(batch[0]) for batch in task.data]
    _, _, matrix, index = dense_oracle.dense(task.model, task.data, task.loss, sizes)
    run = open_run(found[0] / "run.h5")
    for name in ("0", "2"):
        block = run[name]
        places = np.concatenate([index[parameter] for parameter in block.parameters])
        exact = np.linalg.eigvalsh(matrix[np.ix_(places, places)])
        top = block.variants["raw"]["lambda_max"]
        slack = 1e-12 * np.abs(exact).max()
        assert top.low - slack <= exact[-1] <= top.high + slack
        if len(places) <= rank_program.OPTIONS["exact_limit"]:
            seen = block.variants["raw"].spectrum["eigenvalue"]
            assert np.abs(seen - exact).max() <= slack


def test_every_number_is_that_of_one_process_to_rounding(found, alone):
    run = open_run(found[0] / "run.h5")
    for block in alone.blocks:
        for variant, result in block.variants.items():
            twin = run[block.name].variants[variant]
            scale = abs(result["lambda_max"].value)
            for field in ("lambda_max", "lambda_min", "trace", "frobenius"):
                mine, its = result[field], twin[field]
                assert mine.status == its.status
                assert its.value == pytest.approx(mine.value, rel=1e-12, abs=1e-12 * scale)
            assert result["products"] == twin["products"]
            assert result["method"] == twin["method"]


def test_the_provenance_tells_the_ranks_and_their_rows(found):
    record = found[1][0]["environment"]["distributed"]
    size = len(found[1])
    assert record["world_size"] == size
    assert record["backend"] == "gloo"
    assert sum(record["rows"]) == 11
    assert max(record["rows"]) - min(record["rows"]) <= 1
    assert len(record["batches"]) == size
    assert record["drifted_products"] == 0


def test_the_provenance_of_one_process_tells_of_no_ranks(alone):
    assert alone.provenance.environment["distributed"] is None


def test_the_mean_of_the_batches_means_would_be_far_off():
    """Or else the tests above would show nothing."""
    task = rank_program.ragged_task()
    sizes = [len(batch[0]) for batch in task.data]
    right = dense_oracle.dense(task.model, task.data, task.loss, sizes)[2]
    wrong = dense_oracle.dense(task.model, task.data, task.loss, [1, 1, 1])[2]
    assert np.linalg.norm(wrong - right) > 0.2 * np.linalg.norm(right)
