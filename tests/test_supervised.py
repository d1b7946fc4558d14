"""Supervised losses on one process: numbers of the published implementation, hand-computed ones, and refusals."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cel_dist.errors import CelError
from cel_dist.losses import uniformity
from cel_dist.losses.batch import EmbeddingsError
from cel_dist.losses.supervised import AdaCos, ArcFace, ClassificationHead, CosFace, Softmax, SupervisedLoss

HEADS: dict[str, type[ClassificationHead]] = {
    "softmax": Softmax,
    "cosface_m0.2_s30": CosFace,
    "arcface_m0.2_s30": ArcFace,
    "adacos": AdaCos,
}
DIM, CLASSES = 16, 5


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "golden" / "losses.npz") as archive:
        return dict(archive)


def rows(num_rows: int = 12, *views: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, *views, DIM, generator=generator, dtype=torch.float64).requires_grad_()


def labels(num_rows: int = 12) -> Tensor:
    return torch.arange(num_rows) * 7 % CLASSES


def assert_close(actual: Tensor | None, expected: Any, tolerance: float = 1e-12) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected).detach(), rtol=tolerance, atol=tolerance)


def cosines(x: Tensor, weight: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) @ F.normalize(weight.reshape(-1, weight.shape[-1]), dim=-1).T


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("name", HEADS)
def test_heads_equal_the_published_ones(golden: dict[str, np.ndarray], name: str, case: int, sharded: bool) -> None:
    prefix = f"cls{case}/{name}"
    parameter = {"softmax": "fc.weight", "arcface_m0.2_s30": "weight"}.get(name, "W")
    weight, gradient = (torch.tensor(golden[f"{prefix}/{kind}/{parameter}"]) for kind in ("param", "param_grad"))
    if name == "cosface_m0.2_s30":
        weight, gradient = weight.T, gradient.T
    weights = {"weight": weight}
    if name == "softmax":
        weights["bias"] = torch.tensor(golden[f"{prefix}/param/fc.bias"])
    head = HEADS[name](weight.shape[1], len(weight), sharded=sharded).double()
    head.load_class_weights(weights, torch.arange(len(weight)))
    if isinstance(head, AdaCos):
        # The published scale is a number of Python, the buffer was fp32 before.
        assert float(head.scale) == pytest.approx(math.sqrt(2) * math.log(len(weight) - 1), rel=1e-7)
        head.scale.fill_(math.sqrt(2) * math.log(len(weight) - 1))
    x = torch.tensor(golden[f"cls{case}/x"], requires_grad=True)
    output = head(x, torch.tensor(golden[f"cls{case}/label"]))
    output.loss.backward()
    assert_close(output.loss, golden[f"{prefix}/loss"], 1e-9)
    assert_close(x.grad, golden[f"{prefix}/grad"], 1e-9)
    assert_close(head.weight.grad, gradient, 1e-9)
    if head.bias is not None:
        assert_close(head.bias.grad, golden[f"{prefix}/param_grad/fc.bias"], 1e-9)
    if isinstance(head, AdaCos):
        assert_close(head.scale, golden[f"{prefix}/scale_after"].reshape(1), 1e-9)


@pytest.mark.parametrize("head", [CosFace, ArcFace])
def test_the_nearest_of_several_centres_counts(head: type[ClassificationHead]) -> None:
    found = head(DIM, CLASSES, margin=0.3, scale=7.0, sub_centres=3, seed=1).double()
    x, y = rows(), labels()
    found(x, y).loss.backward()
    weight = found.weight.detach().clone().requires_grad_()
    own = x.detach().clone().requires_grad_()
    near = cosines(own, weight).view(-1, CLASSES, 3).amax(dim=2)
    right = near.gather(1, y[:, None])
    shifted = right - np.float32(0.3) if head is CosFace else torch.cos(right.acos() + 0.3)
    F.cross_entropy(7.0 * near.scatter(1, y[:, None], shifted), y).backward()
    assert_close(x.grad, own.grad)
    assert_close(found.weight.grad, weight.grad)
    assert ((weight.grad != 0).any(dim=2).sum(dim=1) > 1).any(), "the example must use several centres of a class"


@pytest.mark.parametrize("head", [CosFace, ArcFace])
def test_without_margin_there_is_only_a_scale_and_it_may_come_later(head: type[ClassificationHead]) -> None:
    found = head(DIM, CLASSES, margin=0.4, scale=3.0, seed=1).double()
    x, y = rows(), labels()
    with_margin = found(x, y)
    found.margin = 0.0
    scores = cosines(x, found.weight)
    plain = found(x, y)
    assert_close(plain.loss, F.cross_entropy(3.0 * scores, y))
    assert with_margin.loss > plain.loss + 0.1
    assert plain.accuracy == with_margin.accuracy
    assert_close(plain.accuracy, (scores.argmax(dim=1) == y).double().mean())


def test_arcface_goes_on_where_the_angle_would_pass_pi() -> None:
    # Embeddings on a circle, at angles to the right class below and above pi - m, and at 0 and pi themselves.
    margin, scale = 0.5, 2.0
    angles = torch.tensor([0.0, 1.0, math.pi - 0.51, math.pi - 0.49, math.pi - 1e-4, math.pi], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()
    head = ArcFace(2, 2, margin=margin, scale=scale).double()
    head.load_class_weights({"weight": torch.eye(2).double()}, torch.arange(2))
    losses, slopes = [], []
    for angle in angles.tolist():
        beyond = angle > math.pi - margin
        right = math.cos(angle) - margin * math.sin(margin) if beyond else math.cos(angle + margin)
        wrong = math.exp(scale * (math.sin(angle) - right))
        at_angle = -math.sin(angle) if beyond else -math.sin(angle + margin)
        losses.append(math.log1p(wrong))
        slopes.append(scale * wrong / (1 + wrong) * (math.cos(angle) - at_angle))
    found = [head(row[None], torch.tensor([0])).loss for row in x]
    assert_close(torch.stack(found), torch.tensor(losses, dtype=torch.float64))
    torch.stack(found).sum().backward()
    assert x.grad is not None
    tangents = torch.stack([-angles.sin(), angles.cos()], dim=1)
    # At 0 itself the way around is as long on both sides: the cosine has no derivative there.
    assert_close((x.grad * tangents).sum(dim=1)[1:], torch.tensor(slopes, dtype=torch.float64)[1:], 1e-9)
    assert x.grad.isfinite().all()


def test_the_scale_of_adacos_follows_the_batch_in_training_only() -> None:
    head = AdaCos(DIM, CLASSES, seed=1)
    y = labels()
    # Near enough to the right class for the angle to count, which is cut at pi / 4.
    x = (F.normalize(head.weight[y], dim=-1) + 0.1 * rows()).detach()
    first = float(head.scale)
    head.eval()
    head(x, y)
    assert float(head.scale) == first
    head.train()
    scores = cosines(x, head.weight.detach().double()).detach()
    right = scores.gather(1, y[:, None]).squeeze(1)
    mean = ((first * scores).exp().sum(dim=1) - (first * right).exp()).mean()
    median = right.sort(descending=True).values[(len(y) - 1) // 2].acos()
    assert 0.2 < median < 0.7
    expected = float(mean.log() / median.cos())
    loss = head(x, y).loss
    assert abs(expected - first) > 0.1
    assert float(head.scale) == pytest.approx(expected, rel=1e-6)
    assert_close(loss, F.cross_entropy(expected * scores, y), 1e-6)
    other = AdaCos(DIM, CLASSES)
    other.load_state_dict(head.state_dict())
    assert other.scale == head.scale


def test_the_scale_of_adacos_never_leaves_the_positive_numbers() -> None:
    head = AdaCos(2, 3)
    head.load_class_weights({"weight": torch.tensor([[1.0, 0], [-1, 0.1], [-1, -0.1]])}, torch.arange(3))
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    scales = []
    for _ in range(4):
        assert head(x, y).loss.isfinite()
        scales.append(float(head.scale))
    assert min(scales) == pytest.approx(1e-6)
    assert max(scales) > 0.5


def test_softmax_and_adacos_take_a_margin_and_a_scale_too() -> None:
    x, y = rows(), labels()
    right = F.one_hot(y, CLASSES)
    softmax = Softmax(DIM, CLASSES, margin=0.5, scale=3.0, seed=1).double()
    logits = 3.0 * (x @ softmax.weight.T + softmax.bias - 0.5 * right)
    assert_close(softmax(x, y).loss, F.cross_entropy(logits, y))
    adacos = AdaCos(DIM, CLASSES, margin=0.5, scale=4.0, seed=1).double().eval()
    assert_close(adacos(x, y).loss, F.cross_entropy(4.0 * (cosines(x, adacos.weight) - 0.5 * right), y))
    adacos.train()(x, y)
    assert float(adacos.scale) != 4.0


def test_all_views_of_a_row_are_of_its_class() -> None:
    head = CosFace(DIM, CLASSES, seed=1).double()
    x = rows(6, 3)
    flat = x.flatten(0, 1)
    y = labels(6)
    for one, other in zip(head(x, y)[:2], head(flat, y.repeat_interleave(3))[:2], strict=True):
        assert_close(one, other)


def test_bf16_embeddings_are_computed_in_fp32_under_autocast() -> None:
    head = ArcFace(DIM, CLASSES, seed=1)
    x = rows().detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(x, labels())
    assert output.loss.dtype == torch.float32
    assert_close(output.loss.double(), head.double()(x.double(), labels()).loss, 1e-6)


@pytest.mark.parametrize("head", [Softmax, ArcFace])
def test_products_are_as_exact_as_asked_for(head: type[ClassificationHead]) -> None:
    x = rows().detach().float()
    exact, rough = (head(DIM, CLASSES, seed=1, matmul=matmul)(x, labels()).loss.detach() for matmul in ("fp32", "bf16"))
    assert 1e-6 < abs(float(exact - rough)) < 0.1


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first, again = (ArcFace(DIM, CLASSES, seed=3).class_weights()["weight"] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, ArcFace(DIM, CLASSES, seed=4).class_weights()["weight"])
    torch.manual_seed(5)
    drawn = ArcFace(DIM, CLASSES).weight
    assert not torch.equal(drawn, ArcFace(DIM, CLASSES).weight)
    torch.manual_seed(5)
    assert torch.equal(drawn, ArcFace(DIM, CLASSES, sharded=True).weight)
    # More than one block is drawn, and none like another.
    many = ArcFace(DIM, 2500, seed=3).weight.detach()
    assert len(many) == 2500
    assert len(many[:, 0].unique()) > 2400
    assert float(many.std()) == pytest.approx(math.sqrt(2 / (2500 + DIM)), rel=0.05)


@pytest.mark.parametrize("sharded", [False, True])
def test_some_classes_are_taken_over(sharded: bool) -> None:
    head = Softmax(DIM, CLASSES, sharded=sharded)
    before = head.class_weights()
    taken = {"weight": torch.full((2, DIM), 7.0), "bias": torch.tensor([8.0, 9.0])}
    head.load_class_weights(taken, torch.tensor([3, 1]))
    after = head.class_weights()
    assert (after["weight"][[3, 1]] == 7).all()
    assert after["bias"][[3, 1]].tolist() == [8, 9]
    for name in before:
        assert torch.equal(after[name][[0, 2, 4]], before[name][[0, 2, 4]])


def test_sharded_weights_are_no_parameters_and_move_with_the_module() -> None:
    head = Softmax(DIM, CLASSES, sharded=True)
    assert not list(head.parameters()) + list(head.buffers())
    assert not head.state_dict()
    held = head.sharded_parameters()
    head.double()
    assert {name: tensor.dtype for name, tensor in held.items()} == {"weight": torch.float64, "bias": torch.float64}
    head(rows(), labels()).loss.backward()
    assert held["weight"].grad is not None
    head.float()
    assert held["weight"].grad.dtype == torch.float32
    assert not Softmax(DIM, CLASSES).sharded_parameters()


@pytest.mark.parametrize("number", [0, 1])
def test_what_needs_no_gradient_gets_none(number: int) -> None:
    head = ArcFace(DIM, CLASSES, seed=1).double()
    x = rows()
    whole = torch.autograd.grad(head(x, labels()).loss, [x, head.weight])
    inputs = [x, head.weight]
    inputs[number].requires_grad_(False)
    head(x, labels()).loss.backward()
    assert inputs[number].grad is None
    assert_close(inputs[1 - number].grad, whole[1 - number])
    with torch.no_grad():
        assert not head(x, labels()).loss.requires_grad


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("value", "message"), [(math.nan, "not finite"), (0.0, "length 0")])
def test_unusable_embeddings_are_refused_or_make_a_loss_that_is_no_number(
    value: float, message: str, sharded: bool
) -> None:
    x = rows().detach()
    x[3] = value
    head = AdaCos(DIM, CLASSES, sharded=sharded).double()
    before = float(head.scale)
    with pytest.raises(EmbeddingsError, match=f"rank 0 has embeddings .*{message}.* in 1 of 12 utterances"):
        head(x, labels())
    assert float(head.scale) == before
    loss = SupervisedLoss(head, skip_unusable=True)
    x = x[:, None].requires_grad_()
    output = loss(x, labels())
    output.loss.backward()
    assert output.loss.isnan()
    assert all(message in str(found.error()) for found in loss.findings)
    with torch.no_grad():
        # It followed the batch; whoever skips a step puts the buffers back.
        head.scale.fill_(before)
    loss(rows(12, 1), labels())
    assert all(found.error() is None for found in loss.findings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda head: head(rows()[:, :4], labels()), r"shape \[12, 1, 4\]; give \[utterances, 16\]"),
        (lambda head: head(rows(), labels()[:3]), r"labels have shape \[3\] .*; give 12 of int64"),
        (lambda head: head(rows(), labels().int()), r"type torch.int32; give 12 of int64"),
        (lambda head: head(rows(), labels() + 1), r"rank 0 has labels that are not in 0\.\.4"),
        (lambda head: head(rows(), labels() - 1), r"rank 0 has labels that are not in 0\.\.4"),
        (lambda head: head.load_class_weights({}, torch.arange(2)), "this head has weight"),
        (
            lambda head: head.load_class_weights({"weight": torch.ones(2, 1, DIM)}, torch.arange(2)),
            r"weight of 2 classes has shape \[2, 1, 16\]; this head takes \[2, 16\]",
        ),
        (
            lambda head: head.load_class_weights({"weight": torch.ones(2, DIM)}, torch.tensor([4, 5])),
            "classes 4 to 5 are given; the head has 5",
        ),
        (
            lambda head: head.load_class_weights({"weight": torch.ones(2, DIM)}, torch.tensor([4, 4])),
            "class of the head is given twice",
        ),
        (lambda head: setattr(head, "margin", -0.1), "margin of the head is -0.1; give a number of at least 0"),
        (lambda head: ArcFace(DIM, CLASSES, margin=1.6), r"margin of the head is 1.6; .* below 1.57"),
        (lambda head: ArcFace(DIM, CLASSES, scale=0.0), "scale of the head is 0.0"),
        (lambda head: ArcFace(DIM, 1), "classes of the head is 1; give at least 2"),
        (lambda head: ArcFace(DIM, CLASSES, sub_centres=0), "sub_centres of the head is 0"),
        (lambda head: ArcFace(DIM, CLASSES, seed=-1), "seed of the head is -1"),
        (lambda head: AdaCos(DIM, 2), "AdaCos has 2 classes"),
        (lambda head: AdaCos(DIM, 5, scale=0.0), "the scale of the head is 0.0"),
        (lambda head: SupervisedLoss(head, lambda_u=-1.0), "lambda_u is -1.0"),
        (lambda head: SupervisedLoss(head, pairs="all"), "unknown pairs 'all'"),
        (lambda head: SupervisedLoss(head)(rows(12, 1), labels() * 0), "are one sample"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    with pytest.raises(CelError, match=message):
        call(ArcFace(DIM, CLASSES))


def test_there_is_no_second_derivative() -> None:
    x = rows()
    loss = ArcFace(DIM, CLASSES).double()(x, labels()).loss
    with pytest.raises(CelError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("views", [1, 3])
def test_the_supervised_loss_is_the_weighted_sum_of_its_terms(views: int) -> None:
    head = ArcFace(DIM, CLASSES, seed=1).double()
    loss = SupervisedLoss(head, "pon", t=1.5, lambda_s=0.7, lambda_u=0.3)
    # As many speakers as rows, so that no pair is left out.
    x, y = rows(5, views), torch.randperm(5)
    output = loss(x, y)
    classified, spread = head(x, y), uniformity(x, t=1.5)
    assert_close(output.loss, 0.7 * classified.loss + 0.3 * spread)
    assert_close(output.similarity, classified.loss)
    assert_close(output.uniformity, spread)
    assert_close(output.accuracy, classified.accuracy)
    z = F.normalize(x, dim=-1).detach()
    squares = [(z[:, u] - z[:, v]).square().sum(dim=-1).mean() for u in range(views) for v in range(u)]
    assert_close(output.alignment, sum(squares) / len(squares) if squares else 0.0 * z.sum())
    gradients = torch.autograd.grad(output.loss, [x, head.weight])
    expected = torch.autograd.grad(0.7 * classified.loss + 0.3 * spread, [x, head.weight])
    for one, other in zip(gradients, expected, strict=True):
        assert_close(one, other)
    assert not any(value.requires_grad for value in output[1:])
    loss.clamp_scale()


@pytest.mark.parametrize(("lambda_s", "lambda_u"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_term_of_weight_zero_is_reported_and_has_no_gradient(lambda_s: float, lambda_u: float) -> None:
    head = ArcFace(DIM, CLASSES, seed=1).double()
    x, y = rows(5, 2), torch.arange(5)
    output = SupervisedLoss(head, lambda_s=lambda_s, lambda_u=lambda_u)(x, y)
    output.loss.backward()
    (expected,) = torch.autograd.grad(head(x, y).loss if lambda_s else uniformity(x), x)
    assert_close(x.grad, expected)
    assert (head.weight.grad is None) == (lambda_s == 0)
    assert output.similarity != 0
    assert output.uniformity != 0


def test_segments_of_one_speaker_are_no_negatives_of_each_other() -> None:
    x = rows(4, 1)
    y = torch.tensor([0, 0, 1, 2])
    output = SupervisedLoss(ArcFace(DIM, CLASSES, seed=1).double(), lambda_s=0.0)(x, y)
    z = F.normalize(x[:, 0], dim=-1)
    pairs = [(i, j) for i in range(4) for j in range(i) if y[i] != y[j]]
    mean = torch.stack([(-2 * (z[i] - z[j]).square().sum()).exp() for i, j in pairs]).mean()
    assert_close(output.uniformity, mean.log())
