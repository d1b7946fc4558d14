"""The weights of a classification head: whole on every rank, or the classes cut over the ranks.

C classes, k centres a class, D embedding size.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cel_dist.errors import CelError
from cel_dist.losses.exchange import Exchange

# Weights are drawn block by block, each from a generator of its own, so that a rank draws no more than its classes.
_CLASSES_OF_A_BLOCK = 1024


class ClassWeights(nn.Module):
    """One or more centres a class.

    Replicated weights are parameters of the module, whose gradients the engine averages as all others. Sharded ones are
    no parameters and no buffers: an engine would replace them by those of rank 0 and average their gradients. Whoever
    trains them gives `sharded_parameters` to an optimizer of this rank.

    Args:
        embedding_dim: D.
        classes: C, at least 2.
        sub_centres: k.
        with_bias: whether every class has a bias, too.
        group: the ranks that share the batch, None for this process alone.
        sharded: whether the classes are cut over them.
        seed: of the initial weights, which depend on nothing else: not on the number of ranks, nor on whether they are
            sharded. None draws it from torch's generator, which must be in the same state on all ranks.

    Attributes:
        weight: [C, D], with sub-centres [C, k, D]; of a sharded head, those of the classes in `shard_range`.
        bias: [C] likewise, or None.
        classes: C.

    Raises:
        CelError: sizes or seed out of range, or more ranks than classes to be sharded.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        embedding_dim: int,
        classes: int,
        sub_centres: int,
        with_bias: bool,
        group: dist.ProcessGroup | None,
        sharded: bool,
        seed: int | None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("embedding_dim", embedding_dim, 1),
            ("classes", classes, 2),
            ("sub_centres", sub_centres, 1),
            ("seed", 0 if seed is None else seed, 0),
        ):
            if value < least:
                raise CelError(f"{name} of the head is {value}; give at least {least}")
        self.classes = classes
        self.group = group
        self.sharded = sharded
        self._shape = (classes, *([sub_centres] if sub_centres > 1 else []), embedding_dim)
        # Rows are gathered whole or not at all: every rank compares its classes with all of them at once.
        self._exchange = Exchange(group, "gather")
        if sharded and self._exchange.world_size > classes:
            raise CelError(
                f"{classes} classes cannot be cut over {self._exchange.world_size} ranks; replicate the head, or use "
                "fewer ranks"
            )
        weight, bias = self._draw(int(torch.randint(2**62, ())) if seed is None else seed, with_bias)
        if sharded:
            self.weight, self.bias = weight.requires_grad_(), bias if bias is None else bias.requires_grad_()
        else:
            self.weight = nn.Parameter(weight)
            self.register_parameter("bias", bias if bias is None else nn.Parameter(bias))

    @property
    def centres(self) -> Tensor:
        """`weight` as [C, k, D], also with one centre a class."""
        return self.weight if self.weight.ndim == 3 else self.weight[:, None]

    @property
    def shard_range(self) -> tuple[int, int]:
        """First class of this rank, and the one after its last; all classes where they are replicated."""
        return self._range_of(self._exchange.rank) if self.sharded else (0, self.classes)

    def sharded_parameters(self) -> dict[str, Tensor]:
        """This rank's part of sharded weights by name, for an optimizer of its own; empty where they are replicated.

        Their gradient after the backward pass is that of the global mean loss, and not to be averaged over the ranks.
        """
        return self._tensors() if self.sharded else {}

    @torch.no_grad()
    def class_weights(self) -> dict[str, Tensor]:
        """Copies of the weights of all classes on every rank: `weight` [C, D] or [C, k, D], and `bias` [C] if any.

        All ranks call this together if the head is sharded. Under ZeRO-3, replicated weights have to be gathered first.
        """
        if not self.sharded:
            return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        return {name: self._gathered(tensor) for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load_class_weights(self, weights: dict[str, Tensor], rows: Tensor) -> None:
        """Set the weights of some classes. A rank of a sharded head takes those of its own, and is given all.

        Args:
            weights: `weight` [n, D] or [n, k, D], and `bias` [n] where there is one; other names are an error.
            rows: [n] int64 the classes that they belong to, each at most once.

        Raises:
            CelError: names or shapes are not those of this head, or a class is unknown or given twice.
        """
        own = self._tensors()
        if weights.keys() != own.keys():
            raise CelError(f"weights of a head are named {', '.join(weights)}; this head has {', '.join(own)}")
        # The shapes of parameters are not asked for, because under ZeRO-3 a rank may have none of them.
        shapes = {"weight": self._shape[1:], "bias": ()}
        for name, given in weights.items():
            if given.shape != (len(rows), *shapes[name]):
                wanted = [len(rows), *shapes[name]]
                raise CelError(f"{name} of {len(rows)} classes has shape {list(given.shape)}; this head takes {wanted}")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.classes:
            raise CelError(f"classes {int(rows.min())} to {int(rows.max())} are given; the head has {self.classes}")
        if len(set(rows.tolist())) < len(rows):
            raise CelError("a class of the head is given twice; give each at most once")
        first, end = self.shard_range
        inside = (rows >= first) & (rows < end)
        for name, given in weights.items():
            tensor = own[name]
            tensor[(rows[inside] - first).to(tensor.device)] = given[inside].to(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ClassWeights":
        """What moves or converts the module does so with its shard, which stays the tensor that an optimizer has."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in self.sharded_parameters().values():
            gradient, tensor.grad = tensor.grad, None
            tensor.data = fn(tensor.data)
            tensor.grad = None if gradient is None else fn(gradient)
        return self

    def _tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, **({} if self.bias is None else {"bias": self.bias})}

    def _range_of(self, rank: int) -> tuple[int, int]:
        world_size = self._exchange.world_size
        return rank * self.classes // world_size, (rank + 1) * self.classes // world_size

    def _gathered(self, tensor: Tensor) -> Tensor:
        ranges = [self._range_of(rank) for rank in range(self._exchange.world_size)]
        # Ranks may differ by a class, and a collective takes vectors of one length.
        padded = tensor.new_zeros((max(end - first for first, end in ranges), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = self._exchange.gather_vectors(padded.flatten()).view(len(ranges), *padded.shape)
        return torch.cat([part[: end - first] for part, (first, end) in zip(parts, ranges, strict=True)])

    def _draw(self, seed: int, with_bias: bool) -> tuple[Tensor, Tensor | None]:
        """Own classes' weights, normal with the deviation of Glorot and Bengio 2010; with a bias, both as nn.Linear."""
        dim = self._shape[-1]
        deviation, limit = math.sqrt(2 / (self.classes + dim)), 1 / math.sqrt(dim)
        first, end = self.shard_range
        weights, biases = [], []
        for start in range(first - first % _CLASSES_OF_A_BLOCK, end, _CLASSES_OF_A_BLOCK):
            entropy = np.random.SeedSequence([seed, start]).generate_state(1)
            generator = torch.Generator().manual_seed(int(entropy[0]))
            num_classes = min(_CLASSES_OF_A_BLOCK, self.classes - start)
            weight, bias = torch.empty(num_classes, *self._shape[1:]), torch.empty(num_classes)
            if with_bias:
                weight.uniform_(-limit, limit, generator=generator)
                bias.uniform_(-limit, limit, generator=generator)
            else:
                weight.normal_(0.0, deviation, generator=generator)
            own = slice(max(first - start, 0), end - start)
            weights.append(weight[own])
            biases.append(bias[own])
        return torch.cat(weights), torch.cat(biases) if with_bias else None
