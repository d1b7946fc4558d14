"""Supervised losses over real worlds of 1 to 4 ranks, and in real engines: values and gradients of the global batch."""

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
from cel_dist.losses import LossOutput
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
STAGES = [0, 1, 2, 3]
# So many weights that ZeRO-3 does not keep them whole.
ENGINE_CLASSES, BATCH, FEATURES, STEPS, RATE = 6301, 12, (40, 6), 3, 1e-3


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_ROWS, VIEWS, DIM, generator=generator, dtype=torch.float64)
    # Near its class, so that the angles, and not only the exponentials, move the scale of AdaCos.
    return x + 8 * nn.functional.normalize(new_head("adacos", None, False).weight[LABELS].detach(), dim=-1)


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


class SmallEncoder(nn.Module):
    """Without batch norm, so that the number of ranks must not matter at all."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES[0] * FEATURES[1], 24)
        self.output = nn.Linear(24, DIM)

    def forward(self, features: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(features.flatten(1))))


def new_objective(group: Any, sharded: bool) -> Any:
    from cel_dist.training.objective import Objective

    torch.manual_seed(0)
    head = ArcFace(DIM, ENGINE_CLASSES, group=group, sharded=sharded, seed=3)
    return Objective(SmallEncoder(), SupervisedLoss(head, group=group, skip_unusable=True), "separate")


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(STEPS, BATCH, VIEWS, *FEATURES, generator=generator)
    labels = torch.randint(ENGINE_CLASSES, (STEPS, BATCH), generator=generator)
    return list(zip(features, labels, strict=True))


def train_with_an_engine(stage: int, sharded: bool, chunks: int) -> dict[str, Any]:
    """Train on this rank's rows, with a batch in between that is of no use."""
    from cel_dist.config_file import parse_config
    from cel_dist.engine import Engine

    world = World.from_environment()
    settings = {
        "data": {"shards": "none"},
        "augment": {"profile": 0},
        "train": {"batch_size": BATCH, "encode_chunks": chunks},
        "engine": {"zero_stage": stage},
        "optim": {"lr": RATE, "clip_norm": 0.0, "weight_decay": 0.0},
    }
    objective = new_objective(dist.group.WORLD, sharded)
    engine = Engine(objective, parse_config(settings, "test"), world, torch.device("cpu"))
    own, losses, norms = world.rows(BATCH), [], []
    for number, (features, labels) in enumerate(batches()):
        if number == 1:
            damaged = features[own].clone()
            if world.rank == 1:
                damaged[0] = torch.nan
            engine.forward_backward(damaged, labels[own])
            problem = engine.problem
            assert engine.gradient_norm().isnan()
            engine.discard()
        losses.append(engine.forward_backward(features[own], labels[own]).loss.item())
        if stage == 3 and not sharded:
            assert objective.loss.head.weight.numel() < ENGINE_CLASSES
        norms.append(engine.gradient_norm().item())
        engine.step(RATE)
    return {"losses": losses, "norms": norms, "problem": problem, **engine.class_weights(), **engine.encoder_state()}


def train_plainly() -> dict[str, Any]:
    objective = new_objective(None, False)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=RATE, weight_decay=0.0)
    losses, norms = [], []
    for features, labels in batches():
        optimizer.zero_grad()
        output: LossOutput = objective("whole", features, labels)
        output.loss.backward()
        losses.append(output.loss.item())
        norms.append(nn.utils.get_total_norm([parameter.grad for parameter in objective.parameters()]).item())
        optimizer.step()
    weight = objective.loss.head.class_weights()["weight"]
    return {"losses": losses, "norms": norms, "weight": weight, **objective.encoder.state_dict()}


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


def work_with_engines() -> dict[str, Any]:
    from cel_dist.process_group import start_process_group, stop_process_group

    world = World.from_environment()
    start_process_group(world)
    result = compute(world.rank, world.size)
    cases = [(stage, False, 1) for stage in STAGES] + [(0, True, 1), (3, True, 2), (3, False, 2)]
    result["engines"] = {case: train_with_an_engine(*case) for case in cases}
    stop_process_group()
    return result


@pytest.fixture(scope="module", params=WORLDS, ids=lambda size: f"world{size}")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank of a world computed; one start of the world serves all tests. Two ranks have engines, too."""
    world_size: int = request.param
    folder = tmp_path_factory.mktemp("world")
    if world_size == 2:
        return run_world(world_size, work_with_engines, folder=folder)
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


def test_engines_of_every_stage_train_the_weights_as_one_process_does(ranks: list[dict[str, Any]]) -> None:
    if len(ranks) != 2:
        assert "engines" not in ranks[0]
        return
    expected = train_plainly()
    first = new_objective(None, False)
    before = {"weight": first.loss.head.weight.detach(), **first.encoder.state_dict()}
    for result in ranks:
        for case, found in result["engines"].items():
            assert re.match("rank 1 has embeddings that are not finite in 1 of 6", found["problem"]), case
            assert found["losses"] == pytest.approx(expected["losses"], rel=2e-6), case
            # A step of Adam does not tell a gradient from a multiple of it.
            assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5), case
            for name, start in before.items():
                # Adam makes a whole step of a gradient that is next to nothing but rounding, so a few numbers of a
                # hundred thousand are off by some 1e-3 of a step.
                error, change = (found[name] - expected[name]).norm(), (expected[name] - start).norm()
                assert change > 1e-3
                assert error < 5e-5 * change, (case, name)
