"""Trains a tokenizer: a VA-VAE whose latents are aligned with the features of a frozen encoder.

    python train/vavae.py                                      # the digits that scikit-learn ships, minutes on a CPU; `make assets`
    python train/vavae.py --data.path photos --data.image-size 32 --data.channels 3           # own images: one folder a class

(a) A small encoder learns the classes of the images and is frozen. (b) The autoencoder learns to reconstruct, with the KL term and the two
margin losses against the encoder's features. (c) The statistics of its latents are taken and saved with it. The run directory gets
tokenizer.safetensors, encoder.safetensors, config.yaml, log.jsonl, reconstructions.png and latent_map.png. Each command starts anew.

n images, B batch, C image channels, z latent channels, N tokens, F feature channels.
"""

import contextlib
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import trange

from lightningdit import config as configuration
from lightningdit import metrics
from lightningdit.config import VAVAEConfig
from lightningdit.distributed import generator_for, pick_device, seed_for
from lightningdit.images import ImageBatches, digits, open_images, to_pixels
from lightningdit.latents import batch_indices
from lightningdit.log import RunLog, image_grid, save_png, write_environment
from lightningdit.optim import lr_at
from lightningdit.tokenizer.autoencoder import AutoencoderKL
from lightningdit.tokenizer.foundation import SmallEncoder
from lightningdit.tokenizer.losses import LatentProjection, generator_loss
from lightningdit.tokenizer.vavae import Tokenizer, latent_statistics

RECIPE = Path(__file__).parent / "configs" / "vavae_digits.yaml"


def main(argv):
    start = time.perf_counter()
    config = configuration.parse(VAVAEConfig, argv, recipe=RECIPE, description=__doc__)
    device = pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    images, labels, classes = load_images(config.data)  # uint8 (n, H, W, C), int64 (n,)
    held_out, kept = split(len(images), config.data.val_fraction, config.seed)
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    configuration.save(config, run / "config.yaml")
    write_environment(run, device)

    encoder = train_encoder(config, images[kept], labels[kept], len(classes), device)
    with contextlib.closing(RunLog(run, 0, config.steps, config.log_every, config.batch_size, 0)) as log:
        autoencoder = train_autoencoder(config, images[kept], encoder, log, device)
        raw = draw_latents(autoencoder, images[kept], config.seed, device)
        tokenizer = Tokenizer(autoencoder, *latent_statistics(raw)).to(device)
        report = evaluate(config, tokenizer, encoder, images, labels, held_out, kept, device)
        log.event(config.steps, **report)

    about = dict(data=config.data.path or "scikit-learn digits", images=len(kept), seed=config.seed, steps=config.steps)
    tokenizer.provenance = about | report
    tokenizer_path = Path(config.tokenizer_out or run / "tokenizer.safetensors")
    tokenizer.save(tokenizer_path)
    encoder.save(config.encoder_out or run / "encoder.safetensors", tokenizer.provenance)
    pictures = draw(run, tokenizer, encoder, images[held_out], labels[held_out], config.seed, device)
    parameters = sum(p.numel() for p in autoencoder.parameters())
    print(f"{parameters:,} parameters, latents {autoencoder.downsample}x smaller of {tokenizer.latent_channels} channels, "
          f"{time.perf_counter() - start:.0f} s. On {len(held_out)} held-out images:")
    for name, value in report.items():
        print(f"  {name:30} {value}")
    print(f"tokenizer         {tokenizer_path}\npictures          {', '.join(map(str, pictures))}")


def load_images(data):
    """The whole data set in memory: uint8 images (n, H, W, C), labels (n,), class names."""
    if data.path is None:
        return *digits(), [str(digit) for digit in range(10)]
    source = open_images(data.path)
    batches = ImageBatches(source, 256, image_size=data.image_size, channels=data.channels, workers=data.workers, progress=True)
    images, labels, _ = zip(*batches.epoch(), strict=True)
    return torch.cat(images), torch.cat(labels), source.classes


def split(n, fraction, seed):
    """(indices held out to measure on, indices to train on)."""
    order = torch.randperm(n, generator=generator_for(seed, "held out"))
    count = max(1, int(n * fraction))
    configuration.require(count < n, "data.val_fraction", fraction, f"to leave some of the {n} images to train on")
    return order[:count].sort().values, order[count:].sort().values


def train_encoder(config, images, labels, num_classes, device):
    """A classifier of the images, then frozen."""
    c = config.encoder
    torch.manual_seed(seed_for(config.seed, "encoder"))
    encoder = SmallEncoder(config.data.channels, num_classes, config.autoencoder.downsample, c.width).to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    bar = trange(c.steps, desc="encoder", unit="step", mininterval=1)
    for step in bar:
        indices = batch_indices(step, c.batch_size, len(images), seed_for(config.seed, "encoder"))
        x = shift(to_pixels(images[indices]), c.shift, generator_for(config.seed, "shift", step)).to(device)
        loss = F.cross_entropy(encoder(x), labels[indices].to(device), label_smoothing=0.1)
        update(optimizer, loss, lr_at(step, lr=c.lr, steps=c.steps, schedule="cosine"))
        if (step + 1) % config.log_every == 0:
            bar.set_postfix_str(f"loss {finite(loss.item(), 'encoder', step):.4f}", refresh=False)
    return encoder.requires_grad_(False).eval()


def shift(x, pixels, generator):
    """Moves each image by up to `pixels` along both axes; its edge fills what comes in."""
    size, padded = x.shape[2:], F.pad(x, (pixels,) * 4, mode="replicate")
    corners = torch.randint(2 * pixels + 1, (len(x), 2), generator=generator).tolist()
    return torch.stack([image[:, top : top + size[0], left : left + size[1]] for image, (top, left) in zip(padded, corners, strict=True)])


def train_autoencoder(config, images, encoder, log, device):
    """|x - x_hat| + kl_weight * KL + w * (marginal cosine + marginal distance matrix), one Adam step a batch."""
    a, c = config.autoencoder, config.loss
    torch.manual_seed(seed_for(config.seed, "autoencoder"))
    autoencoder = AutoencoderKL(config.data.channels, config.data.channels, a.ch, a.ch_mult, a.num_res_blocks, a.z_channels, a.z_channels,
                                a.attn_resolutions, config.data.image_size, a.decoder_attention, a.num_groups).to(device)
    projection = LatentProjection(a.z_channels, encoder.feature_channels).to(device)
    optimizer = torch.optim.Adam([*autoencoder.parameters(), *projection.parameters()], betas=config.optim.betas, fused=True)
    for step in range(config.steps):
        x = to_pixels(images[batch_indices(step, config.batch_size, len(images), config.seed)]).to(device)
        posterior = autoencoder.encode(x)
        z = posterior.sample(generator_for(config.seed, "posterior", step, device=device))
        aligned = (projection(z), encoder.features(x)) if c.vf_weight else (None, None)  # (B, N, F) each
        loss, terms = generator_loss(
            x, autoencoder.decode(z), posterior, *aligned, encoder_layer=autoencoder.encoder.conv_out.weight, kl_weight=c.kl_weight,
            vf_weight=c.vf_weight, adaptive_vf=c.adaptive_vf, cos_margin=c.cos_margin, distmat_margin=c.distmat_margin)
        lr = lr_at(step, lr=config.optim.lr, steps=config.steps, warmup=config.optim.warmup, schedule=config.optim.schedule)
        update(optimizer, loss, lr)
        log.step(step + 1, lr, dict(loss=terms.pop("total_loss"), **terms))
        if (step + 1) % config.log_every == 0:
            finite(loss.item(), "autoencoder", step)
    return autoencoder


def update(optimizer, loss, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def finite(loss, what, step):
    if not math.isfinite(loss):
        raise SystemExit(f"error: the {what}'s loss is {loss} at step {step + 1}; a lower learning rate may help")
    return loss


@torch.no_grad()
def encode(autoencoder, images, device):
    """The posterior of each batch of uint8 images, in order."""
    for batch in images.split(256):
        yield autoencoder.encode(to_pixels(batch).to(device))


def draw_latents(autoencoder, images, seed, device):
    """One posterior sample an image: raw latents (n, z, h, w)."""
    generator = generator_for(seed, "statistics", device=device)
    return torch.cat([posterior.sample(generator).cpu() for posterior in encode(autoencoder, images, device)])


@torch.no_grad()
def decode(tokenizer, normalised, device):
    return torch.cat([tokenizer.decode_uint8(batch.to(device)).cpu() for batch in normalised.split(256)])


def evaluate(config, tokenizer, encoder, images, labels, held_out, kept, device):
    """Reconstruction, latents and recognisability of the held-out images."""
    posteriors = list(encode(tokenizer, images[held_out], device))
    normalised = torch.cat([tokenizer.normalise(p.mean).cpu() for p in posteriors])
    spread = torch.cat([(p.std / tokenizer.latent_std).cpu() for p in posteriors])
    reconstructions = decode(tokenizer, normalised, device)
    noise = torch.randn(normalised.shape, generator=generator_for(config.seed, "noise"))

    def rounded(values):
        return [round(value, 3) for value in values.tolist()]

    with torch.no_grad():
        predicted = torch.cat([encoder(to_pixels(batch).to(device)).argmax(1).cpu() for batch in images[held_out].split(256)])
    report = dict(psnr_db=round(psnr(images[held_out], reconstructions), 2), latent_mean=rounded(normalised.mean((0, 2, 3))),
                  latent_std=rounded(normalised.std((0, 2, 3))), posterior_std=rounded(spread.mean((0, 2, 3))),
                  encoder_accuracy=round((predicted == labels[held_out]).float().mean().item(), 4))
    if config.data.path is None:  # a support vector machine on pixels suits digits only
        for name, pictures in dict(originals=images[held_out], reconstructions=reconstructions,
                                   latent_noise_03=decode(tokenizer, normalised + 0.3 * noise, device)).items():
            accuracy = metrics.classifier_accuracy(pictures, labels[held_out], images[kept], labels[kept])
            report[f"classifier_{name}"] = round(accuracy, 4)
    return report


def psnr(images, reconstructions):
    """Peak signal-to-noise ratio in dB of uint8 images (n, H, W, C): that of each image, averaged."""
    mse = (images.float() - reconstructions.float()).square().flatten(1).mean(1)
    return (20 * math.log10(255) - 10 * mse.clamp(min=1e-10).log10()).mean().item()


def draw(run, tokenizer, encoder, images, labels, seed, device, columns=20):
    """reconstructions.png: originals, reconstructions, and reconstructions from latents with noise of 0.3 standard deviations.
    latent_map.png: originals, then the first three principal components, as red, green and blue, of encoder features and of latents."""
    chosen = labels.argsort(stable=True)[torch.linspace(0, len(labels) - 1, min(columns, len(labels))).long()]
    images = images[chosen]
    normalised = torch.cat([tokenizer.normalise(p.mean) for p in encode(tokenizer, images, device)]).cpu()
    noise = torch.randn(normalised.shape, generator=generator_for(seed, "noise"))
    rows = torch.cat([images, decode(tokenizer, normalised, device), decode(tokenizer, normalised + 0.3 * noise, device)])
    save_png(image_grid(rows, columns=len(images)), run / "reconstructions.png")

    grid = normalised.shape[2:]
    features = encoder.features(to_pixels(images).to(device)).cpu().mT.unflatten(2, grid)
    f = tokenizer.downsample
    maps = [principal_colours(x).repeat_interleave(f, 1).repeat_interleave(f, 2) for x in (features, normalised)]
    save_png(image_grid(torch.cat([images.expand(-1, -1, -1, 3), *maps]), columns=len(images)), run / "latent_map.png")
    return run / "reconstructions.png", run / "latent_map.png"


def principal_colours(x):
    """(n, F, h, w) -> uint8 (n, h, w, 3): the first three principal components of all tokens, each from its 2nd to its 98th percentile."""
    tokens = x.permute(0, 2, 3, 1).flatten(0, 2)
    tokens = tokens - tokens.mean(0)
    colours = F.pad(tokens, (0, 3)) @ F.pad(torch.linalg.svd(tokens, full_matrices=False).Vh, (0, 3, 0, 3))[:3].T  # black beyond the F-th
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    return (255 * ((colours - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)).to(torch.uint8).unflatten(0, (x.shape[0], *x.shape[2:]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
