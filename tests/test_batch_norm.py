"""Batch norm over real ranks beside plain batch norm over the rows of all of them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from worlds import run_world

from cel_dist.encoders import build_encoder
from cel_dist.encoders.batch_norm import GlobalBatchNorm, with_global_batch_norm
from cel_dist.errors import CelError

ROWS = [5, 3, 4]
CHANNELS = 6


def values(*shape):
    # Far from 0 in the mean, where the difference of two large numbers would show.
    return 30 + torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def norm(momentum):
    torch.manual_seed(1)
    module = nn.Sequential(nn.BatchNorm2d(CHANNELS, momentum=momentum)).double()
    nn.init.normal_(module[0].weight)
    nn.init.normal_(module[0].bias)
    return module


def train_and_describe(module, x, pull):
    """Outputs and gradients of two steps, in which the second sees the running statistics of the first."""
    for _ in range(2):
        module.zero_grad()
        x = x.detach().requires_grad_()
        y = module(x)
        (y * pull).sum().backward()
    module.eval()
    return {
        "y": y.detach(),
        "x": x.grad,
        "evaluated": module(x).detach(),
        **{name: parameter.grad for name, parameter in module.named_parameters()},
        **dict(module.named_buffers()),
    }


def on_a_rank(momentum):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))
    module = with_global_batch_norm(norm(momentum), dist.group.WORLD, on_gpu=False)
    assert isinstance(module[0], GlobalBatchNorm)
    found = train_and_describe(module, values(sum(ROWS), CHANNELS, 7, 2)[own], pulls()[own])
    module = with_global_batch_norm(norm(momentum), dist.group.WORLD, on_gpu=False)
    found |= bf16_gradients(module, own)
    found["refusal"] = refusal_of_a_second_derivative(module, own)
    dist.destroy_process_group()
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def bf16_gradients(module, own):
    """Gradients of a step at activations of bf16, as autocast makes them; the parameters are fp32."""
    module.float().zero_grad()
    x = rounded(values(sum(ROWS), CHANNELS, 7, 2))[own].bfloat16().requires_grad_()
    module(x).backward(rounded(pulls())[own].bfloat16())
    return {f"bf16 {name}": value.grad.double() for name, value in (("x", x), *module.named_parameters())}


def rounded(x):
    return x.bfloat16().double()


def refusal_of_a_second_derivative(module, own):
    y = module(values(sum(ROWS), CHANNELS, 7, 2)[own].float().requires_grad_())
    try:
        torch.autograd.grad(y.sum(), list(module.parameters()), create_graph=True)
    except CelError as error:
        return str(error)
    return ""


def pulls():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(sum(ROWS), CHANNELS, 7, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_three_ranks_normalise_as_one_process_does_the_rows_of_all(tmp_path, momentum):
    ranks = run_world(len(ROWS), on_a_rank, momentum, folder=tmp_path)
    whole = train_and_describe(norm(momentum), values(sum(ROWS), CHANNELS, 7, 2), pulls())
    for name, wanted in whole.items():
        parts = [torch.as_tensor(found[name]) for found in ranks]
        if name in ("y", "x", "evaluated"):
            torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-12, atol=1e-11)
        elif name in ("0.weight", "0.bias"):
            torch.testing.assert_close(sum(parts), wanted, rtol=1e-12, atol=1e-11)
        else:
            for part in parts:
                torch.testing.assert_close(part, wanted, rtol=1e-12, atol=1e-12)
    check_bf16(ranks, momentum)
    assert all("no second derivative" in found["refusal"] for found in ranks)


def check_bf16(ranks, momentum):
    module = norm(momentum)
    x = rounded(values(sum(ROWS), CHANNELS, 7, 2)).requires_grad_()
    module(x).backward(rounded(pulls()))
    at_x = torch.cat([torch.as_tensor(found["bf16 x"]) for found in ranks])
    torch.testing.assert_close(at_x, x.grad, rtol=2**-8, atol=1e-5)
    for name, parameter in module.named_parameters():
        found = sum(torch.as_tensor(found[f"bf16 {name}"]) for found in ranks)
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-5)


def change_the_encoder():
    dist.init_process_group("gloo")
    plain = build_encoder("fast_resnet34", embedding_dim=16)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    changed = with_global_batch_norm(plain, dist.group.WORLD, on_gpu=False)
    after = changed.state_dict()
    dist.destroy_process_group()
    left = [module for module in changed.modules() if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d)]
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return same, len(left)


def test_an_encoder_keeps_its_weights_and_their_names(tmp_path):
    assert run_world(1, change_the_encoder, folder=tmp_path) == [(True, 0)]


# What torch's kernels treat differently: shape behind the rows, order in memory, with weight and bias or not, type.
LAYOUTS = {
    "vectors": ((), None, True, torch.float32),
    "sequences": ((9,), None, True, torch.float32),
    "maps": ((7, 2), torch.contiguous_format, False, torch.float32),
    "maps, channels last": ((7, 2), torch.channels_last, True, torch.float32),
    "maps, channels last, without weight, bf16": ((7, 2), torch.channels_last, False, torch.bfloat16),
    "maps, channels last, fp16": ((7, 2), torch.channels_last, True, torch.float16),
    "columns of a longer sequence": ((9,), "columns", True, torch.bfloat16),
}


def step_of_a_layout(layout, own, module, exact):
    """Result and gradients of batch norm with a change in place behind it, for these rows of a layout."""
    behind, order, _, dtype = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(3)
    x, pull = (torch.randn(sum(ROWS), CHANNELS, *behind, generator=generator).to(dtype) for _ in range(2))
    x = (x[own] * 2 + 1).to(torch.float64 if exact else dtype)
    if order == "columns":
        x = torch.cat([x, x], dim=-1)[..., : behind[-1]]
    elif order is not None:
        x = x.contiguous(memory_format=order)
    y = module(x.requires_grad_())
    y.mul_(2)
    # In the order of memory that is usual, whatever that of x.
    y.backward(pull[own].to(y.dtype))
    found = {"y": y.detach(), "x": x.grad, **{name: value.grad for name, value in module.named_parameters()}}
    return {**found, **{name: value for name, value in module.named_buffers() if value.is_floating_point()}}


def layouts_on_a_rank():
    dist.init_process_group("gloo")
    own = slice(sum(ROWS[: dist.get_rank()]), sum(ROWS[: dist.get_rank() + 1]))
    results = []
    for layout, (_, order, affine, _) in LAYOUTS.items():
        module = GlobalBatchNorm.of(nn.BatchNorm2d(CHANNELS, affine=affine), dist.group.WORLD)
        found = step_of_a_layout(layout, own, module, exact=False)
        kept = order is not torch.channels_last or found["y"].is_contiguous(memory_format=order)
        results.append((kept, {name: (str(value.dtype), value.double().numpy()) for name, value in found.items()}))
    dist.destroy_process_group()
    return results


def test_every_shape_order_and_type_of_values_is_normalised_alike(tmp_path):
    ranks = run_world(len(ROWS), layouts_on_a_rank, folder=tmp_path)
    for (layout, (_, _, affine, dtype)), *parts in zip(LAYOUTS.items(), *ranks, strict=True):
        plain = nn.BatchNorm1d if len(LAYOUTS[layout][0]) < 2 else nn.BatchNorm2d
        wanted = step_of_a_layout(layout, slice(None), plain(CHANNELS, affine=affine).double(), exact=True)
        assert all(kept for kept, _ in parts), layout
        for name, value in wanted.items():
            types, found = zip(*(results[name] for _, results in parts), strict=True)
            found = [torch.as_tensor(part) for part in found]
            assert set(types) == {str(dtype if name in ("y", "x") else torch.float32)}, (layout, name)
            close = {"rtol": torch.finfo(dtype).eps / 2 if name in ("y", "x") else 1e-5, "atol": 1e-5}
            if name in ("y", "x"):
                torch.testing.assert_close(torch.cat(found), value, **close)
            elif name in ("weight", "bias"):
                torch.testing.assert_close(sum(found), value, **close)
            else:
                torch.testing.assert_close(found[0], value, **close)
