"""Losses over real gloo worlds of 1, 2 and 4 ranks: value and gradient of the global batch, and what they cost."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from cel_dist.errors import CelError
from cel_dist.losses import (
    EquilibriumLoss,
    angular_contrastive,
    angular_prototypical,
    prototypical,
    uniformity,
)

WORLDS = [1, 2, 4]
NUM_UTTERANCES = 8
PAIRS = ["pon", "apn", "an"]
COMBINATIONS = list(itertools.product(["angular_prototypical", "angular_contrastive", "prototypical", "ge2e"], PAIRS))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inputs(num_views: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(NUM_UTTERANCES, num_views, 6, generator=generator, dtype=torch.float64)


def scale() -> tuple[Tensor, Tensor]:
    return torch.tensor([7.0], dtype=torch.float64, requires_grad=True), torch.tensor([-2.0], requires_grad=True)


def equilibrium_step(rows: Tensor, similarity: str, pairs: str, group: Any = None) -> dict[str, Tensor]:
    """One step of a linear encoder and the loss: the outputs and the gradients of all parameters."""
    torch.manual_seed(2)
    module = nn.ModuleDict(
        {"encoder": nn.Linear(6, 5), "loss": EquilibriumLoss(similarity, pairs, 2.5, 0.8, 0.6, group)}
    )
    module.double()
    output = module["loss"](module["encoder"](rows))
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: value.detach() for name, value in output._asdict().items()} | gradients


def function_steps(rows: Tensor, group: Any = None) -> dict[str, dict[str, Tensor]]:
    """Every loss function on its own: value, and gradients of a linear encoder and of w and b."""
    calls: dict[str, Any] = {
        f"uniformity {pairs}": lambda x, w, b, p=pairs: uniformity(x, 2.0, p, group) for pairs in PAIRS
    }
    calls["prototypical"] = lambda x, w, b: prototypical(x, group)
    calls["angular_prototypical"] = lambda x, w, b: angular_prototypical(x, w, b, group)
    calls["angular_contrastive"] = lambda x, w, b: angular_contrastive(x, w, b, group)
    results = {}
    for name, call in calls.items():
        torch.manual_seed(2)
        encoder = nn.Linear(6, 5).double()
        w, b = scale()
        loss = call(encoder(rows), w, b)
        loss.backward()
        gradients = {"weight": encoder.weight.grad, "bias": encoder.bias.grad, "w": w.grad, "b": b.grad}
        results[name] = {"loss": loss.detach()} | {key: grad for key, grad in gradients.items() if grad is not None}
    return results


def averaged(results: dict[str, Tensor], outputs: tuple[str, ...], world_size: int) -> dict[str, Tensor]:
    """Replace gradients by their mean over the ranks, as the engine does; outputs stay those of this rank."""
    for name in sorted(results.keys() - set(outputs)):
        dist.all_reduce(results[name])
        results[name] /= world_size
    return results


def collectives_of_a_step(rows: Tensor, group: Any) -> list[str]:
    """Names of the communication operators in the second forward and backward of a loss."""
    loss = EquilibriumLoss(group=group)
    rows = rows.requires_grad_()
    loss(rows)
    # `torch.profiler` is the same instrument, but takes two seconds to import.
    with torch.autograd.profiler.profile() as profile:
        loss(rows).loss.backward()
    return [event.name for event in profile.function_events if event.name.startswith("c10d::")]


def mismatch_message(rank: int, group: Any) -> str:
    try:
        EquilibriumLoss(group=group)(torch.randn(3 + (rank == 1), 2, 4))
    except CelError as error:
        return str(error)
    return ""


def work(rank: int, world_size: int, folder: str) -> None:
    if world_size > 1:
        torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        group = dist.group.WORLD
        share = NUM_UTTERANCES // world_size
        own = slice(rank * share, (rank + 1) * share)
        outputs = ("loss", "similarity", "uniformity", "alignment", "accuracy")
        result: dict[str, Any] = {}
        for similarity, pairs in COMBINATIONS:
            step = equilibrium_step(inputs()[own], similarity, pairs, group)
            result[f"{similarity} {pairs}"] = averaged(step, outputs, world_size)
        step = equilibrium_step(inputs(num_views=3)[own], "angular_prototypical", "pon", group)
        result["three views"] = averaged(step, outputs, world_size)
        for name, step in function_steps(inputs()[own], group).items():
            result[f"function {name}"] = averaged(step, ("loss",), world_size)
        for name, dtype in DTYPES.items():
            result[name] = torch.stack(EquilibriumLoss(group=group)(inputs()[own].to(dtype))).detach()
        result["collectives"] = collectives_of_a_step(inputs()[own], group)
        if world_size > 1:
            result["mismatch"] = mismatch_message(rank, group)
        if world_size == 4:
            odd = dist.new_group([1, 3])
            if rank in (1, 3):
                result["odd ranks"] = EquilibriumLoss(group=odd)(inputs()[own]).loss.detach()
        torch.save(result, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS, ids=lambda size: f"world{size}")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank of a world computed; one start of the world serves all tests."""
    world_size: int = request.param
    folder = tmp_path_factory.mktemp("world")
    if world_size == 1:
        work(0, 1, str(folder))
    else:
        mp.spawn(work, args=(world_size, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def assert_equal_on_every_rank(ranks: list[dict[str, Any]], key: str, expected: dict[str, Tensor]) -> None:
    for result in ranks:
        assert result[key].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                result[key][name].double(),
                value.double(),
                rtol=1e-12,
                atol=1e-12,
                msg=lambda text, n=name: f"{n}: {text}",
            )


@pytest.mark.parametrize(("similarity", "pairs"), COMBINATIONS)
def test_equilibrium_and_its_gradients_are_those_of_the_global_batch(
    ranks: list[dict[str, Any]], similarity: str, pairs: str
) -> None:
    expected = equilibrium_step(inputs(), similarity, pairs)
    assert expected["encoder.weight"].abs().max() > 1e-3
    if similarity != "prototypical":
        assert expected["loss.w"].abs().max() > 1e-3
    assert_equal_on_every_rank(ranks, f"{similarity} {pairs}", expected)


def test_more_than_two_views_are_gathered_in_order(ranks: list[dict[str, Any]]) -> None:
    expected = equilibrium_step(inputs(num_views=3), "angular_prototypical", "pon")
    assert_equal_on_every_rank(ranks, "three views", expected)


def test_every_function_with_a_group_is_that_of_the_global_batch(ranks: list[dict[str, Any]]) -> None:
    for name, expected in function_steps(inputs()).items():
        assert_equal_on_every_rank(ranks, f"function {name}", expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_rows_give_the_loss_of_one_process(ranks: list[dict[str, Any]], dtype: str) -> None:
    expected = torch.stack(EquilibriumLoss()(inputs().to(DTYPES[dtype]))).detach()
    for result in ranks:
        assert result[dtype].dtype == torch.float32
        torch.testing.assert_close(result[dtype], expected, rtol=1e-6, atol=1e-6)


def test_a_step_costs_one_gather_and_no_collective_in_the_backward_pass(ranks: list[dict[str, Any]]) -> None:
    expected = ["c10d::_allgather_base_"] if len(ranks) > 1 else []
    assert [result["collectives"] for result in ranks] == [expected] * len(ranks)


def test_rows_of_different_shape_are_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    if len(ranks) == 1:
        assert "mismatch" not in ranks[0]
        return
    for result in ranks:
        assert "rank 0 [3, 2, 4], rank 1 [4, 2, 4]" in result["mismatch"]


def test_a_subgroup_shares_only_its_own_rows(ranks: list[dict[str, Any]]) -> None:
    if len(ranks) < 4:
        assert "odd ranks" not in ranks[0]
        return
    rows = torch.cat([inputs()[2:4], inputs()[6:8]])
    expected = EquilibriumLoss()(rows).loss.detach()
    for rank in (1, 3):
        torch.testing.assert_close(ranks[rank]["odd ranks"], expected, rtol=1e-12, atol=1e-12)
