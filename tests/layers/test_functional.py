"""The maths on tensors, against the oracle and by its properties."""

import oracle
import pytest
import torch

from perfusion_pytorch import (
    apply_rank1_edit,
    concept_dual,
    concept_similarity,
    overlap_condition,
    rank1_update,
    split_concepts,
)

DIMS = [(4, 3), (16, 24), (48, 32)]


def case(covariance, d, o, concepts, tokens=5, dtype=torch.float64):
    """Return (e, W, C, i*, duals, o*, β, τ)."""
    c = covariance(d)
    text_enc = torch.randn(3, tokens, d, dtype=dtype)
    weight = torch.randn(o, d, dtype=dtype)
    concept_input = torch.randn(concepts, d, dtype=dtype)
    concept_output = torch.randn(concepts, o, dtype=dtype)
    text_enc[:, 0] = concept_input[0] * 1.1 + 0.1 * text_enc[:, 0]
    beta = torch.rand(concepts, dtype=dtype)
    temperature = torch.rand(concepts, dtype=dtype) + 0.1
    dual = concept_dual(concept_input, torch.linalg.inv(c).to(dtype))
    return text_enc, weight, c, concept_input, dual, concept_output, beta, temperature


def edited(text_enc, weight, covariance, concept_input, dual, concept_output, beta, temperature):
    return apply_rank1_edit(text_enc, weight, concept_input, dual, concept_output, beta, temperature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("concepts", [1, 2, 3])
@pytest.mark.parametrize("d, o", DIMS)
def test_edit_meets_the_oracle(covariance, assert_near, d, o, concepts, tokens, dtype):
    e, w, c, i, dual, out, beta, tau = case(covariance, d, o, concepts, tokens, dtype)
    assert_near(edited(e, w, c, i, dual, out, beta, tau), oracle.edit_of_many(e, w, c, i, out, beta, tau))


@pytest.mark.parametrize("d, o", DIMS)
def test_one_concept_meets_equation_3(covariance, assert_near, d, o):
    e, w, c, i, dual, out, beta, tau = case(covariance, d, o, 1)
    assert_near(
        edited(e, w, c, i, dual, out, beta, tau), oracle.edit_of_one(e, w, c, i[0], out[0], beta[0], tau[0])
    )


def test_similarity_meets_the_oracle_and_is_one_at_the_concept(covariance, assert_near):
    e, _, c, i, dual, *_ = case(covariance, 16, 8, 2)
    expected = [[[oracle.similarity(token, concept, c) for concept in i] for token in row] for row in e]
    assert_near(concept_similarity(e, dual), torch.tensor(expected, dtype=torch.float64))
    assert_near(concept_similarity(i[None], dual)[0].diagonal(), torch.ones(2))


@pytest.mark.parametrize("concepts", [1, 3])
def test_rank1_update_meets_the_oracle(covariance, assert_near, concepts):
    _, w, c, i, dual, out, *_ = case(covariance, 16, 8, concepts)
    updated = rank1_update(w, i, dual, out)
    assert_near(updated, oracle.rome_update(w, c, i, out))
    assert_near(i @ updated.T, out)


def test_rank1_update_is_the_edit_with_an_open_gate(covariance, assert_near):
    e, w, _c, i, dual, out, *_ = case(covariance, 16, 8, 2)
    overlap = dual @ i.T
    ungated = torch.linalg.solve(overlap, concept_similarity(e, dual).mT).mT @ out
    closed = apply_rank1_edit(e, w, i, dual, out, beta=1e6, temperature=1.0)
    assert_near(e @ rank1_update(w, i, dual, out).T, closed + ungated)


def test_rank1_update_keeps_the_dtype_of_the_weight(covariance):
    _, w, _, i, dual, out, *_ = case(covariance, 8, 4, 2, dtype=torch.float32)
    assert rank1_update(w.half(), i, dual, out).dtype == torch.float16


def test_at_the_concept_the_output_is_its_gated_output(covariance, assert_near):
    _, w, c, i, dual, out, beta, tau = case(covariance, 16, 8, 1)
    assert_near(
        edited(i[None], w, c, i, dual, out, beta, tau)[0], torch.sigmoid((1 - beta) / tau).unsqueeze(1) * out
    )


def test_scaling_the_covariance_changes_nothing(covariance, assert_near):
    e, w, c, i, dual, out, beta, tau = case(covariance, 16, 8, 2)
    scaled = concept_dual(i, torch.linalg.inv(c * 37.5))
    assert_near(scaled, dual)
    assert_near(edited(e, w, c, i, scaled, out, beta, tau), edited(e, w, c, i, dual, out, beta, tau))


def test_residual_is_orthogonal_to_every_concept_under_the_metric(covariance):
    """The covariance enters the joint projection: an earlier implementation left the metric out."""
    e, _, c, i, dual, *_ = case(covariance, 16, 16, 3)
    identity = torch.eye(16, dtype=torch.float64)
    silent = torch.zeros(3, 16, dtype=torch.float64)
    residual = edited(e, identity, c, i, dual, silent, 0.5, 1.0)
    products = torch.stack(
        [oracle.inner(concept, token, c) for token in residual.flatten(0, 1) for concept in i]
    )
    before = torch.stack([oracle.inner(concept, token, c) for token in e.flatten(0, 1) for concept in i])
    assert products.abs().max() < 1e-11 * before.abs().max()
    assert (residual @ i.T).abs().max() > 1e-2  # under the plain inner product they are not orthogonal


def test_nearly_parallel_concepts_are_removed_together(covariance, assert_near):
    """Subtracting each concept on its own removes the shared part twice, so its sign turns."""
    e, w, c, i, _, out, beta, tau = case(covariance, 16, 8, 2)
    i[1] = i[0] + 1e-2 * i[1]
    dual = concept_dual(i, torch.linalg.inv(c))
    actual = edited(e, w, c, i, dual, out, beta, tau)
    assert_near(actual, oracle.edit_of_many(e, w, c, i, out, beta, tau))
    plain = e @ w.T
    one_by_one = plain + sum(
        apply_rank1_edit(e, w, i[j : j + 1], dual[j : j + 1], out[j : j + 1], beta[j : j + 1], tau[j : j + 1])
        - plain
        for j in range(2)
    )
    assert (one_by_one - actual).abs().max() > 0.1 * actual.abs().max()


def test_one_concept_through_the_joint_path_equals_the_single_path(covariance, assert_near):
    """A second, inactive concept takes the solve's path and leaves the first alone."""
    e, w, _, i, dual, out, beta, tau = case(covariance, 16, 8, 2)
    joint = apply_rank1_edit(e, w, i, dual, out, beta, tau, active=torch.tensor([True, False]))
    assert_near(joint, apply_rank1_edit(e, w, i[:1], dual[:1], out[:1], beta[:1], tau[:1]))


def test_active_chooses_concepts_row_by_row(covariance, assert_near):
    e, w, _, i, dual, out, beta, tau = case(covariance, 16, 8, 3)
    active = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
    rows = [t.expand(3, -1, -1) for t in (i, dual, out)]
    actual = apply_rank1_edit(e, w, *rows, beta, tau, active=active)
    for row, chosen in enumerate(active):
        expected = apply_rank1_edit(
            e[row : row + 1], w, i[chosen], dual[chosen], out[chosen], beta[chosen], tau[chosen]
        )
        assert_near(actual[row : row + 1], expected)


def test_inputs_of_each_row_equal_a_loop_over_rows(covariance, assert_near):
    e, w, c, i, *_ = case(covariance, 16, 8, 3)
    out = torch.randn(3, 8, dtype=torch.float64)
    dual = concept_dual(i, torch.linalg.inv(c))
    actual = apply_rank1_edit(e, w, i[:, None], dual[:, None], out[:, None], 0.7, 0.2)
    for row in range(3):
        assert_near(
            actual[row],
            apply_rank1_edit(e[row], w, i[row : row + 1], dual[row : row + 1], out[row : row + 1], 0.7, 0.2),
        )


def test_permuting_batch_or_concepts_permutes_the_output(covariance, assert_near):
    e, w, _, i, dual, out, beta, tau = case(covariance, 16, 8, 3)
    order = torch.tensor([2, 0, 1])
    delta = apply_rank1_edit(e, w, i, dual, out, beta, tau)
    assert_near(apply_rank1_edit(e[order], w, i, dual, out, beta, tau), delta[order])
    assert_near(apply_rank1_edit(e, w, i[order], dual[order], out[order], beta[order], tau[order]), delta)


def test_the_rest_is_the_oracles_and_holds_nothing_of_the_concepts(covariance, assert_near):
    e, _, c, i, dual, _, beta, tau = case(covariance, 16, 8, 2)
    rest, gate = split_concepts(e, i, dual, beta, tau)
    assert_near(
        rest, e - torch.stack([torch.stack([oracle.part_in_span(token, i, c) for token in row]) for row in e])
    )
    assert gate.shape == (3, 5, 2)
    assert concept_similarity(rest, dual).abs().max() < 1e-12


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.999])
def test_overlap_condition_is_that_of_the_cosines(covariance, assert_near, cosine):
    """Two concepts of any lengths at a known angle under the metric."""
    c = covariance(8)
    a = torch.linalg.cholesky(c)
    basis, _ = torch.linalg.qr(torch.randn(8, 2, dtype=torch.float64))
    i = (
        torch.stack([3 * basis[:, 0], 0.1 * (cosine * basis[:, 0] + (1 - cosine**2) ** 0.5 * basis[:, 1])])
        @ a.T
    )
    condition = overlap_condition(i, concept_dual(i, torch.linalg.inv(c)))
    assert condition == pytest.approx((1 + cosine) / (1 - cosine), rel=1e-6)


@pytest.mark.parametrize("concepts", [1, 2])
def test_gradients_of_the_edit(covariance, concepts):
    e, w, c, i, _, out, beta, tau = case(covariance, 4, 3, concepts, tokens=2)
    inverse = torch.linalg.inv(c)

    def edit(e, i, out, beta, tau):
        return apply_rank1_edit(e, w, i, concept_dual(i, inverse), out, beta, tau, active=None)

    assert torch.autograd.gradcheck(edit, [t.requires_grad_() for t in (e[:1].clone(), i, out, beta, tau)])


def test_gradients_of_the_edit_with_inactive_concepts(covariance):
    e, w, _, i, dual, out, beta, tau = case(covariance, 4, 3, 2, tokens=2)
    active = torch.tensor([True, False])

    def edit(e, i, dual, out):
        return apply_rank1_edit(e, w, i, dual, out, beta, tau, active)

    assert torch.autograd.gradcheck(edit, [t.requires_grad_() for t in (e[:1].clone(), i, dual, out)])


def test_gradients_of_the_update(covariance):
    _, w, c, i, _, out, *_ = case(covariance, 4, 3, 2)
    inverse = torch.linalg.inv(c)
    assert torch.autograd.gradcheck(
        lambda w, i, out: rank1_update(w, i, concept_dual(i, inverse), out),
        [t.requires_grad_() for t in (w, i, out)],
    )


def test_a_number_as_gate_bias_is_as_exact_with_inactive_rows_as_without(covariance):
    e = torch.randn(2, 3, 4, dtype=torch.float64)
    i = torch.randn(1, 1, 4, dtype=torch.float64).expand(2, 1, 4)
    dual = concept_dual(i, torch.eye(4, dtype=torch.float64))
    _, gate = split_concepts(e, i, dual, 0.7, 0.1, torch.tensor([[False], [True]]))
    _, expected = split_concepts(e, i, dual, 0.7, 0.1)
    assert torch.equal(gate[1], expected[1]) and not gate[0].any()
