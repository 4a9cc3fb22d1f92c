"""The training objective of the VA-VAE: reconstruction, KL, alignment with a foundation model, and the adversarial term.

    generator:      nll + kl_weight * KL + d_weight * disc_factor * g_loss + w_vf * vf_loss
    discriminator:  disc_factor * hinge

Reductions are the official ones, and they differ: nll and KL are sums over an image and means over the batch, alignment and adversarial
terms are means. The two adaptive weights bring the latter to the gradient norm of the former at one chosen layer. Each term is a mean
over images, so its gradient over a batch is the mean of those over micro-batches and processes, while the norm of that mean is not the
mean of the norms: `layer_gradients` are averaged first, then `adaptive_weights` takes norms. So N processes weigh as one with the whole
batch; averaging norms, or their squares, would not.

x, x_hat: (B, C, H, W) in [-1, 1]; latents z: (B, z, h, w); projected latents and features: (B, N, F) tokens.
Source: VA-VAE, arXiv:2501.01423; adaptive weight and PatchGAN, VQGAN, arXiv:2012.09841; LPIPS, arXiv:1801.03924.
"""

import re
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from lightningdit.checkpoint import load_weights
from lightningdit.optional import optional
from lightningdit_kernels import alignment_losses, marginal_cosine_loss, marginal_distance_matrix_loss

VF_LIMIT, DISC_LIMIT = 1e8, 1e4  # of the two adaptive ratios
# Features this wide, and 4 times as wide as the latents, are aligned in the latents' rank: at 384 channels 2.6 times as fast on a CPU
# (docs/results.md). Narrow ones, such as the digits' encoder has, are projected as they are.
LOW_RANK_FROM = 256
# LPIPS networks: torchvision's weights, and the file in which they come.
TRUNKS = dict(vgg=("VGG16_Weights", "vgg16-397923af.pth"), alex=("AlexNet_Weights", "alexnet-owt-7be5be79.pth"),
              squeeze=("SqueezeNet1_1_Weights", "squeezenet1_1-b8a52dc0.pth"))


class LatentProjection(nn.Conv2d):
    """z' = W z, without bias: latents (B, z, h, w) to tokens (B, h w, F) of the foundation model's width ("reverse projection").

    A 1x1 convolution, so that its weight has the official shape (F, z, 1, 1); the official key is `linear_proj.weight`.
    """

    def __init__(self, latent_channels, feature_channels):
        super().__init__(latent_channels, feature_channels, 1, bias=False)

    def forward(self, z):
        return super().forward(z).flatten(2).mT

    def alignment_loss(self, z, features, cos_margin=0.5, distmat_margin=0.25):
        """alignment_loss(self(z), features): where the features are much wider than the latents, without z' ever in memory."""
        if self.out_channels < max(LOW_RANK_FROM, 4 * self.in_channels):
            return alignment_loss(self(z), features, cos_margin, distmat_margin)
        cosine, distance = alignment_losses(z.flatten(2).mT, self.weight.flatten(1), features, cos_margin, distmat_margin)
        return distance + cosine


class PerceptualLoss(nn.Module):
    """LPIPS, frozen, and in eval mode for ever: train() on whatever holds it must not switch its dropout on.

    Made by `perceptual_loss`. Called with (x, x_hat): (B, 1 or 3, H, W) in [-1, 1] -> (B, 1, 1, 1), fp32 under autocast too.
    """

    def __init__(self, lpips):
        super().__init__()
        self.lpips = lpips.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x, x_hat):
        with torch.autocast(x.device.type, enabled=False):
            return self.lpips(*(images.float().expand(-1, 3, -1, -1) for images in (x, x_hat)))


def perceptual_loss(weights=None, net="vgg", random_weights=False):
    """LPIPS of the package `lpips`, whose calibrated linear layers come with it; the network under them is torchvision's.

    Args:
        weights: file with torchvision's ImageNet weights of `net`; None: torch's hub cache, or its download.
        net: "vgg" (what the VA-VAE trains with), "alex" or "squeeze".
        random_weights: leave that network as it is initialised. Meaningless as a loss; for tests.
    Returns: PerceptualLoss on the CPU.
    Raises: ImportError without `lpips`; ValueError for an unknown net, or where the weights cannot be had or do not fit.
    """
    if net not in TRUNKS:
        raise ValueError(f"net: got {net!r}, expected one of {', '.join(TRUNKS)}")
    if weights is not None and random_weights:
        raise ValueError(f"weights: got {str(weights)!r} and random_weights, expected one of the two")
    with optional("LPIPS (loss.perceptual_weight = 0 trains without it)"):
        from lpips import LPIPS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips builds the network by arguments that torchvision has renamed
        lpips = LPIPS(net=net, pnet_rand=True, verbose=False)
    if not random_weights:
        found = _trunk_weights(weights, net)
        own = {name: re.sub(r"slice\d+\.", "features.", name) for name in lpips.net.state_dict()}  # slices keep torchvision's numbers
        missing = [name for name in own.values() if name not in found]
        if missing:
            raise ValueError(f"{weights}: got no {missing[0]}, expected torchvision's state dict of {net} ({TRUNKS[net][1]})")
        try:
            lpips.net.load_state_dict({name: found[theirs] for name, theirs in own.items()})
        except RuntimeError as error:
            raise ValueError(f"{weights}: expected torchvision's state dict of {net} ({TRUNKS[net][1]}): {error}") from None
    return PerceptualLoss(lpips)


def _trunk_weights(weights, net):
    if weights is not None:
        return load_weights(weights)
    with optional("LPIPS"):
        from torchvision.models import get_weight

    name, file = TRUNKS[net]
    try:
        return get_weight(f"{name}.IMAGENET1K_V1").get_state_dict(check_hash=True, weights_only=True)
    except OSError as error:  # URLError and its kind
        raise ValueError(f"weights: got None, and torchvision's {file} is neither in torch's hub cache nor to be downloaded ({error}); "
                         "expected that file (train/vavae.py: --loss.perceptual-weights FILE), or loss.perceptual_weight 0") from None


class PatchDiscriminator(nn.Module):
    """PatchGAN: images (B, C, H, W), any size from 3 * 2**num_layers on, to one logit a patch (B, 1, h, w), h = H / 2**num_layers - 2.

    4x4 convolutions, BatchNorm, leaky ReLU; the official state dict's names (`main.0.weight`) and initialisation.

    Args:
        in_channels: image channels. width: channels after the first layer, doubled in each up to 8 times. num_layers: strided convolutions.
    Source: pix2pix, arXiv:1611.07004; as VQGAN uses it, arXiv:2012.09841.
    """

    def __init__(self, in_channels=3, width=64, num_layers=3):
        for name, value in dict(in_channels=in_channels, width=width, num_layers=num_layers).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a positive integer")
        widths = [width * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(num_layers):
            stride = 2 if i < num_layers - 1 else 1
            layers += [nn.Conv2d(widths[i], widths[i + 1], 4, stride, padding=1, bias=False), nn.BatchNorm2d(widths[i + 1]),
                       nn.LeakyReLU(0.2, inplace=True)]
        super().__init__()
        self.num_layers = num_layers
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images):
        if min(images.shape[2:]) < 3 * 2**self.num_layers:
            raise ValueError(f"images: got {tuple(images.shape)}, expected sides of at least {3 * 2**self.num_layers} pixels "
                             f"for {self.num_layers} layers")
        return self.main(images)


def reconstruction_loss(x, x_hat, perceptual=None, perceptual_weight=1.0):
    """|x - x_hat| + perceptual_weight * perceptual(x, x_hat), per pixel and channel.

    Args:
        perceptual: callable (x, x_hat) -> something that broadcasts to x's shape, such as LPIPS (B, 1, 1, 1); None leaves it out.
            Broadcasting before the sum multiplies it by C * H * W: so does the official code, and the other weights are tuned to that.
    Returns: (nll, rec): nll is summed over an image and averaged over the batch; rec is the mean, for the log.
    """
    if x.shape != x_hat.shape:
        raise ValueError(f"x_hat: got {tuple(x_hat.shape)}, expected the shape of x, {tuple(x.shape)}")
    rec = (x - x_hat).abs()
    if perceptual is not None:
        rec = rec + perceptual_weight * perceptual(x, x_hat)
    return rec.sum() / rec.shape[0], rec.mean()


def alignment_loss(z, features, cos_margin=0.5, distmat_margin=0.25):
    """Marginal cosine plus marginal distance-matrix loss of projected latents z (B, N, F) against frozen features (B, N, F)."""
    return marginal_distance_matrix_loss(z, features, distmat_margin) + marginal_cosine_loss(z, features, cos_margin)


def generator_terms(x, x_hat, posterior, vf_loss=None, *, perceptual=None, perceptual_weight=1.0, discriminator=None):
    """The terms of the generator's loss, unweighted: {rec_loss, nll_loss, kl_loss} and, where they take part, vf_loss and g_loss.

    Args:
        posterior: Posterior of x. vf_loss: scalar alignment loss. perceptual, perceptual_weight: as in reconstruction_loss.
        discriminator: callable, images -> logits; None leaves the adversarial term out.
    """
    nll, rec = reconstruction_loss(x, x_hat, perceptual, perceptual_weight)
    terms = dict(rec_loss=rec, nll_loss=nll, kl_loss=posterior.kl().mean())
    if discriminator is not None:
        terms["g_loss"] = -discriminator(x_hat).float().mean()
    if vf_loss is not None:
        terms["vf_loss"] = vf_loss
    return terms


def layer_gradients(terms, encoder_layer=None, decoder_layer=None):
    """What the adaptive weights are made of: {"vf_loss": d (nll, vf_loss) / d encoder_layer, "g_loss": d (nll, g_loss) / d decoder_layer}.

    One pass through the decoder serves both layers; a layer that is None, or whose term does not take part, is left out. The graph stays.
    """
    layers = {name: layer for name, layer in (("vf_loss", encoder_layer), ("g_loss", decoder_layer)) if name in terms and layer is not None}
    if not layers:
        return {}
    nll = torch.autograd.grad(terms["nll_loss"], list(layers.values()), retain_graph=True)
    return {name: (nll_grad, torch.autograd.grad(terms[name], layer, retain_graph=True)[0])
            for nll_grad, (name, layer) in zip(nll, layers.items(), strict=True)}


def adaptive_weights(gradients, vf_weight=0.1, disc_weight=0.5):
    """Weights from layer_gradients, without gradient: {"vf_weight", "d_weight"}, of the terms that are in it.

    Each is its factor times |d nll| / (|d term| + 1e-4), that ratio at most 1e8 for the alignment and 1e4 for the adversarial term.
    """
    settings = dict(vf_loss=("vf_weight", vf_weight, VF_LIMIT), g_loss=("d_weight", disc_weight, DISC_LIMIT))
    return {settings[name][0]: settings[name][1] * gradient_ratio(*pair, settings[name][2]) for name, pair in gradients.items()}


def gradient_ratio(nll_grad, grad, limit):
    """|nll_grad| / (|grad| + 1e-4), at most `limit`, without gradient."""
    return (nll_grad.norm() / (grad.norm() + 1e-4)).clamp(max=limit).detach()


def weighted_sum(terms, weights, kl_weight=1e-6, disc_factor=1.0):
    """nll + kl_weight * KL + d_weight * disc_factor * g_loss + vf_weight * vf_loss, of the terms that take part."""
    loss = terms["nll_loss"] + kl_weight * terms["kl_loss"]
    if "g_loss" in terms:
        loss = loss + weights["d_weight"] * disc_factor * terms["g_loss"]
    if "vf_loss" in terms:
        loss = loss + weights["vf_weight"] * terms["vf_loss"]
    return loss


def generator_loss(x, x_hat, posterior, z=None, features=None, *, encoder_layer=None, decoder_layer=None, kl_weight=1e-6,
                   vf_weight=0.1, adaptive_vf=True, cos_margin=0.5, distmat_margin=0.25, perceptual=None, perceptual_weight=1.0,
                   discriminator=None, disc_weight=0.5, disc_factor=1.0):
    """The loss of encoder, decoder and projection, of one process with the whole batch at once.

    Args:
        posterior: Posterior of x.
        z: (B, N, F) projected *sample* of the posterior, the one that x_hat was decoded from; features: (B, N, F). Both None: no alignment.
        encoder_layer: parameter at which the alignment weight is measured, encoder.conv_out.weight; needed if adaptive_vf.
        decoder_layer: parameter at which the adversarial weight is measured, decoder.conv_out.weight; needed with a discriminator.
        vf_weight: times the adaptive ratio (limit 1e8) if adaptive_vf, else as it is.
        perceptual, perceptual_weight, discriminator: as in generator_terms.
        disc_weight: times the adaptive ratio (limit 1e4). disc_factor: 0 before the discriminator starts, then 1.
    Returns: (loss, log): log maps rec_loss, nll_loss, kl_loss, total_loss and, where they take part, vf_loss, vf_weight, g_loss, d_weight
        to detached scalars, so that logging need not wait for the device.
    """
    if (z is None) != (features is None):
        raise ValueError(f"z and features: got {'only features' if z is None else 'only z'}, expected both or neither")
    if discriminator is not None and decoder_layer is None:
        raise ValueError("decoder_layer: got None, expected decoder.conv_out.weight when there is a discriminator")
    if z is not None and adaptive_vf and encoder_layer is None:
        raise ValueError("encoder_layer: got None, expected encoder.conv_out.weight when adaptive_vf is set")
    vf_loss = None if z is None else alignment_loss(z, features, cos_margin, distmat_margin)
    terms = generator_terms(x, x_hat, posterior, vf_loss, perceptual=perceptual, perceptual_weight=perceptual_weight,
                            discriminator=discriminator)
    weights = adaptive_weights(layer_gradients(terms, encoder_layer if adaptive_vf else None, decoder_layer), vf_weight, disc_weight)
    if z is not None and not adaptive_vf:
        weights["vf_weight"] = x.new_tensor(vf_weight)
    loss = weighted_sum(terms, weights, kl_weight, disc_factor)
    return loss, {name: value.detach() for name, value in dict(terms, **weights, total_loss=loss).items()}


def discriminator_loss(x, x_hat, discriminator, disc_factor=1.0):
    """disc_factor * (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) / 2, the hinge loss; real and fake in separate passes (BatchNorm)."""
    logits_real = discriminator(x.detach()).float()
    logits_fake = discriminator(x_hat.detach()).float()
    return disc_factor * 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())
