"""Losses on one process: values and gradients of the published implementation, precision, and refusals."""

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from cel_dist.errors import CelError
from cel_dist.losses import (
    EquilibriumLoss,
    angular_contrastive,
    angular_prototypical,
    ge2e,
    prototypical,
    uniformity,
)
from cel_dist.losses.exchange import Exchange

CASES = range(4)
SCALED = {"angular_prototypical": angular_prototypical, "angular_contrastive": angular_contrastive, "ge2e": ge2e}
SIMILARITIES = [*SCALED, "prototypical"]
PAIRS = ["pon", "apn", "an"]


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "golden" / "losses.npz") as archive:
        return dict(archive)


def assert_equal(actual: Tensor | None, expected: np.ndarray) -> None:
    assert actual is not None
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def random_rows(num_utterances: int = 7, num_views: int = 2, dim: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_utterances, num_views, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SCALED)
def test_scaled_similarities_equal_the_published_ones(golden: dict[str, np.ndarray], name: str, case: int) -> None:
    prefix = f"case{case}/{name}"
    if f"{prefix}/loss" not in golden:
        assert (name, case) == ("angular_contrastive", 3), "only A-Cont has no numbers for three views"
        return
    x = torch.tensor(golden[f"case{case}/x"], requires_grad=True)
    w, b = (torch.tensor(golden[f"{prefix}/param/{key}"]).reshape(1).requires_grad_() for key in "wb")
    loss = SCALED[name](x, w, b)
    loss.backward()
    assert_equal(loss, golden[f"{prefix}/loss"])
    assert_equal(x.grad, golden[f"{prefix}/grad"])
    assert_equal(w.grad, golden[f"{prefix}/param_grad/w"].reshape(1))
    assert_equal(b.grad, golden[f"{prefix}/param_grad/b"].reshape(1))


@pytest.mark.parametrize("case", CASES)
def test_prototypical_equals_the_published_one(golden: dict[str, np.ndarray], case: int) -> None:
    x = torch.tensor(golden[f"case{case}/x"], requires_grad=True)
    loss = prototypical(x)
    loss.backward()
    assert_equal(loss, golden[f"case{case}/prototypical/loss"])
    assert_equal(x.grad, golden[f"case{case}/prototypical/grad"])


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("t", [2.0, 3.5])
@pytest.mark.parametrize("pairs", ["PoN", "APN", "AN"])
def test_uniformity_equals_the_published_one(golden: dict[str, np.ndarray], pairs: str, t: float, case: int) -> None:
    prefix = f"case{case}/uniform/{pairs}/t{t:g}"
    x = torch.tensor(golden[f"case{case}/x"], requires_grad=True)
    loss = uniformity(x, t=t, pairs=pairs.lower())
    loss.backward()
    assert_equal(loss, golden[f"{prefix}/loss"])
    assert_equal(x.grad, golden[f"{prefix}/grad"])


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("pairs", PAIRS)
def test_equilibrium_is_the_weighted_sum_of_its_terms(similarity: str, pairs: str) -> None:
    x = random_rows().requires_grad_()
    loss = EquilibriumLoss(similarity, pairs, t=1.5, lambda_s=0.7, lambda_u=0.3)
    output = loss(x)
    scale = () if similarity == "prototypical" else (loss.w, loss.b)
    expected_similarity = {**SCALED, "prototypical": prototypical}[similarity](x, *scale)
    expected_uniformity = uniformity(x, t=1.5, pairs=pairs)
    expected = 0.7 * expected_similarity + 0.3 * expected_uniformity
    assert_equal(output.similarity, expected_similarity.detach().numpy())
    assert_equal(output.uniformity, expected_uniformity.detach().numpy())
    assert_equal(output.loss, expected.detach().numpy())
    (gradient,) = torch.autograd.grad(output.loss, x)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    assert_equal(gradient, expected_gradient.numpy())
    assert not any(metric.requires_grad for metric in output[1:])


def test_alignment_and_accuracy_are_those_of_the_embeddings() -> None:
    z = torch.nn.functional.normalize(random_rows(), dim=-1)
    output = EquilibriumLoss()(3.0 * z)
    assert_equal(output.alignment, (z[:, 0] - z[:, 1]).square().sum(-1).mean().numpy())
    right = [int((z[i, 0] @ z[:, 1].T).argmax()) == i for i in range(len(z))]
    assert 0 < np.mean(right) < 1, "the example must tell right from wrong"
    assert_equal(output.accuracy, np.mean(right))


def test_alignment_of_three_views_is_the_mean_over_the_pairs_of_views() -> None:
    z = torch.nn.functional.normalize(random_rows(num_views=3), dim=-1)
    distances = [(z[:, u] - z[:, v]).square().sum(-1).mean() for u, v in ((0, 1), (0, 2), (1, 2))]
    assert_equal(EquilibriumLoss()(z).alignment, torch.stack(distances).mean().numpy())


@pytest.mark.parametrize(("lambda_s", "lambda_u"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_term_of_weight_zero_is_reported_and_has_no_gradient(lambda_s: float, lambda_u: float) -> None:
    x = random_rows().requires_grad_()
    loss = EquilibriumLoss(lambda_s=lambda_s, lambda_u=lambda_u)
    output = loss(x)
    output.loss.backward()
    expected = angular_prototypical(x, loss.w, loss.b) if lambda_s else uniformity(x)
    (gradient,) = torch.autograd.grad(expected, x)
    assert_equal(x.grad, gradient.numpy())
    assert (loss.w.grad is None) == (lambda_s == 0)
    assert output.similarity != 0
    assert output.uniformity != 0


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_bf16_embeddings_are_computed_in_fp32_under_autocast(similarity: str) -> None:
    x = random_rows(num_utterances=32).bfloat16()
    loss = EquilibriumLoss(similarity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = loss(x)
        alone = uniformity(x)
    exact = EquilibriumLoss(similarity)(x.double())
    assert {value.dtype for value in output} == {torch.float32}
    np.testing.assert_allclose([v.item() for v in output], [v.item() for v in exact], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(float(alone), float(exact.uniformity), rtol=2e-6)


def test_losses_stay_finite_for_a_large_scale_and_a_high_temperature() -> None:
    x = random_rows(num_utterances=32).float().requires_grad_()
    loss = EquilibriumLoss("angular_contrastive", t=60.0)
    with torch.no_grad():
        loss.w.fill_(500.0)
    output = loss(x)
    output.loss.backward()
    assert torch.isfinite(torch.stack(output)).all()
    assert torch.isfinite(x.grad).all()


def test_scale_is_kept_positive_after_a_step() -> None:
    loss = EquilibriumLoss()
    with torch.no_grad():
        loss.w.fill_(-0.3)
        loss.b.fill_(-7.0)
    loss.clamp_scale()
    assert loss.w.item() == pytest.approx(1e-6)
    assert loss.w.requires_grad
    assert loss.b.item() == -7.0
    EquilibriumLoss("prototypical").clamp_scale()


def test_only_scaled_similarities_have_parameters() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in EquilibriumLoss("ge2e").named_parameters()}
    assert shapes == {"w": (1,), "b": (1,)}
    assert list(EquilibriumLoss("prototypical").parameters()) == []


def test_one_utterance_is_refused_by_every_loss() -> None:
    x, w, b = random_rows(num_utterances=1), torch.ones(1), torch.zeros(1)
    calls = [lambda: uniformity(x), lambda: prototypical(x), lambda: EquilibriumLoss()(x)]
    calls += [lambda loss=loss: loss(x, w, b) for loss in SCALED.values()]
    for call in calls:
        with pytest.raises(CelError, match="holds 1 utterance"):
            call()


def test_unsuitable_views_and_shapes_are_refused() -> None:
    with pytest.raises(CelError, match="has 1 view"):
        EquilibriumLoss()(random_rows(num_views=1))
    with pytest.raises(CelError, match="two views, not 3"):
        EquilibriumLoss("angular_contrastive")(random_rows(num_views=3))
    with pytest.raises(CelError, match=r"shape \[7, 16\]"):
        uniformity(random_rows()[:, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity": "angular"}, "unknown similarity loss 'angular'.*angular_prototypical"),
        ({"pairs": "all"}, "unknown pairs 'all'.*pon, apn, an"),
        ({"t": 0.0}, "temperature t .* is 0.0"),
        ({"lambda_u": -1.0}, "lambda_u is -1.0"),
        ({"lambda_s": float("nan")}, "lambda_s is nan"),
    ],
)
def test_unusable_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(CelError, match=message):
        EquilibriumLoss(**settings)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_hand_derived_gradients_are_those_of_finite_differences(similarity: str, pairs: str) -> None:
    x = random_rows(num_utterances=5, dim=4).requires_grad_()
    ids = torch.tensor([3, 1, 4, 1, 5])
    module = EquilibriumLoss(similarity, pairs, lambda_s=0.7, lambda_u=0.4).double()
    parameters = tuple(module.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: module(x, ids).loss, (x, *parameters))


def test_equal_ids_are_no_negatives() -> None:
    x = random_rows(num_utterances=4)
    ids = torch.tensor([1, 2, 3, 1])
    copied = x.clone()
    copied[3] = x[0]
    # A copy of an utterance would be its own hardest negative, and the nearest pair of all.
    masked, bare = EquilibriumLoss()(copied, ids), EquilibriumLoss()(copied)
    assert masked.similarity < bare.similarity
    assert masked.uniformity < bare.uniformity
    assert EquilibriumLoss()(x, torch.arange(4)).loss == EquilibriumLoss()(x).loss


@pytest.mark.parametrize(("matmul", "tolerance"), [("tf32", 1e-5), ("bf16", 2e-2)])
def test_coarser_products_move_the_loss_little_and_only_where_asked(matmul: str, tolerance: float) -> None:
    x = random_rows(num_utterances=64, dim=128).float().requires_grad_()
    exact, coarse = EquilibriumLoss()(x), EquilibriumLoss(matmul=matmul)(x)
    assert float(coarse.loss) == pytest.approx(float(exact.loss), rel=tolerance)
    # A CPU has no tf32, and its fp32 stands for it.
    assert (float(coarse.loss) == float(exact.loss)) == (matmul == "tf32")
    gradients = [torch.autograd.grad(output.loss, x)[0] for output in (exact, coarse)]
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < tolerance
    assert coarse.loss.dtype == torch.float32
    assert EquilibriumLoss(matmul=matmul)(x.double()).loss == EquilibriumLoss()(x.double()).loss


@pytest.mark.parametrize("matmul", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [8.0, 32.0, 200.0])
def test_prototypical_is_as_exact_for_long_embeddings_that_lie_close_together(length: float, matmul: str) -> None:
    x = (0.17 * random_rows(num_utterances=64, dim=64) + length / 8).float().requires_grad_()
    found = EquilibriumLoss("prototypical", lambda_u=0.0, matmul=matmul)(x).loss
    exact = x.detach().double().requires_grad_()
    wanted = oracle.similarity_loss(exact, None, torch.arange(64), "prototypical")
    (gradient,), (wanted_gradient,) = torch.autograd.grad(found, x), torch.autograd.grad(wanted, exact)
    assert found.dtype == gradient.dtype == torch.float32
    assert abs(float(found.detach()) - float(wanted.detach())) <= 2e-6 * float(wanted.detach())
    assert float((gradient - wanted_gradient).norm() / wanted_gradient.norm()) < 2e-6


def test_a_second_derivative_is_refused() -> None:
    x = random_rows().requires_grad_()
    with pytest.raises(CelError, match="no second derivative"):
        torch.autograd.grad(EquilibriumLoss()(x).loss, x, create_graph=True)


def test_one_sample_is_refused_where_fp32_cannot_count_its_pairs() -> None:
    # 4099 squared is not a number of fp32.
    x = random_rows(num_utterances=4099, dim=4).float()
    with pytest.raises(CelError, match="all 4099 utterances of the global batch are one sample"):
        EquilibriumLoss()(x, torch.zeros(4099, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_row_of_odd_length_brings_its_id(dtype: torch.dtype) -> None:
    rows, ids = torch.ones(1, 3, 5, dtype=dtype), torch.tensor([2**60 + 1])
    (block,) = Exchange(None, "ring").share(rows, ids)
    assert torch.equal(block.rows, rows)
    assert torch.equal(block.ids, ids)


def test_bad_ids_are_refused() -> None:
    with pytest.raises(CelError, match="give 7 of int64"):
        EquilibriumLoss()(random_rows(), torch.zeros(7))
    with pytest.raises(CelError, match=r"unknown exchange 'star'.*gather, ring, auto"):
        EquilibriumLoss(exchange="star")
    with pytest.raises(CelError, match=r"unknown precision 'fp8'.*fp32, tf32, bf16"):
        EquilibriumLoss(matmul="fp8")


@pytest.mark.parametrize(("value", "message"), [(float("inf"), "not finite"), (0.0, "length 0")])
def test_unusable_embeddings_are_named(value: float, message: str) -> None:
    x = random_rows()
    x[2, 1] = value
    with pytest.raises(CelError, match=f"rank 0 has embeddings .*{message}.* in 1 of 7 utterances; lower optim.lr"):
        EquilibriumLoss()(x)
