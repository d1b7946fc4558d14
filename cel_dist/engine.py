"""DeepSpeed: the engine around the objective, and what is asked of it during training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cel_dist import engine_checkpoint
from cel_dist.config import Config
from cel_dist.distributed import World
from cel_dist.engine_shards import Shards
from cel_dist.losses.batch import Findings
from cel_dist.random_state import random_state, restore_random_state


class Engine:
    """The objective, wrapped by DeepSpeed, with Adam in two parameter groups: encoder and loss. Class weights that are
    sharded stay outside of DeepSpeed, with an Adam of their own (`engine_shards`).

    Args:
        objective: module with submodules `encoder` and `loss`; its forward returns what the loss returns.
        config: the run's configuration.
        world: this process's place in the job.
        device: where to compute.
    """

    def __init__(self, objective: nn.Module, config: Config, world: World, device: torch.device) -> None:
        import deepspeed

        self._world = world
        self._stage = config.engine.zero_stage
        self._chunks = config.train.encode_chunks
        self._clip_norm = config.optim.clip_norm
        # Of each parameter group.
        self._rates = (1.0, (config.optim.head_lr or config.optim.lr) / config.optim.lr)
        encoder = list(objective.get_submodule("encoder").parameters())
        loss = list(objective.get_submodule("loss").parameters())
        groups: list[dict[str, Any]] = [{"params": encoder, "weight_decay": config.optim.weight_decay}]
        if loss:
            # Decay would pull w towards 0, which has nothing to do with how complex the encoder is.
            groups.append({"params": loss, "weight_decay": 0.0})
        # A DeepSpeed optimizer would compile a kernel for over a minute on a CPU.
        self._optimizer: Any = torch.optim.AdamW(groups, lr=config.optim.lr, fused=True)
        self._engine, *_ = deepspeed.initialize(
            model=objective.to(device), optimizer=self._optimizer, config=deepspeed_settings(config, world)
        )
        engine_checkpoint.initialise(self._engine)
        # What classifies, of a loss that does.
        self._head: Any = getattr(objective.get_submodule("loss"), "head", None)
        self._shards = None
        if self._head is not None and self._head.sharded:
            self._shards = Shards(self._head, world.rank, config.optim.lr * self._rates[1])
        self._norm: Tensor | None = None
        self._before_pass: _Buffers | None = None
        # A script for reading DeepSpeed's files, which `model/` makes needless, and which rank 0 alone could fail to
        # write.
        self._engine._copy_recovery_script = lambda folder: None

    @property
    def objective(self) -> nn.Module:
        """The module inside the engine. Under ZeRO-3 its parameters are empty outside forward."""
        module: nn.Module = self._engine.module
        return module

    def problem(self) -> Callable[[], str | None]:
        """What says what was wrong with the last batch, also when there are others after it; None if the loss found
        nothing. The host waits for it."""
        findings: tuple[Findings, ...] = self.objective.get_submodule("loss").findings  # type: ignore[assignment]
        return lambda: next((str(error) for found in findings if (error := found.error())), None)

    def forward_backward(self, features: Tensor, ids: Tensor | None = None) -> Any:
        """Compute the loss in training mode, and the gradients, averaged over the ranks.

        With `train.encode_chunks` above 1 the rows are encoded in so many parts, without keeping what the gradient
        needs; the loss of the whole batch gives the gradient at the embeddings, and every part is encoded once more to
        take it further. Memory is that of a part, time that of one more forward pass, and the gradient the same for
        encoders that treat every row by itself. Batch norm normalises by the rows of a part; its running statistics
        move once a step, by the mean of the parts.

        Args:
            features: [B, V, M, F] of this rank.
            ids: [B] int64 ids of the samples, or classes of the speakers, or None.

        Returns:
            What the loss returns.
        """
        self._engine.train()
        self._norm = None
        self._before_pass = _Buffers(self.objective)
        if self._chunks > 1:
            return self._in_chunks(features, ids)
        output = self._engine("whole", features, ids)
        self._engine.backward(output.loss)
        return output

    def _in_chunks(self, features: Tensor, ids: Tensor | None) -> Any:
        chunks = features.chunk(self._chunks)
        drawn_from = random_state(features.device)
        # Not those of the loss: it is computed once, and what it made of them stays.
        buffers = _Buffers(self.objective.get_submodule("encoder"))
        with torch.no_grad():
            embeddings = torch.cat([self._engine("embed", chunk) for chunk in chunks]).requires_grad_()
        # Dropout is to repeat itself.
        restore_random_state(drawn_from, features.device)
        with self._one_reduction():
            output = self._engine("compare", embeddings, ids)
            self._engine.backward(output.loss)
            assert embeddings.grad is not None
            for chunk, gradients in zip(chunks, embeddings.grad.chunk(self._chunks), strict=True):
                buffers.restore()
                self._engine.backward(self._engine("pull", chunk, gradients))
                buffers.add(len(chunk) / len(features))
            buffers.move_by_the_mean()
        return output

    @contextmanager
    def _one_reduction(self) -> Iterator[None]:
        """Average the gradients of all backward passes in the block at its end."""
        if self._stage > 0:
            with self._engine.coalesce_grad_reduction():
                yield
            return
        with self._engine.no_sync():
            yield
        self._engine.allreduce_gradients()

    def gradient_norm(self) -> Tensor:
        """Norm of the averaged gradient over all parameters, a scalar that is the same on all ranks, before
        clipping."""
        gradients = self._gradients()
        total = _sum_of_squares(gradients)
        own = _sum_of_squares(self._shards.gradients()) if self._shards else torch.zeros_like(total)
        # From stage 1 on a rank holds the averaged gradient of its partition only, and of shards always its own.
        if self._stage > 0:
            own, total = own + total, torch.zeros_like(total)
        if self._stage > 0 or self._shards:
            dist.all_reduce(own)
        self._norm = (total + own).sqrt()
        return self._norm

    def step(self, learning_rate: float, refused: Tensor | None = None) -> None:
        """Clip if configured, update the parameters, keep the loss parameters in their range and the batch-norm
        statistics equal on all ranks.

        Args:
            learning_rate: of the encoder.
            refused: float32 scalar on the device. Where it is 1, nothing changes: neither parameters nor what the
                optimizer has of them, and buffers are what they were before `forward_backward`.
        """
        if self._clip_norm > 0:
            self._clip()
        for group, rate in zip(self._engine.optimizer.param_groups, self._rates, strict=False):
            group["lr"] = learning_rate * rate
        # Fused kernels leave everything alone where it is 1.
        self._optimizer.found_inf = refused
        self._engine.step()
        if self._shards:
            self._shards.step(learning_rate * self._rates[1], refused)
        self._keep_scale_in_range()
        self._average_buffers()
        if refused is not None:
            assert self._before_pass is not None
            self._before_pass.restore_where(refused > 0)

    def _clip(self) -> None:
        """Scale the gradients down to the norm that is allowed. DeepSpeed's own clipping knows nothing of shards."""
        norm = self.gradient_norm() if self._norm is None else self._norm
        factor = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in [*self._gradients(), *(self._shards.gradients() if self._shards else [])]:
            gradient.mul_(factor.to(gradient.dtype))

    def _keep_scale_in_range(self) -> None:
        loss = self.objective.get_submodule("loss")
        # w and b; class weights have no range.
        scalars = [] if getattr(loss, "w", None) is None else list(loss.parameters())
        if not scalars:
            return
        with self._whole(scalars, write=True):
            loss.clamp_scale()  # type: ignore[operator]
        if self._stage == 0:
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        # The optimizer has a copy of its own of every parameter, from which the next step goes on.
        for parameter in scalars:
            if self._stage == 3:
                # Given the whole, DeepSpeed would cut from one number a part for every rank.
                safe_set_local_fp32_param(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]
            else:
                safe_set_full_fp32_param(parameter, parameter.detach())

    def _average_buffers(self) -> None:
        """Replace running statistics by their mean over the ranks: the engine saves rank 0's for all. After each
        step, because averaging less often rounds differently, and a resumed run must repeat every bit."""
        buffers = [buffer for buffer in self.objective.buffers() if buffer.is_floating_point()]
        if self._world.size == 1 or not buffers:
            return
        packed = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.all_reduce(packed)
        means = torch.split(packed / self._world.size, [buffer.numel() for buffer in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean.view_as(buffer))

    def encoder_state(self) -> dict[str, Tensor]:
        """The encoder's whole state dict on the CPU, on every rank."""
        encoder = self.objective.get_submodule("encoder")
        with self._whole(list(encoder.parameters())):
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in encoder.state_dict().items()}

    def loss_scalars(self) -> dict[str, float]:
        """The loss's scalars by name: w and b, the margin, the scale of AdaCos."""
        if self._head is not None:
            scalars: dict[str, float] = self._head.scalars()
            return scalars
        loss = self.objective.get_submodule("loss")
        with self._whole(list(loss.parameters())):
            return {name: parameter.item() for name, parameter in loss.named_parameters()}

    def set_margin(self, margin: float) -> None:
        """The margin of the next steps, for a loss that has one."""
        self._head.margin = margin

    def class_weights(self) -> dict[str, Tensor] | None:
        """Class weights by name, whole, on the CPU of every rank; None for a loss without. All ranks call this."""
        if self._head is None:
            return None
        with self._whole(list(self._head.parameters())):
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._head.class_weights().items()}

    def snapshot(self) -> dict[str, Any]:
        """What this rank has to save, copied to the CPU: files by name, for `torch.save`. All ranks call this."""
        return {**engine_checkpoint.snapshot(self._engine), **(self._shards.snapshot() if self._shards else {})}

    def load(self, checkpoint: Path) -> None:
        """Read what `snapshot` gave to ranks of the same number under the same stage, from `checkpoint/engine`; under
        stage 0 to any number. All ranks call this.

        Raises:
            RunError: files are missing or damaged.
        """
        engine_checkpoint.restore(self._engine, checkpoint)
        self._load_shards(checkpoint)

    def load_universal(self, folder: Path, checkpoint: Path) -> None:
        """Read what `engine_checkpoint.write_universal` wrote, whatever ranks and stage it came from. All ranks call
        this.

        Args:
            folder: what it wrote.
            checkpoint: what it wrote that from, in which shards fit any number of ranks.

        Raises:
            RunError: files are missing or damaged.
        """
        engine_checkpoint.restore_universal(self._engine, folder)
        self._load_shards(checkpoint)

    def _load_shards(self, checkpoint: Path) -> None:
        if self._shards:
            self._shards.restore(checkpoint / engine_checkpoint.FOLDER)

    def _gradients(self) -> list[Tensor]:
        if self._stage == 0:
            return [parameter.grad for parameter in self.objective.parameters() if parameter.grad is not None]
        by_group = self._engine.optimizer.averaged_gradients
        return [gradient for group in by_group.values() if group is not None for gradient in group]

    def _whole(self, parameters: list[nn.Parameter], write: bool = False) -> Any:
        import deepspeed

        # All ranks compute the same value, so the one of rank 0 stands for all when something was written.
        return deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0 if write else None, enabled=self._stage == 3
        )


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.float().square().sum() for tensor in tensors]).sum()


class _Buffers:
    """Buffers of a module as they were, and where passes over parts of a batch, each from there, take them in the
    mean."""

    @torch.no_grad()
    def __init__(self, module: nn.Module) -> None:
        self._buffers = list(module.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]
        self._moves: list[Tensor] = []

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """`restore` if a bool scalar on the device is true."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            torch.where(condition, before, buffer, out=buffer)

    @torch.no_grad()
    def add(self, share: float) -> None:
        """Take in what a pass over this share of the rows made of them."""
        if not self._moves:
            self._moves = [torch.zeros_like(buffer) for buffer in self._buffers]
        for buffer, before, move in self._averaged():
            # What did not move may be infinite, such as a mask.
            move.add_(torch.where(buffer == before, 0.0, buffer - before), alpha=share)

    @torch.no_grad()
    def move_by_the_mean(self) -> None:
        for buffer, before, move in self._averaged():
            buffer.copy_(before + move)

    def _averaged(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All but counters, which every pass leaves alike."""
        for row in zip(self._buffers, self._before, self._moves, strict=True):
            if row[0].is_floating_point():
                yield row


def deepspeed_settings(config: Config, world: World) -> dict[str, Any]:
    """The DeepSpeed configuration that belongs to a run."""
    stage = config.engine.zero_stage
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.batch_size // world.size,
        "gradient_accumulation_steps": 1,
        # DeepSpeed clips at 1.0 unless told otherwise; `Engine` clips.
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "compute_grad_norm": stage not in (1, 2)},
        # It would wait for the device twice a step, and the norm once more; stage 3 has no way to leave its norm out.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if config.train.precision == "bf16":
        # `bf16` would cast the parameters too: w would then move in steps of 1/16 and batch norm would break on a CPU.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return settings
