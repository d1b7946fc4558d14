"""torch, the instructions of the processor, and the GPUs."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from cel_dist.doctor.check import Check, Checks, tried

if TYPE_CHECKING:
    from cel_dist.doctor.examine import Settings

_REINSTALL = "reinstall it: pip install --force-reinstall torch, in the build for this machine (docs/install.md)"
_DRIVER = "compare the driver (nvidia-smi) with the CUDA version of torch; a new driver or another build of torch helps"
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def compute(settings: "Settings") -> Checks:
    """torch with a product, the processor, and every GPU with a product in bf16."""
    yield tried("torch", _torch, _REINSTALL)
    yield tried("processor", lambda: _processor(settings.precision), _REINSTALL, "note")
    yield tried("gpu", _gpu, _DRIVER, "fault")


def _torch() -> Check:
    import torch

    a = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64) % 7
    # Small whole numbers: the product is exact in fp32.
    if not torch.equal((a @ a).long(), a.long() @ a.long()):
        return Check("torch", "fault", f"{torch.__version__}: a product of matrices is wrong", _REINSTALL)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return Check("torch", "ok", f"{torch.__version__} ({build}), {torch.get_num_threads()} threads; products are right")


def _processor(precision: str | None) -> Check:
    import torch

    from cel_dist.training.processor import has_bf16_units

    flags = _flags()
    known = [name for name in _INSTRUCTIONS if name in flags]
    found = f"{platform.machine()} with {', '.join(known) or 'no vector instructions that are known'}"
    if has_bf16_units():
        found += "; has bf16 products"
        if precision == "fp32" and not torch.cuda.is_available():
            return Check("processor", "note", found, "set train.precision=bf16: it trains faster here")
        return Check("processor", "ok", f"{found}: train.precision=bf16 is the faster one on the CPU")
    found += "; no bf16 products"
    if precision == "bf16" and not torch.cuda.is_available():
        return Check("processor", "note", found, "set train.precision=fp32: bf16 takes many times as long here")
    return Check("processor", "ok", f"{found}: train.precision=fp32 is the one for the CPU")


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _gpu() -> Check:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        has_driver = Path("/dev/nvidiactl").exists()
        why = "this torch is built without CUDA" if torch.version.cuda is None else "CUDA finds none"
        if has_driver:
            return Check("gpu", "note", f"there is a driver, but {why}: training would be on the CPU", _DRIVER)
        return Check("gpu", "note", f"none ({why}): training is on the CPU", "nothing, unless there should be one")
    described = []
    for device in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        a = torch.full((256, 256), 0.5, dtype=torch.bfloat16, device=device)
        product = float((a @ a).float().mean())
        name = f"{properties.name} (compute {properties.major}.{properties.minor})"
        if product != 64.0:
            return Check("gpu", "fault", f"{name}: a product in bf16 is wrong", _DRIVER)
        native = "" if properties.major >= 8 else ", bf16 only emulated: set train.precision=fp32"
        described.append(f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free{native}")
    return Check("gpu", "ok", "; ".join(described) + "; products in bf16 are right")
