"""Batch norm with the statistics of all ranks.

With statistics of its own on every rank, the positives of a contrastive batch can recognise each other by their rank.
"""

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
    rank's outputs. Ranks may bring different numbers of values. In evaluation it is plain batch norm.
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
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        others = [dim for dim in range(x.ndim) if dim != 1]
        own_variance, own_mean = torch.var_mean(x.float() if x.dtype != torch.float64 else x, others, correction=0)
        own = torch.cat([own_mean.new_tensor([x.numel() / x.shape[1]]), own_mean, own_variance])
        gathered = own.new_empty(dist.get_world_size(group) * len(own))
        _all_gather(gathered, own, group=group)
        counts, means, variances = torch.split(gathered.view(-1, len(own)), [1, len(own_mean), len(own_mean)], dim=1)
        count = counts.sum()
        shares = counts / count
        mean = (shares * means).sum(dim=0)
        # The variance of the whole is that within the ranks and that between them; no difference of large numbers.
        variance = (shares * (variances + (means - mean).square())).sum(dim=0)
        y = torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), count)
        ctx.group, ctx.others, ctx.has_bias = group, others, bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` speaks up only where `grad` has a gradient itself, and keeps silent otherwise.
        if torch.is_grad_enabled():
            raise CelError("global batch norm has no second derivative; take gradients without create_graph=True")
        x, weight, mean, inverse_deviation, count = ctx.saved_tensors

        def along(vector: Tensor) -> Tensor:
            return vector.view(-1, *(1 for _ in range(x.ndim - 2)))

        centred = x - along(mean)
        # The gradient has the type of x, in which a sum over all places would lose most of its digits.
        sums = torch.stack([grad.sum(ctx.others, dtype=mean.dtype), (grad * centred).sum(ctx.others, dtype=mean.dtype)])
        at_weight = sums[1] * inverse_deviation if weight is not None else None
        at_bias = sums[0].clone() if ctx.has_bias else None
        dist.all_reduce(sums, group=ctx.group)
        of_mean, of_deviation = sums / count
        scale = inverse_deviation if weight is None else inverse_deviation * weight
        at_x = along(scale) * (grad - along(of_mean) - centred * along(of_deviation * inverse_deviation.square()))
        return at_x.to(x.dtype), at_weight, at_bias, None, None


# The newer name of the same collective; the older one warns from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
