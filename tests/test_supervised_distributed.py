"""Supervised losses over real worlds of 1 to 4 ranks: values and gradients of the global batch."""

import os
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from worlds import run_world

from cel_dist.distributed import World
from cel_dist.errors import CelError
from cel_dist.losses.exchange import Exchange
from cel_dist.losses.supervised import AdaCos, ArcFace, ClassificationHead, CosFace, Softmax, SupervisedLoss

WORLDS = [1, 2, 4]
# Classes that no number of ranks divides, some of them without rows, and speakers with rows on several ranks.
NUM_ROWS, VIEWS, DIM, CLASSES = 12, 2, 16, 11
LABELS = torch.tensor([0, 10, 3, 3, 5, 1, 0, 7, 2, 9, 10, 4])
HEADS: dict[str, tuple[type[ClassificationHead], dict[str, Any]]] = {
    "softmax": (Softmax, {}),
    "cosface": (CosFace, {"margin": 0.3, "scale": 10.0}),
    "arcface": (ArcFace, {"scale": 10.0, "sub_centres": 3}),
    "adacos": (AdaCos, {}),
}
PLACES = {"replicated": False, "sharded": True}


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_ROWS, VIEWS, DIM, generator=generator, dtype=torch.float64)
    # Near its class, so that the angles, and not only the exponentials, move the scale of AdaCos.
    return x + 8 * nn.functional.normalize(new_head("adacos", None, False).centres[LABELS].detach(), dim=-1)


def new_head(name: str, group: Any, sharded: bool) -> ClassificationHead:
    head, options = HEADS[name]
    return head(DIM, CLASSES, group=group, sharded=sharded, seed=3, **options).double()


def two_steps(name: str, group: Any, sharded: bool, own: slice) -> dict[str, Tensor]:
    """What the second step of gradient descent on the weights sees, with the weights after it."""
    loss = SupervisedLoss(new_head(name, group, sharded), "apn", lambda_s=0.8, lambda_u=0.6, group=group)
    head, exchange = loss.head, Exchange(group, "gather")
    for _ in range(2):
        x = rows()[own].requires_grad_()
        weights = list((head.sharded_parameters() or dict(head.named_parameters())).values())
        for weight in weights:
            weight.grad = None
        output = loss(x, LABELS[own])
        output.loss.backward()
        with torch.no_grad():
            for weight in weights:
                # The engine averages the gradients of parameters, and knows nothing of sharded weights.
                mean = weight.grad if sharded else exchange.total(weight.grad) / exchange.world_size
                weight -= 0.5 * mean
    result = {name: value.detach() for name, value in output._asdict().items()}
    result |= head.class_weights() | {"x": x.grad}
    if isinstance(head, AdaCos):
        result["scale"] = head.scale.clone()
    return result


def refusals(group: Any, rank: int, own: slice) -> dict[str, str]:
    last = rank == dist.get_world_size() - 1
    infinite = rows()[own]
    infinite[0, 1, 2] = torch.nan if last else 0.0
    unknown = LABELS[own] + CLASSES * last
    calls = {}
    for place, sharded in PLACES.items():
        head = new_head("arcface", group, sharded)
        calls[f"{place} infinite"] = lambda head=head: head(infinite, LABELS[own])
        calls[f"{place} unknown"] = lambda head=head: head(rows()[own], unknown)
    calls["too few classes"] = lambda: Softmax(DIM, 2, group=group, sharded=True)
    calls["another group"] = lambda: SupervisedLoss(new_head("softmax", group, False))
    found = {}
    for name, call in calls.items():
        try:
            call()
        except CelError as error:
            found[name] = str(error)
    return found


def compute(rank: int, world_size: int) -> dict[str, Any]:
    group, own = dist.group.WORLD, World(rank, world_size).rows(NUM_ROWS)
    result: dict[str, Any] = {
        f"{name} {place}": two_steps(name, group, sharded, own) for name in HEADS for place, sharded in PLACES.items()
    }
    if world_size > 1:
        result["shard"] = new_head("softmax", group, True).shard_range
        result["refusals"] = refusals(group, rank, own)
    return result


def work(world_size: int, folder: str) -> None:
    rank = int(os.environ["RANK"]) if world_size > 1 else 0
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        torch.save(compute(rank, world_size), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS, ids=lambda size: f"world{size}")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank of a world computed; one start of the world serves all tests."""
    world_size: int = request.param
    folder = tmp_path_factory.mktemp("world")
    if world_size == 1:
        work(1, str(folder))
    else:
        run_world(world_size, work, world_size, str(folder), folder=folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", HEADS)
def test_a_world_computes_what_one_process_does(ranks: list[dict[str, Any]], name: str, place: str) -> None:
    expected = two_steps(name, None, False, slice(None))
    assert 0 < expected["accuracy"] <= 1
    assert expected["x"].abs().max() > 1e-3
    for rank, result in enumerate(ranks):
        found = result[f"{name} {place}"]
        assert found.keys() == expected.keys()
        share = NUM_ROWS // len(ranks)
        # The engine averages over the ranks, so a rank's gradient is W times that of the global loss.
        wanted = {**expected, "x": len(ranks) * expected["x"][rank * share : (rank + 1) * share]}
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)


def test_classes_are_cut_evenly_over_the_ranks(ranks: list[dict[str, Any]]) -> None:
    found = [result.get("shard") for result in ranks]
    assert found == {1: [None], 2: [(0, 5), (5, 11)], 4: [(0, 2), (2, 5), (5, 8), (8, 11)]}[len(ranks)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("replicated infinite", "^rank {last} has embeddings that are not finite in 1 of {share} utterances"),
        ("sharded infinite", "^rank {last} has embeddings that are not finite in 1 of {share} utterances"),
        ("replicated unknown", r"^rank {last} has labels that are not in 0\.\.10"),
        ("sharded unknown", r"^rank {last} has labels that are not in 0\.\.10"),
        ("too few classes", "^2 classes cannot be cut over 4 ranks"),
        ("another group", "with different ranks"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(ranks: list[dict[str, Any]], name: str, message: str) -> None:
    if len(ranks) == 1:
        assert "refusals" not in ranks[0]
        return
    for result in ranks:
        if name == "too few classes" and len(ranks) == 2:
            assert name not in result["refusals"]
            continue
        wanted = message.format(last=len(ranks) - 1, share=NUM_ROWS // len(ranks))
        assert re.search(wanted, result["refusals"][name]), result["refusals"][name]
