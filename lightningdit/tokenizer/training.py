"""One update of a VA-VAE: the networks that take part, and the gradients of the whole batch on any number of micro-batches and processes.

Each term of the loss is a mean over images, so gradients are those of the whole batch whatever it is cut into, and so are the adaptive
weights (losses.py). The one exception is the discriminator's BatchNorm, whose statistics are those of a micro-batch, as the official
code's are those of a process's batch.
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

from lightningdit import checkpoint
from lightningdit.distributed import average_over_ranks, generator_for
from lightningdit.images import to_pixels
from lightningdit.optim import lr_at
from lightningdit.optional import progress_bar
from lightningdit.tokenizer import losses
from lightningdit.tokenizer.autoencoder import Posterior

SAVE_EVERY_S = 60  # how much of a classifier's training a kill may cost


class Networks:
    """The autoencoder and what trains it.

    Args:
        autoencoder: AutoencoderKL. projection: LatentProjection, or None without alignment.
        discriminator: PatchDiscriminator, or None. perceptual: PerceptualLoss, or None.
        bf16: run encoder, decoder and discriminator in bf16 autocast; latents, projection, LPIPS and all losses stay fp32.
        channels_last: memory format of the convolutions.
    Attributes: generator, a module of autoencoder and projection (`linear_proj`, the official name), with one optimizer.
    """

    def __init__(self, autoencoder, projection=None, discriminator=None, perceptual=None, *, device="cpu", bf16=False, channels_last=False):
        modules = dict(autoencoder=autoencoder) | (dict(linear_proj=projection) if projection is not None else {})
        self.generator = nn.ModuleDict(modules).to(device)
        self.autoencoder, self.projection, self.discriminator, self.perceptual = autoencoder, projection, discriminator, perceptual
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for module in (autoencoder, discriminator, perceptual):
            if module is not None:
                module.to(device, memory_format=self.memory_format)
        self.bf16 = bf16

    def __repr__(self):
        modules = dict(autoencoder=self.autoencoder, projection=self.projection, discriminator=self.discriminator)
        sizes = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in modules.items() if module is not None}
        return ", ".join(f"{name} {size:.2f} M" for name, size in sizes.items()) + (", LPIPS" if self.perceptual is not None else "")

    def autocast(self, x):
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16)

    def discriminate(self, images):
        with self.autocast(images):
            return self.discriminator(images).float()

    def compile(self, **options):
        """torch.compile(**options) of each level: the last layers, at which the adaptive weights are measured, stay outside.

        A compiled level's backward makes all of its gradients at once, also where only those that pass through are asked for.
        """
        torch._functorch.config.donated_buffer = False  # the adaptive weights go through the graph more than once
        encoder, decoder = self.autoencoder.encoder, self.autoencoder.decoder
        for level in (*encoder.down, encoder.mid, decoder.mid, *decoder.up):
            level.compile(**options)

    def trained(self):
        """[(name, module)] of those with an optimizer."""
        modules = dict(generator=self.generator, discriminator=self.discriminator)
        return [(name, module) for name, module in modules.items() if module is not None]

    def tensors(self, optimizers):
        """What a checkpoint holds of them: weights, optimizer states and PyTorch's generators."""
        groups = {}
        for (name, module), optimizer in zip(self.trained(), optimizers, strict=True):
            groups |= {name: module.state_dict(), f"{name}_trainer": checkpoint.trainer_tensors(module, optimizer)}
        return groups

    def restore(self, path, optimizers):
        """Undoes `tensors` from the checkpoint `path`."""
        for (name, module), optimizer in zip(self.trained(), optimizers, strict=True):
            module.load_state_dict(checkpoint.load_tensors(path, name))
            checkpoint.load_trainer(path, module, optimizer, group=f"{name}_trainer")


def backward(nets, x, noise, features=None, *, micro_batch=None, adversarial=False, kl_weight=1e-6, perceptual_weight=1.0, vf_weight=0.1,
             adaptive_vf=True, cos_margin=0.5, distmat_margin=0.25, disc_weight=0.5):
    """Adds the gradients of one update to the .grad of the networks' parameters: those of the mean over the whole batch, on every process.

    Where there are several micro-batches, the adaptive weights need the gradients of all of them before any can be weighed: a first pass
    over the micro-batches measures them, a second one trains. Without adaptive weights there is no first pass.

    Gradients are averaged at the end by torch.distributed's all-reduce. DistributedDataParallel expects a backward pass after each forward
    pass, through the same parameters every time; here layers' gradients are asked for in between, the first pass has no backward, the
    discriminator is frozen for half of the update, and the projection goes unused in stages without alignment.

    Args:
        nets: Networks. x: (b, C, H, W), pixels of this process in [-1, 1]. noise: (b, z, h, w), of the posterior samples.
        features: (b, N, F) of the frozen encoder; None: no alignment.
        micro_batch: images in one forward pass, a divisor of b; None: all.
        adversarial: whether the discriminator takes part. It is trained on the same reconstructions.
        The others: as in losses.generator_loss.
    Returns: {name: scalar tensor}, the means over micro-batches and processes of all terms, weights and the two losses, without gradient.
    """
    parts = [slice(i, i + (micro_batch or len(x))) for i in range(0, len(x), micro_batch or len(x))]
    aligned = features is not None and vf_weight > 0
    layers = dict(encoder_layer=nets.autoencoder.encoder.conv_out.weight if aligned and adaptive_vf else None,
                  decoder_layer=nets.autoencoder.decoder.conv_out.weight if adversarial else None)

    def forward(part):
        pixels = x[part].contiguous(memory_format=nets.memory_format)
        with nets.autocast(x):
            posterior = nets.autoencoder.encode(pixels)
        posterior = Posterior(posterior.mean.float(), posterior.logvar.float())
        z = posterior.mean + posterior.std * noise[part]
        vf_loss = nets.projection.alignment_loss(z, features[part], cos_margin, distmat_margin) if aligned else None
        with nets.autocast(x):
            x_hat = nets.autoencoder.decode(z)
        x_hat = x_hat.float()
        return x_hat, losses.generator_terms(
            pixels, x_hat, posterior, vf_loss, perceptual=nets.perceptual if perceptual_weight else None,
            perceptual_weight=perceptual_weight, discriminator=nets.discriminate if adversarial else None)

    def weigh(measured):
        """Adaptive weights from the layer_gradients of every micro-batch."""
        gradients = {name: [sum(grads) / len(measured) for grads in zip(*(found[name] for found in measured), strict=True)]
                     for name in measured[0]}
        average_over_ranks([grad for pair in gradients.values() for grad in pair])
        weights = losses.adaptive_weights(gradients, vf_weight, disc_weight)
        return weights | (dict(vf_weight=x.new_tensor(vf_weight)) if aligned and not adaptive_vf else {})

    if adversarial:
        nets.discriminator.requires_grad_(False)
    weights = None
    if len(parts) > 1 and any(layer is not None for layer in layers.values()):
        weights = weigh([losses.layer_gradients(forward(part)[1], **layers) for part in parts])
    totals = {}
    for part in parts:
        x_hat, terms = forward(part)
        if weights is None:
            weights = weigh([losses.layer_gradients(terms, **layers)])
        loss = losses.weighted_sum(terms, weights, kl_weight)
        (loss / len(parts)).backward()
        values = dict(loss=loss, **terms, **weights)
        if adversarial:
            nets.discriminator.requires_grad_(True)
            values["disc_loss"] = losses.discriminator_loss(x[part].contiguous(memory_format=nets.memory_format), x_hat, nets.discriminate)
            (values["disc_loss"] / len(parts)).backward()
            nets.discriminator.requires_grad_(False)
        totals = {name: totals.get(name, 0) + value.detach() / len(parts) for name, value in values.items()}
    if adversarial:
        nets.discriminator.requires_grad_(True)
    for _, module in nets.trained():
        average_over_ranks([p.grad for p in module.parameters() if p.grad is not None])
    means = torch.stack(list(totals.values()))
    average_over_ranks([means])
    return dict(zip(totals, means.unbind(), strict=True))


def update(optimizer, lr):
    """One step at learning rate `lr` with the gradients that are there, which are gone afterwards."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def train_classifier(encoder, batches, *, steps, lr, translate, seed, log_every=100, state=None, deadline=None):
    """Teaches a SmallEncoder the classes of images, each moved at random by up to `translate` pixels, and returns it.

    Args:
        batches: batches(start) -> iterator of (images uint8 (B, H, W, C), labels (B,), ...) from step `start` on. seed: of the moves.
        state: a .pt file that gets all that is needed to go on, every minute and at the deadline; where it is there already, training goes
            on from it, on a CPU to the same weights. It stays: remove it when the encoder is kept.
        deadline: of time.monotonic(), or None.
    Raises: TimeoutError at the deadline; SystemExit for a loss that is not finite; CheckpointError for another training's state.
    """
    device = next(encoder.parameters()).device
    optimizer, start = torch.optim.AdamW(encoder.parameters(), fused=True), 0
    schedule = dict(steps=steps, lr=lr, translate=translate, seed=seed)
    if state is not None and state.is_file():
        start = _load_classifier(state, encoder, optimizer, schedule)
    found, saved = batches(start), time.monotonic()
    bar = progress_bar(range(start, steps), desc="encoder", unit="step", mininterval=1, initial=start, total=steps)
    for step in bar:
        now = time.monotonic()
        late = deadline is not None and now > deadline
        if state is not None and (late or now - saved > SAVE_EVERY_S):
            content = dict(step=step, schedule=schedule, encoder=encoder.state_dict(), optimizer=optimizer.state_dict())
            checkpoint.save_whole(state, lambda path, content=content: torch.save(content, path))
            saved = now
        if late:
            raise TimeoutError(f"the deadline came at step {step} of {steps} of the classifier")
        images, labels, *_ = next(found)
        x = _translated(to_pixels(images), translate, generator_for(seed, "shift", step)).to(device)
        loss = F.cross_entropy(encoder(x), labels.to(device), label_smoothing=0.1)
        loss.backward()
        update(optimizer, lr_at(step, lr=lr, steps=steps, schedule="cosine"))
        if (step + 1) % log_every == 0 or step + 1 == steps:
            value = loss.item()
            if not math.isfinite(value):
                raise SystemExit(f"error: the encoder's loss is {value} at step {step + 1}; a lower encoder.lr may help")
            bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
    return encoder


def _load_classifier(path, encoder, optimizer, schedule):
    """Fills both from a state of train_classifier, and returns the step to go on from."""
    content = checkpoint.read_file(path)
    if (found := content.get("schedule")) != schedule:
        raise checkpoint.CheckpointError(f"state: {path} is of a training with {found}, expected {schedule}; remove it to begin anew")
    try:
        encoder.load_state_dict(content["encoder"])
    except RuntimeError as error:
        raise checkpoint.CheckpointError(f"state: {path} is of another encoder ({error})") from None
    optimizer.load_state_dict(content["optimizer"])
    return content["step"]


def _translated(x, pixels, generator):
    """Moves each image by up to `pixels` along both axes; its edge fills what comes in."""
    size, padded = x.shape[2:], F.pad(x, (pixels,) * 4, mode="replicate")
    corners = torch.randint(2 * pixels + 1, (len(x), 2), generator=generator).tolist()
    return torch.stack([image[:, top : top + size[0], left : left + size[1]] for image, (top, left) in zip(padded, corners, strict=True)])


class CachedFeatures:
    """features(pixels, indices) of an encoder, computed for an image when it first comes and then kept in memory, on the CPU.

    For images that are the same each epoch only: the features of one random crop are not those of another.

    Args:
        encoder: with `features` and `feature_channels`. count: images in all; memory is count * N * F values of the encoder's dtype.
    """

    def __init__(self, encoder, count):
        self.encoder, self.known, self.kept = encoder, torch.zeros(count, dtype=torch.bool), None

    def __call__(self, pixels, indices):
        if self.known[indices].all():
            return self.kept[indices].to(pixels.device, non_blocking=True)
        features = self.encoder.features(pixels)
        if self.kept is None:
            self.kept = torch.empty(len(self.known), *features.shape[1:], dtype=features.dtype)
        self.kept[indices], self.known[indices] = features.cpu(), True
        return features


def activation_bytes(nets, size, channels):
    """Bytes that one image's forward pass keeps for its backward, by part, counted on the meta device. `nets` is there afterwards.

    Args:
        size: side in pixels. channels: of the image.
    Returns: {"autoencoder", "LPIPS", "discriminator"} of those that are there.
    """
    dtype = torch.bfloat16 if nets.bf16 else torch.float32
    x = torch.empty(1, channels, size, size, device="meta")

    def reconstruct():
        posterior = nets.autoencoder.to("meta", dtype).encode(x.to(dtype))
        return nets.autoencoder.decode(posterior.mean)

    x_hat = x.clone().requires_grad_()
    passes = dict(autoencoder=reconstruct)
    if nets.perceptual is not None:
        passes["LPIPS"] = lambda: nets.perceptual.lpips.to("meta")(x.expand(-1, 3, -1, -1), x_hat.expand(-1, 3, -1, -1))
    if nets.discriminator is not None:
        passes["discriminator"] = lambda: nets.discriminator.to("meta", dtype)(x_hat.to(dtype))
    counted = {}
    for name, run in passes.items():
        kept = {}

        def keep(tensor, kept=kept):
            if not isinstance(tensor, nn.Parameter):
                kept[tensor.untyped_storage()._cdata] = tensor  # holding it keeps its storage's address from being used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = run()
        counted[name] = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del output
    return counted
