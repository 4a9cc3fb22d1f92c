"""Looking again at a batch that the guard left out: `lightningdit replay --incident RUN/incidents/step_0000123.safetensors`."""
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from . import checkpoint, optim
from .config import ConfigError, DiTConfig, begun_precision, load
from .distributed import pick_device
from .model import LightningDiT
from .training import losses


def replay(incident: Path, checkpoint_step: int | None = None, device: str = "auto", precision: str = "run", worst: int = 10) -> int:
    """Computes the losses and gradients of a kept batch, image by image, with the weights of a checkpoint of its run.

    Args:
        incident: RUN/incidents/step_XXXXXXX.safetensors.
        checkpoint_step: whose weights; default: the newest checkpoint before the incident, or the oldest there is.
        device: auto, cpu or cuda.
        precision: run (as it was trained; fp8 as bf16), fp32 or bf16; one that is bad in bf16 and good in fp32 is a matter of range or
            rounding.
        worst: images to list, by the norm of their own gradient; those that are not finite come first.
    """
    run, step = incident.parent.parent, int(incident.stem.removeprefix("step_"))
    if precision not in ("run", "fp32", "bf16"):
        raise ConfigError(f"precision: got {precision!r}, expected run, fp32 or bf16")
    if not incident.is_file():
        raise FileNotFoundError(f"incident: no file {incident}")
    try:
        batch = load_file(incident)
        indices = batch.pop("indices")
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"incident: {incident} is damaged or not a kept batch ({error})") from None
    config, device = load(DiTConfig, run / "config.yaml"), pick_device(device)
    steps = dict(checkpoint.list_checkpoints(run))
    if checkpoint_step is None and steps:
        checkpoint_step = max((s for s in steps if s < step), default=min(steps))
    if checkpoint_step not in steps:
        raise checkpoint.CheckpointError(f"checkpoint_step: got {checkpoint_step}, expected one of {', '.join(map(str, steps)) or 'none'}")
    checkpoint.check(steps[checkpoint_step])
    model = LightningDiT(**config.model_arguments()).to(device).train()
    model.load_weights(checkpoint.load_tensors(steps[checkpoint_step], "model"))
    guide = None
    if config.flow.guides(step - 1):
        guide = optim.frozen_copy(model)
        guide.load_weights(checkpoint.load_tensors(steps[checkpoint_step], "ema"))
    bf16 = (begun_precision(config, device) if precision == "run" else precision) != "fp32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    rows, parameters = [], [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(len(indices)):
        one = {name: tensor[i : i + 1].to(device) for name, tensor in batch.items()}
        terms = losses(config, model, autocast, guide=guide, **one)
        loss = sum(term.sum() for term in terms.values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        torch._foreach_add_(total, gradients, alpha=1 / len(indices))
        rows.append((float(torch.nn.utils.get_total_norm(gradients)), float(loss.detach()), i))
    bad = [row for row in rows if not (math.isfinite(row[0]) and math.isfinite(row[1]))]
    print(f"step {step}, weights of step {checkpoint_step}, {'bf16' if bf16 else 'fp32'} on {device.type}: {len(rows)} images, mean loss "
          f"{sum(row[1] for row in rows) / len(rows):.6g}, gradient norm {float(torch.nn.utils.get_total_norm(total)):.6g}, "
          f"{len(bad)} images not finite")
    print(f"{'index':>10} {'label':>6} {'t':>8} {'loss':>12} {'gradient norm':>14} {'largest latent':>15}")
    good = sorted((row for row in rows if row not in bad), reverse=True)
    for norm, loss, i in (bad + good)[:worst]:
        print(f"{int(indices[i]):>10} {int(batch['y'][i]):>6} {float(batch['t'][i]):>8.5f} {loss:>12.6g} {norm:>14.6g} "
              f"{float(batch['x1'][i].abs().max()):>15.6g}")
    return 0
