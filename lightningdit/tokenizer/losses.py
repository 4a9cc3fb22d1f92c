"""The training objective of the VA-VAE: reconstruction, KL, alignment with a foundation model, and the adversarial term.

    generator:      nll + kl_weight * KL + d_weight * disc_factor * g_loss + w_vf * vf_loss
    discriminator:  disc_factor * hinge

Reductions are the official ones, and they differ: nll and KL are sums over an image and means over the batch, alignment and adversarial
terms are means. The two adaptive weights bring the latter to the gradient norm of the former at one chosen layer.

x, x_hat: (B, C, H, W) in [-1, 1]; projected latents and features: (B, N, F) tokens.
Source: VA-VAE, arXiv:2501.01423; adaptive weight and PatchGAN, VQGAN, arXiv:2012.09841.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lightningdit_kernels import marginal_cosine_loss, marginal_distance_matrix_loss


class LatentProjection(nn.Conv2d):
    """z' = W z, without bias: latents (B, z, h, w) to tokens (B, h w, F) of the foundation model's width ("reverse projection").

    A 1x1 convolution, so that its weight has the official shape (F, z, 1, 1); the official key is `linear_proj.weight`.
    """

    def __init__(self, latent_channels, feature_channels):
        super().__init__(latent_channels, feature_channels, 1, bias=False)

    def forward(self, z):
        return super().forward(z).flatten(2).mT


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


def adaptive_weight(nll, loss, parameter, limit):
    """|d nll / d parameter| / (|d loss / d parameter| + 1e-4), at most `limit`; without gradient. The graph stays for the backward pass."""
    (nll_grad,) = torch.autograd.grad(nll, parameter, retain_graph=True)
    (loss_grad,) = torch.autograd.grad(loss, parameter, retain_graph=True)
    return (nll_grad.norm() / (loss_grad.norm() + 1e-4)).clamp(max=limit).detach()


def generator_loss(x, x_hat, posterior, z=None, features=None, *, encoder_layer=None, decoder_layer=None, kl_weight=1e-6,
                   vf_weight=0.1, adaptive_vf=True, cos_margin=0.5, distmat_margin=0.25, perceptual=None, perceptual_weight=1.0,
                   discriminator=None, disc_weight=0.5, disc_factor=1.0):
    """The loss of encoder, decoder and projection.

    Args:
        posterior: Posterior of x.
        z: (B, N, F) projected *sample* of the posterior, the one that x_hat was decoded from; features: (B, N, F). Both None: no alignment.
        encoder_layer: parameter at which the alignment weight is measured, encoder.conv_out.weight; needed if adaptive_vf.
        decoder_layer: parameter at which the adversarial weight is measured, decoder.conv_out.weight; needed with a discriminator.
        vf_weight: times the adaptive ratio (limit 1e8) if adaptive_vf, else as it is.
        perceptual: as in reconstruction_loss.
        discriminator: callable, images -> logits; None leaves the adversarial term out.
        disc_weight: times the adaptive ratio (limit 1e4). disc_factor: 0 before the discriminator starts, then 1.
    Returns: (loss, log): log maps rec_loss, nll_loss, kl_loss, total_loss and, where they take part, vf_loss, vf_weight, g_loss, d_weight
        to detached scalars, so that logging need not wait for the device.
    """
    if (z is None) != (features is None):
        raise ValueError(f"z and features: got {'only features' if z is None else 'only z'}, expected both or neither")
    nll, rec = reconstruction_loss(x, x_hat, perceptual, perceptual_weight)
    kl = posterior.kl().mean()
    loss = nll + kl_weight * kl
    log = dict(rec_loss=rec, nll_loss=nll, kl_loss=kl)
    if discriminator is not None:
        if decoder_layer is None:
            raise ValueError("decoder_layer: got None, expected decoder.conv_out.weight when there is a discriminator")
        g_loss = -discriminator(x_hat).mean()
        d_weight = disc_weight * adaptive_weight(nll, g_loss, decoder_layer, 1e4)
        loss = loss + d_weight * disc_factor * g_loss
        log.update(g_loss=g_loss, d_weight=d_weight)
    if z is not None:
        if adaptive_vf and encoder_layer is None:
            raise ValueError("encoder_layer: got None, expected encoder.conv_out.weight when adaptive_vf is set")
        vf_loss = alignment_loss(z, features, cos_margin, distmat_margin)
        weight = nll.new_tensor(vf_weight) if not adaptive_vf else vf_weight * adaptive_weight(nll, vf_loss, encoder_layer, 1e8)
        loss = loss + weight * vf_loss
        log.update(vf_loss=vf_loss, vf_weight=weight)
    return loss, {name: value.detach() for name, value in dict(log, total_loss=loss).items()}


def discriminator_loss(x, x_hat, discriminator, disc_factor=1.0):
    """disc_factor * (mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) / 2, the hinge loss; real and fake in separate passes (BatchNorm)."""
    logits_real = discriminator(x.detach())
    logits_fake = discriminator(x_hat.detach())
    return disc_factor * 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())
