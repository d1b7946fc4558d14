"""The loss over real gloo worlds of 1 to 4 ranks: value and gradients of the global batch, and what they cost."""

import itertools
import os
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from worlds import run_world

from cel_dist.errors import CelError
from cel_dist.losses import EquilibriumLoss, angular_contrastive, angular_prototypical, ge2e, prototypical, uniformity
from cel_dist.losses import exchange as exchange_module
from cel_dist.losses.exchange import Exchange
from cel_dist.losses.similarity import SIMILARITIES
from cel_dist.losses.terms import Settings, global_terms
from cel_dist.losses.tiles import TileSize

WORLDS = [1, 2, 3, 4]
NUM_UTTERANCES, DIM = 12, 32
PAIRS = ["pon", "apn", "an"]
# Equal ids on one rank, on two neighbours and on the first and the last of every world.
DUPLICATES = torch.tensor([70, 71, 71, 73, 74, 74, 76, 77, 73, 79, 80, 70])


@dataclass(frozen=True)
class Case:
    similarity: str = "angular_prototypical"
    pairs: str = "pon"
    views: int = 2
    w: float = 7.0
    t: float = 2.5
    embeddings: str = "random"
    duplicates: bool = False
    exchange: str = "gather"
    tile: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float64

    def rows(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(NUM_UTTERANCES, self.views, DIM, generator=generator, dtype=torch.float64)
        if self.embeddings == "alike":
            x = x[:1, :1].expand(NUM_UTTERANCES, self.views, DIM).clone()
        if self.embeddings == "unequal views":
            # Views of different length and direction: what one view does must not stand in for the other.
            x = x * torch.tensor([1.0, 30.0, 0.2], dtype=x.dtype)[: self.views, None] + torch.eye(self.views, DIM)
        return x.to(self.dtype)

    def ids(self) -> Tensor | None:
        return DUPLICATES if self.duplicates else None


LOSSES = list(itertools.product(SIMILARITIES, PAIRS))
CASES = [Case(similarity, pairs) for similarity, pairs in LOSSES]
CASES += [Case(similarity, pairs, duplicates=True, exchange="ring", tile=(2, 5)) for similarity, pairs in LOSSES]
CASES += [Case(similarity, exchange="ring", embeddings="unequal views") for similarity in SIMILARITIES]
CASES += [Case(similarity, "apn", tile=(4, 3), embeddings="alike") for similarity in SIMILARITIES]
CASES += [Case(similarity, w=100.0, tile=(3, 2), t=30.0) for similarity in SIMILARITIES]
CASES += [Case(similarity, views=3) for similarity in ("angular_prototypical", "prototypical")]
CASES += [Case("ge2e", pairs, views=3, duplicates=True, tile=(5, 7), exchange="ring") for pairs in PAIRS]
CASES += [Case(similarity, pairs, dtype=torch.float32) for similarity, pairs in LOSSES]
CASES += [
    Case(similarity, "an", w=100.0, t=30.0, duplicates=True, exchange="ring", tile=(2, 3), dtype=torch.float32)
    for similarity in SIMILARITIES
]
CASES += [
    Case(similarity, exchange="ring", embeddings=embeddings, w=w, tile=(4, 3), dtype=torch.float32)
    for similarity, embeddings, w in itertools.product(SIMILARITIES, ("alike", "unequal views"), (7.0, 100.0))
]


def loss_and_gradients(case: Case, own: slice, exchange: Exchange) -> dict[str, Tensor]:
    """Terms of the loss, and gradients at the own rows and at w."""
    x = case.rows()[own].requires_grad_()
    scaled = SIMILARITIES[case.similarity].scaled
    w = torch.tensor([case.w], dtype=case.dtype, requires_grad=True) if scaled else None
    ids = case.ids()
    settings = Settings(
        SIMILARITIES[case.similarity], case.pairs, case.t, 0.8, 0.6, tile=case.tile and TileSize(*case.tile)
    )
    values = global_terms(x, w, w, None if ids is None else ids[own], exchange, settings)
    (2 * values.loss).backward()
    result = {"loss": values.loss, "similarity": values.similarity, "uniformity": values.uniformity, "x": x.grad / 2}
    return {name: value.detach() for name, value in result.items()} | ({} if w is None else {"w": w.grad / 2})


def expected(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    x = case.rows().to(dtype).requires_grad_()
    w = torch.tensor([case.w], dtype=dtype, requires_grad=True)
    loss, similarity, uniform = oracle.equilibrium(
        x, w, case.ids(), case.similarity, case.pairs, case.t, lambda_s=0.8, lambda_u=0.6
    )
    loss.backward()
    result = {"loss": loss, "similarity": similarity, "uniformity": uniform, "x": x.grad, "w": w.grad}
    return {name: value.detach() for name, value in result.items() if value is not None}


def function_calls(group: Any) -> dict[str, Any]:
    calls: dict[str, Any] = {
        f"uniformity {pairs}": lambda x, w, b, p=pairs: uniformity(x, 2.5, p, group) for pairs in PAIRS
    }
    calls["prototypical"] = lambda x, w, b: prototypical(x, group)
    calls["angular_prototypical"] = lambda x, w, b: angular_prototypical(x, w, b, group)
    calls["angular_contrastive"] = lambda x, w, b: angular_contrastive(x, w, b, group)
    calls["ge2e"] = lambda x, w, b: ge2e(x, w, b, group)
    return calls


def step_of_an_encoder(rows: Tensor, group: Any) -> dict[str, Tensor]:
    """What the mean of the ranks' gradients makes of an encoder and of w, as the engine takes it."""
    torch.manual_seed(2)
    module = nn.ModuleDict({"encoder": nn.Linear(DIM, 5), "loss": EquilibriumLoss("angular_contrastive", group=group)})
    module.double()
    module["loss"](module["encoder"](rows)).loss.backward()
    gradients = {name: parameter.grad.detach() for name, parameter in module.named_parameters()}
    if group is not None:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return gradients


def collectives_of_a_step(rows: Tensor, group: Any, exchange: str, ids: Tensor | None = None) -> list[tuple[str, int]]:
    """Communication in the second forward and backward of a loss: names, and words that this rank sends."""
    loss = EquilibriumLoss("angular_contrastive", group=group, exchange=exchange)
    rows = rows.float().requires_grad_()
    loss(rows, ids)
    sent_to_neighbours = []
    send_and_receive = dist.batch_isend_irecv

    def recorded(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent_to_neighbours.extend(op.tensor.numel() for op in operations if op.op is dist.isend)
        return send_and_receive(operations)

    dist.batch_isend_irecv = recorded
    # `torch.profiler` is the same instrument, but takes two seconds to import.
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        loss(rows, ids).loss.backward()
    dist.batch_isend_irecv = send_and_receive
    found = [("send", words) for words in sent_to_neighbours]
    for event in profile.function_events:
        if event.name.startswith("c10d::") and event.name not in ("c10d::send", "c10d::recv_"):
            _, sent = event.input_shapes[:2]
            found.append((event.name, torch.Size(sent).numel()))
    sends = [event for event in profile.function_events if event.name == "c10d::send"]
    assert len(sends) == len(sent_to_neighbours)
    return found


def choices_of_auto(rank: int, group: Any, x: Tensor) -> list[str]:
    """What `auto` chooses with all of the memory, and when one rank has next to none."""
    chosen = []
    for scarce in (False, True):
        exchange = Exchange(group, "auto")
        before = exchange_module._free_bytes
        if scarce and rank == dist.get_world_size() - 1:
            exchange_module._free_bytes = lambda device: 1000
        exchange.agree(x, False)
        exchange_module._free_bytes = before
        chosen.append(exchange.chosen)
    return chosen


def refusal(call: Any) -> str:
    try:
        call()
    except CelError as error:
        return str(error)
    return ""


def refusals(rank: int, group: Any, own: slice) -> dict[str, str]:
    rows, ids = Case().rows()[own], DUPLICATES[own]
    last = dist.get_world_size() - 1
    infinite, empty = rows.clone(), rows.clone()
    if rank == last:
        infinite[0, 1, 2] = torch.nan
        empty[:2, 0] = 0
    loss = EquilibriumLoss(group=group)
    calls = {
        "shape": lambda: loss(torch.randn(3 + (rank == 1), 2, 4)),
        "type": lambda: loss(rows if rank == last else rows.float()),
        "views": lambda: loss(rows[:, : 1 + (rank != last)]),
        "dimensions": lambda: loss(rows[:, 0] if rank == last else rows),
        "type of ids": lambda: loss(rows, ids.int() if rank == last else ids),
        "ids": lambda: loss(rows, None if rank == last else ids),
        "infinite": lambda: loss(infinite),
        "empty": lambda: loss(empty),
        "one sample": lambda: loss(rows, torch.zeros_like(ids)),
        "type of ids later": lambda: loss(rows, ids.int()),
    }
    return {name: refusal(call) for name, call in calls.items()}


def work(world_size: int, folder: str) -> None:
    rank = int(os.environ["RANK"]) if world_size > 1 else 0
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        group = dist.group.WORLD
        share = NUM_UTTERANCES // world_size
        own = slice(rank * share, (rank + 1) * share)
        exchanges = {how: Exchange(group, how) for how in ("gather", "ring")}
        result: dict[str, Any] = {
            "cases": [loss_and_gradients(case, own, exchanges[case.exchange]) for case in CASES],
            "encoder": step_of_an_encoder(Case().rows()[own], group),
            "bf16": torch.stack(EquilibriumLoss(group=group)(Case().rows()[own].bfloat16())).detach(),
        }
        w = torch.tensor([7.0], dtype=torch.float64)
        result["functions"] = {name: call(Case().rows()[own], w, w) for name, call in function_calls(group).items()}
        for how in exchanges:
            result[f"collectives {how}"] = collectives_of_a_step(Case().rows()[own], group, how)
            with_ids = collectives_of_a_step(Case().rows()[own], group, how, DUPLICATES[own])
            result[f"collectives {how}, ids"] = with_ids
        result["auto"] = choices_of_auto(rank, group, Case().rows()[own])
        if world_size > 1:
            result["refusals"] = refusals(rank, group, own)
        if world_size == 4:
            for how in exchanges:
                odd = dist.new_group([1, 3])
                if rank in (1, 3):
                    loss = EquilibriumLoss(group=odd, exchange=how)
                    result[f"odd ranks {how}"] = loss(Case().rows()[own]).loss.detach()
        torch.save(result, f"{folder}/rank{rank}.pt")
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


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number])[5:-1])
def test_loss_and_gradients_are_those_of_the_oracle(ranks: list[dict[str, Any]], number: int) -> None:
    case = CASES[number]
    wanted = expected(case)
    if case.embeddings == "random":
        assert wanted["x"].abs().max() > 1e-3
    tolerance = 1e-12 if case.dtype == torch.float64 else 2e-6
    # The engine averages over the ranks, so a rank's gradient is W times that of the global loss.
    found = {"x": torch.cat([result["cases"][number]["x"] for result in ranks]) / len(ranks)}
    if SIMILARITIES[case.similarity].scaled:
        found["w"] = torch.stack([result["cases"][number]["w"] for result in ranks]).mean(0)
    for name, gradient in found.items():
        # Embeddings that are all alike have a gradient of 0, which leaves nothing to be relative to.
        allowed = tolerance * max(float(wanted[name].norm()), 0.1)
        error = float((gradient.double() - wanted[name]).norm())
        if (name, case.embeddings, case.w, case.dtype) == ("x", "alike", 100.0, torch.float32):
            # A gradient of 0, for which pulls of w / K an anchor and a key cancel. What is asked is one rounding of
            # these, 6e-7 here. Autograd over all pairs in fp32 does not keep to the tolerance of 2e-7 either: with
            # A-Prot it leaves 2.1e-7 of them on one rank, where the tiles leave 2.9e-7, and 4.7e-7 on four.
            length = float(case.rows()[0, 0].norm())
            pulls = 0.8 * case.w / NUM_UTTERANCES / length * (2 * NUM_UTTERANCES) ** 0.5
            allowed = torch.finfo(case.dtype).eps * pulls
        assert error <= allowed, name
    for result in ranks:
        for name in ("loss", "similarity", "uniformity"):
            torch.testing.assert_close(
                result["cases"][number][name].double(), wanted[name], rtol=tolerance, atol=tolerance
            )


def test_gradients_of_an_encoder_and_of_w_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    single = step_of_an_encoder(Case().rows(), None)
    assert single["loss.w"].abs().max() > 1e-3
    for result in ranks:
        assert result["encoder"].keys() == single.keys()
        for name, value in single.items():
            torch.testing.assert_close(result["encoder"][name], value, rtol=1e-12, atol=1e-12)


def test_every_function_with_a_group_is_that_of_the_global_batch(ranks: list[dict[str, Any]]) -> None:
    w = torch.tensor([7.0], dtype=torch.float64)
    for name, call in function_calls(None).items():
        for result in ranks:
            torch.testing.assert_close(result["functions"][name], call(Case().rows(), w, w), rtol=1e-12, atol=1e-12)


def test_bf16_rows_give_the_loss_of_one_process(ranks: list[dict[str, Any]]) -> None:
    single = torch.stack(EquilibriumLoss()(Case().rows().bfloat16())).detach()
    for result in ranks:
        assert result["bf16"].dtype == torch.float32
        torch.testing.assert_close(result["bf16"], single, rtol=1e-6, atol=1e-6)


def test_a_step_costs_one_gather_and_one_exchange_of_a_number_a_row(ranks: list[dict[str, Any]]) -> None:
    share = NUM_UTTERANCES // len(ranks)
    # Two numbers for faults, pairs of equal ids, distance of the views; loss, accuracy; two logarithms.
    scalars, normalisers = 8, 2 * share
    gathered = [("c10d::_allgather_base_", share * 2 * DIM), ("c10d::_allgather_base_", scalars + normalisers)]
    for result in ranks:
        assert result["collectives gather"] == (gathered if len(ranks) > 1 else [])


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_ids_travel_with_the_rows_as_two_words_each(ranks: list[dict[str, Any]], how: str) -> None:
    share = NUM_UTTERANCES // len(ranks)
    for result in ranks:
        without, with_ids = result[f"collectives {how}"], result[f"collectives {how}, ids"]
        rows, words = share * 2 * DIM, share * (2 * DIM + 2)
        assert with_ids == [(name, words if sent == rows else sent) for name, sent in without]
        assert (rows in [sent for _, sent in without]) is (len(ranks) > 1)


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_of_a_machine_share_its_free_memory(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # torchrun and the deepspeed launcher call it differently.
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for variable, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", name: "4"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(exchange_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=4000))
    assert exchange_module._free_bytes(torch.device("cpu")) == 1000


def test_auto_gathers_unless_one_rank_is_short_of_memory(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["auto"] == (["gather", "ring"] if len(ranks) > 1 else ["gather", "gather"])


def test_a_ring_sends_the_own_rows_to_one_neighbour_at_a_time(ranks: list[dict[str, Any]]) -> None:
    share = NUM_UTTERANCES // len(ranks)
    for result in ranks:
        # Two passes of W - 1 turns, and the exchange between them.
        turns = [("send", share * 2 * DIM)] * (2 * (len(ranks) - 1))
        assert result["collectives ring"] == turns + [("c10d::_allgather_base_", 8 + 2 * share)] * (len(ranks) > 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape", r"rank 0 \[3, 2, 4\], rank 1 \[4, 2, 4\]"),
        ("type", "rank {last} brings rows of float64 and others of float32"),
        ("views", r"rank 0 \[{share}, 2, 32\].*, rank {last} \[{share}, 1, 32\]"),
        ("dimensions", "rank {last} brings rows or ids that cannot be used"),
        ("type of ids", "rank {last} brings rows or ids that cannot be used"),
        ("ids", "rank {last} brings no sample ids"),
        ("infinite", "rank {last} has embeddings that are not finite in 1 of {share} utterances; lower"),
        ("empty", "rank {last} has embeddings of length 0 in 2 of {share} utterances"),
        ("type of ids later", "type torch.int32; give {share} of int64"),
        ("one sample", "all 12 utterances of the global batch are one sample"),
    ],
)
def test_unusable_rows_are_refused_on_every_rank(ranks: list[dict[str, Any]], name: str, message: str) -> None:
    if len(ranks) == 1:
        assert "refusals" not in ranks[0]
        return
    wanted = message.format(last=len(ranks) - 1, share=NUM_UTTERANCES // len(ranks))
    for result in ranks:
        assert re.search(wanted, result["refusals"][name]), result["refusals"][name]


@pytest.mark.parametrize("how", ["gather", "ring"])
def test_a_subgroup_shares_only_its_own_rows(ranks: list[dict[str, Any]], how: str) -> None:
    if len(ranks) < 4:
        assert f"odd ranks {how}" not in ranks[0]
        return
    rows = torch.cat([Case().rows()[3:6], Case().rows()[9:12]])
    alone = EquilibriumLoss()(rows).loss.detach()
    for rank in (1, 3):
        torch.testing.assert_close(ranks[rank][f"odd ranks {how}"], alone, rtol=1e-12, atol=1e-12)
