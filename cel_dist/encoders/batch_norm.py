"""Batch norm with the statistics of all ranks.

With statistics of its own on every rank, the positives of a contrastive batch can recognise each other by their rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cel_dist.errors import CelError


def with_global_batch_norm(encoder: nn.Module, group: dist.ProcessGroup | None, on_gpu: bool) -> nn.Module:
    """Let every batch norm of an encoder share its statistics over a group of ranks (None: all), in training.

    GPUs use `nn.SyncBatchNorm`, which refuses tensors of a CPU; there `GlobalBatchNorm` does the same. Names in the
    state dict stay, so the weights go into an encoder without this. Returns the encoder, changed in place.
    """
    if on_gpu:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(encoder, group)  # type: ignore[no-untyped-call]
        return converted
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, GlobalBatchNorm):
                setattr(parent, name, GlobalBatchNorm.of(child, group))
    return encoder


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over [B, C, ...] of all ranks: one all-gather forward, one all-reduce backward.

    The gradient is that of the sum of the ranks' losses, so it goes with any loss whose gradient is right at this
    rank's outputs. Ranks may bring different numbers of values. In evaluation it is plain batch norm; in training
    plain batch norm's kernels add up parts of the values, which rounds less than all of them at once.
    """

    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, plain: nn.modules.batchnorm._BatchNorm, group: dist.ProcessGroup | None) -> "GlobalBatchNorm":
        """One that takes over parameters, buffers and mode of a plain batch norm."""
        shared = cls(plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats)
        for name, parameter in plain.named_parameters(recurse=False):
            setattr(shared, name, parameter)
        for name, buffer in plain.named_buffers(recurse=False):
            setattr(shared, name, buffer)
        shared.group = group
        return shared.train(plain.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x by the mean and variance of each channel over all ranks."""
        if not self.training or dist.get_world_size(self.group) == 1:
            return super().forward(x)
        y, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.group)  # type: ignore[no-untyped-call]
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                # Like plain batch norm, the running variance is that of the population, the normalising one is not.
                unbiased = variance * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        output: Tensor = y
        return output

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"batch norm takes [B, C, ...], not {list(x.shape)}")


class _Normalise(torch.autograd.Function):
    """What plain batch norm does in one kernel a direction is cut where the ranks talk, and done by parts of it: its
    statistics and its evaluation forward, its sums backward. Only the end of the backward pass has no such part."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not (x.is_contiguous() or _is_channels_last(x)):
            x = x.contiguous()
        flat = _flat(x, like=x)
        # Running statistics that nobody reads: their type is that of what comes out, which bf16 would spoil.
        unread = x.new_zeros(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        counted, means, variances = [], [], []
        for (part,) in _parts(flat):
            part_mean, part_variance = torch.batch_norm_update_stats(part, unread[0], unread[1], 0.0)
            counted.append(part.numel() / x.shape[1])
            means.append(part_mean)
            variances.append(part_variance)
        own_count, own_mean, own_variance = _pooled(
            unread.new_tensor(counted)[:, None], torch.stack(means), torch.stack(variances)
        )
        own = torch.cat([own_count[None], own_mean, own_variance])
        gathered = own.new_empty(dist.get_world_size(group) * len(own))
        _all_gather(gathered, own, group=group)
        ranks = torch.split(gathered.view(-1, len(own)), [1, len(own_mean), len(own_mean)], dim=1)
        count, mean, variance = _pooled(*ranks)
        # Of x, not of its view: a view could not be changed in place by an activation behind it.
        y = torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.group, ctx.eps, ctx.has_bias = group, eps, bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` speaks up only where `grad` has a gradient itself, and keeps silent otherwise.
        if torch.is_grad_enabled():
            raise CelError("global batch norm has no second derivative; take gradients without create_graph=True")
        x, weight, mean, variance, count = ctx.saved_tensors
        at_x = torch.empty_like(x)
        flat_x, flat_grad, flat_at_x = (_flat(tensor, like=x) for tensor in (x, grad, at_x))
        # Sums over this rank's values, in the type of the mean: of grad * (x - mean) / deviation, and of grad.
        own = [
            torch.stack(
                torch.ops.aten.native_batch_norm_backward(
                    *parts, weight, mean, variance, None, None, False, ctx.eps, [False, True, True]
                )[1:]
            )
            for parts in _parts(flat_grad, flat_x)
        ]
        sums = torch.stack(own).sum(dim=0)
        at_weight, at_bias = sums.clone()
        dist.all_reduce(sums, group=ctx.group)
        of_normalised, of_grad = sums / count
        inverse_deviation = torch.rsqrt(variance + ctx.eps)
        scale = inverse_deviation if weight is None else inverse_deviation * weight
        slope = -inverse_deviation * of_normalised
        _combine(flat_grad, flat_x, mean, slope, scale, -scale * of_grad, out=flat_at_x)
        return at_x, at_weight if weight is not None else None, at_bias if ctx.has_bias else None, None, None


def _pooled(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean [C] and variance [C] of all values together, of those of P parts: [P, 1], [P, C] and [P, C].

    The variance of the whole is that within the parts and that between them; no difference of large numbers.
    """
    count = counts.sum()
    shares = counts / count
    mean = (shares * means).sum(dim=0)
    return count, mean, (shares * (variances + (means - mean).square())).sum(dim=0)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors [B, C, L] or [N, C] of equal shape, with so few values a channel that torch's kernels, which
    add up one after the other in fp32, keep their digits."""
    rows = max(1, _ADDED_UP // tensors[0][0, 0].numel())
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def _combine(grad: Tensor, x: Tensor, mean: Tensor, slope: Tensor, scale: Tensor, offset: Tensor, out: Tensor) -> None:
    """Write scale * (grad + slope * (x - mean)) + offset to `out`, computed in the type of the vectors.

    The mean comes off first: multiplied out, x far from 0 would cost digits of what cancels where values are few.

    Takes [B, C, L] or [N, C] for grad, x and out, and [C] for the others.
    """
    if x.ndim == 3:
        mean, slope, scale, offset = (vector[:, None] for vector in (mean, slope, scale, offset))
    if x.dtype == scale.dtype:
        torch.sub(x, mean, out=out)
        torch.addcmul(grad, out, slope, out=out)
        torch.addcmul(offset, out, scale, out=out)
        return
    # Rounded only once, at the end. What is widened for that stays in the cache.
    rows = max(1, _BLOCK * torch.get_num_threads() // x[0].numel())
    for grad_part, x_part, out_part in zip(*(torch.split(tensor, rows) for tensor in (grad, x, out)), strict=True):
        wide = (x_part.to(scale.dtype) - mean).mul_(slope).add_(grad_part)
        out_part.copy_(torch.addcmul(offset, wide, scale))


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim > 3 and x.movedim(1, -1).is_contiguous()


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """[B, C, ...] as contiguous [B, C, L], or as [N, C] where `like` is channels-last: what torch's kernels are quick
    for, if all they are given is in the same order. A view where x is in the order of `like`."""
    if like.ndim == 2 or not like.is_contiguous():
        return x.movedim(1, -1).flatten(0, -2).contiguous()
    return x.flatten(2).contiguous()


# Values of a channel that a kernel adds up at a time.
_ADDED_UP = 4096
# Values that a thread widens at a time: half a megabyte, within the second cache.
_BLOCK = 2**17
# The newer name of the same collective; the older one warns from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
