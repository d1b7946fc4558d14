"""The published way of a training step, re-created: work on single items in `__getitem__`, and plain fp32.

The encoder has the layers of `fast_resnet34` in torch's default memory format. The views pass one by one. The loss is
the angular prototypical one with uniformity within the views, as its formulas say (Mun et al. 2020, METHOD of the paper
section 3), by autograd; Adam has one group; the loss is read after every step. What public code does differently and
slower (float64 audio, a loader a view) is left out.
"""

import resource
import time
from pathlib import Path
from typing import Any

import torch
from per_item import SNR_DB, PerItem, _files_below
from torch import Tensor, nn
from torch.nn import functional as F

from cel_dist.encoders.fast_resnet34 import FastResNet34

WARM_UP = 3


class PlainFastResNet34(FastResNet34):
    """The same layers and numbers, in the memory format that torch has by default."""

    def forward(self, features: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.stem_norm(self.stem(features.unsqueeze(1)))))
        frames = x.mean(dim=2).transpose(1, 2)
        embeddings: Tensor = self.projection(self.pooling(frames))
        return embeddings


class PlainLoss(nn.Module):
    """Angular prototypical loss of two views, and the uniformity of each (PoN)."""

    def __init__(self, t: float = 2.0) -> None:
        super().__init__()
        self.w, self.b, self.t = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-5.0)), t

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, 2, D] to a scalar."""
        views = F.normalize(x, dim=2).unbind(dim=1)
        similar = self.w.clamp(min=1e-6) * views[0] @ views[1].T + self.b
        prototypical = F.cross_entropy(similar, torch.arange(len(x), device=x.device))
        uniform = [(-self.t * torch.pdist(view).square()).exp().mean().log() for view in views]
        return prototypical + torch.stack(uniform).mean()


def published(config_file: Path, steps: int) -> dict[str, Any]:
    """Seconds of whole steps, by the settings that `benchmarks/train.py` or `benchmarks/train_eer.py` wrote.

    Settings: `tree` or a list of `files`, `pieces`, `segment_samples`, `batch_size`, `workers`, `threads`; where they
    are given, `seed`, `snr_db` by kind of noise, `warmup_steps` of linear warm-up, and a file `weights` for what the
    encoder has learned in the end.
    """
    import yaml

    settings = yaml.safe_load(config_file.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings.get("seed", 0))
    files = settings.get("files") or _files_below(Path(settings["tree"]))
    dataset = PerItem(files, settings["segment_samples"], Path(settings["pieces"]), settings.get("snr_db", SNR_DB))
    dataset.reseed(settings.get("seed", 0))
    loader = torch.utils.data.DataLoader(
        dataset,
        settings["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=settings["workers"],
        worker_init_fn=_begin_worker,
        persistent_workers=settings["workers"] > 0,
        pin_memory=device.type == "cuda",
    )
    encoder, loss = PlainFastResNet34().to(device), PlainLoss().to(device)
    optimizer = torch.optim.Adam([*encoder.parameters(), *loss.parameters()], lr=1e-3)
    warmup = settings.get("warmup_steps", 0)
    seconds: list[float] = []
    waited: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < WARM_UP + steps:
        for features in loader:
            come = time.perf_counter()
            value = loss(torch.stack([encoder(view.to(device)) for view in features.unbind(dim=1)], dim=1))
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (len(seconds) + 1) / (warmup or 1))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            value.item()
            end = time.perf_counter()
            waited.append(come - begin)
            seconds.append(end - begin)
            begin = end
            if len(seconds) == WARM_UP + steps:
                break
    if "weights" in settings:
        torch.save(encoder.state_dict(), settings["weights"])
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"whole": seconds[WARM_UP:], "waited": waited[WARM_UP:], "peak_bytes": peak}


def _begin_worker(worker: int) -> None:
    information: Any = torch.utils.data.get_worker_info()
    information.dataset.reseed(information.seed)
    torch.set_num_threads(1)
