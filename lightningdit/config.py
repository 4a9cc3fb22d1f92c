"""Configuration: dataclasses hold every default once, YAML recipes override them, the command line overrides both.

    config = parse(DiTConfig, sys.argv[1:], recipe="train/configs/digits.yaml")

An unknown key, a wrong type or an impossible combination raises ConfigError, which names the field, what it got and what it
expects, before any work starts. `save` writes the resolved configuration, which `load` reads back to the same object.
"""
import contextlib
import dataclasses
import difflib
import types
import typing
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from .checkpoint import write_text
from .distributed import bf16_units
from .model import PRESETS
from .optional import optional


class ConfigError(ValueError):
    """A configuration that cannot run: the message names the field, what it got and what it expects."""


def require(condition, name, got, expected):
    if not condition:
        raise ConfigError(f"{name}: got {got!r}, expected {expected}")


@dataclass
class EncodeDataConfig:
    """Images, and what becomes of them before the tokenizer sees them."""

    path: str | None = None  # folder with one folder of images a class, .tar or .zip; None: the digits that scikit-learn ships
    image_size: int = 256  # pixels a side, after the center crop
    flip: bool = True  # encode mirror images too
    decoder: Literal["auto", "dali", "pillow"] = "auto"  # auto: pillow, on whose exact center crop published FIDs depend
    workers: int = 4  # decoding threads

    def validate(self):
        require(self.image_size > 0, "data.image_size", self.image_size, "a positive number of pixels")
        require(self.workers > 0, "data.workers", self.workers, "a positive number")
        require(self.path is not None or self.image_size == 8, "data.image_size", self.image_size,
                "8 for the bundled digits; data.path names images of your own")


@dataclass
class DataConfig(EncodeDataConfig):
    """`path` may also be a store that train/encode.py made; images are encoded to one first."""

    flip: bool = True  # mirror each image with probability 1/2
    num_classes: int | None = None  # None: counted from the data
    num_images: int | None = None  # for --dry-run without the data at hand; None: counted from the data
    val_fraction: float = 0.0  # part of the images held out for the validation loss
    cache: str | None = None  # folder for the store that images are encoded to; None: RUN/latents
    resident: Literal["auto", "none", "ram", "device"] = "auto"  # where the latents lie; none: memory-mapped, read as they are needed

    def validate(self):
        require(self.image_size > 0, "data.image_size", self.image_size, "a positive number of pixels")
        require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "a fraction in [0, 1)")
        require(self.num_classes is None or self.num_classes > 0, "data.num_classes", self.num_classes, "a positive number, or null")
        require(self.num_images is None or self.num_images > 0, "data.num_images", self.num_images, "a positive number, or null")
        require(self.workers > 0, "data.workers", self.workers, "a positive number")


@dataclass
class TokenizerConfig:
    path: str | None = None  # "digits" (bundled) or a .safetensors file; None: must be given before training
    downsample: int = 16  # pixels a latent position, checked against the file
    latent_channels: int = 32  # checked against the file

    def validate(self):
        require(self.downsample > 0, "tokenizer.downsample", self.downsample, "a positive number")
        require(self.latent_channels > 0, "tokenizer.latent_channels", self.latent_channels, "a positive number")


@dataclass
class ModelConfig:
    size: str | None = "XL/1"  # preset for depth, hidden_size, num_heads and patch_size; any of them may be overridden
    depth: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    use_qknorm: bool = False
    use_swiglu: bool = True
    use_rope: bool = True
    use_rmsnorm: bool = True
    wo_shift: bool = False
    learn_sigma: bool = False
    use_checkpoint: bool = False  # keep fewer activations, recompute the others in the backward pass
    checkpoint_policy: Literal["full", "selective"] = "full"  # kept then: only what enters a block; or matrix products and attention too
    bf16_residual: bool = False  # under bf16 autocast keep the residual stream in bf16, not fp32; docs/levers.md
    batch_adaln: bool = False  # the modulations of all blocks by one matrix product; for one process or ddp
    split_k: int = 1  # most parts in which a block's weight gradients are computed and summed; 1: none

    def resolve(self):
        """Fills the fields left None from the preset."""
        if self.size is not None:
            require(self.size in PRESETS, "model.size", self.size, f"one of {', '.join(PRESETS)}, or null")
            for name, value in PRESETS[self.size].items():
                if getattr(self, name) is None:
                    setattr(self, name, value)

    def validate(self):
        for name in ("depth", "hidden_size", "num_heads", "patch_size"):
            value = getattr(self, name)
            require(value is not None and value > 0, f"model.{name}", value, "a positive number, or model.size set to a preset")
        require(self.hidden_size % self.num_heads == 0, "model.hidden_size", self.hidden_size,
                f"a multiple of model.num_heads = {self.num_heads}")
        require(self.hidden_size % 4 == 0, "model.hidden_size", self.hidden_size, "a multiple of 4 (2-D sin-cos position embedding)")
        head_dim = self.hidden_size // self.num_heads
        require(not self.use_rope or head_dim % 4 == 0, "model.hidden_size / model.num_heads", head_dim,
                "a multiple of 4 with model.use_rope (two axes of interleaved pairs)")
        require(self.mlp_ratio > 0, "model.mlp_ratio", self.mlp_ratio, "a positive number")
        require(self.split_k > 0, "model.split_k", self.split_k, "a positive number; 1 is none")
        require(0 <= self.class_dropout_prob < 1, "model.class_dropout_prob", self.class_dropout_prob, "a probability in [0, 1)")


@dataclass
class FlowConfig:
    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "noise", "score"] = "velocity"
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    cosine_loss: bool = True  # adds mean(1 - cosine over channels), 1 : 1
    time: Literal["uniform", "logit_normal"] = "logit_normal"
    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 1.0  # t' = s t / (1 + (s - 1) t)
    time_switch_step: int | None = None  # from this step on t is drawn uniformly
    model_guidance: float = 0.0  # w of flow.model_guidance: trained so, sampled without guidance, guided by 1 / (1 - w). 0: none
    model_guidance_start: int = 0  # steps before it begins
    model_guidance_interval: tuple[float, float] = (0.0, 1.0)  # times t in which it acts
    train_eps: float | None = None  # None: 0 for velocity on linear and gvp, else as the path needs
    sample_eps: float | None = None

    def guides(self, step):
        """Whether model guidance acts in update `step` (0-based)."""
        return self.model_guidance > 0 and step >= self.model_guidance_start

    def validate(self):
        require(self.time_std > 0, "flow.time_std", self.time_std, "a positive number")
        require(self.time_shift > 0, "flow.time_shift", self.time_shift, "a positive number")
        require(self.time_switch_step is None or self.time_switch_step >= 0, "flow.time_switch_step", self.time_switch_step,
                "a step, or null")
        require(not self.cosine_loss or self.prediction == "velocity", "flow.cosine_loss", self.cosine_loss,
                f"false with flow.prediction = {self.prediction} (the cosine loss is defined on velocities)")
        require(0 <= self.model_guidance < 1, "flow.model_guidance", self.model_guidance, "a number in [0, 1); 0 is none")
        require(not self.model_guidance or self.prediction == "velocity", "flow.model_guidance", self.model_guidance,
                f"0 with flow.prediction = {self.prediction} (it is defined on velocities)")
        require(self.model_guidance_start >= 0, "flow.model_guidance_start", self.model_guidance_start, "a number of steps >= 0")
        low, high = self.model_guidance_interval
        require(0 <= low <= high <= 1, "flow.model_guidance_interval", self.model_guidance_interval, "0 <= low <= high <= 1")
        for name in ("train_eps", "sample_eps"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 0.5, f"flow.{name}", value, "a number in [0, 0.5), or null")


@dataclass
class OptimConfig:
    lr: float = 2e-4
    name: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' attention and MLP matrices, adamw for the rest; docs/levers.md
    muon_momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0  # steps of linear warm-up
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up, down to lr * final_lr_fraction at the last step
    final_lr_fraction: float = 0.0
    # AdamW's moments. 8bit: torchao's, a quarter of the memory, for one process or ddp; cpu: fp32 in the host's memory, updated there
    state: Literal["fp32", "8bit", "cpu"] = "fp32"
    clip_grad_norm: float | None = None
    ema: float = 0.9999
    ema_warmup: bool = False  # decay min(ema, (1 + step) / (10 + step)): the average forgets the initial weights sooner

    def validate(self):
        require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        require(0 <= self.muon_momentum < 1, "optim.muon_momentum", self.muon_momentum, "a number in [0, 1)")
        require(self.name == "adamw" or self.state == "fp32", "optim.state", self.state, f"fp32 with optim.name = {self.name}")
        require(self.eps > 0, "optim.eps", self.eps, "a positive number")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "a number >= 0")
        require(self.warmup >= 0, "optim.warmup", self.warmup, "a number of steps >= 0")
        require(0 <= self.final_lr_fraction <= 1, "optim.final_lr_fraction", self.final_lr_fraction, "a fraction in [0, 1]")
        require(self.clip_grad_norm is None or self.clip_grad_norm > 0, "optim.clip_grad_norm", self.clip_grad_norm,
                "a positive number, or null")
        require(0 <= self.ema < 1, "optim.ema", self.ema, "a decay in [0, 1)")


@dataclass
class GuardConfig:
    """What happens to updates whose loss or gradient is not finite, or jumps far above the last ones; see guard.py and run.Incidents."""

    policy: Literal["stop", "skip", "rollback"] = "stop"  # the update is left out in any case; then stop, go on, or go back
    threshold: float | None = 20.0  # robust deviations above the median of log loss or log gradient norm; None: only non-finite ones
    window: int = 128  # good steps remembered
    most: int = 20  # incidents after which the run stops in any case
    lr_factor: float = 1.0  # rollback: times the learning rate from then on

    def validate(self):
        require(self.threshold is None or self.threshold > 0, "guard.threshold", self.threshold, "a positive number, or null")
        require(self.window >= 8, "guard.window", self.window, "at least 8 steps")
        require(self.most > 0, "guard.most", self.most, "a positive number")
        require(0 < self.lr_factor <= 1, "guard.lr_factor", self.lr_factor, "a number in (0, 1]")


@dataclass
class SampleConfig:
    method: Literal["euler", "heun", "midpoint", "dopri5", "ab2", "dpmpp_2m", "unipc", "sde_euler", "sde_heun"] = "euler"
    num_steps: int = 249  # intervals of the time grid; the official "250 steps" are 250 points, so 249 intervals
    shift: float = 0.3  # t' = s t / (1 + (s - 1) t); 1 is none
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # outside it the conditional velocity is used, and only that is computed
    guidance_channels: int | None = None  # None: all; 3: the official behaviour
    guidance_rescale: float = 0.0  # 1: guided outputs keep the standard deviation of the conditional ones; 0: as guidance makes them
    batch_size: int = 64
    seed: int = 0

    def validate(self):
        require(self.num_steps > 0, "sample.num_steps", self.num_steps, "a positive number")
        require(self.shift > 0, "sample.shift", self.shift, "a positive number; 1 is none")
        low, high = self.guidance_interval
        require(0 <= low <= high <= 1, "sample.guidance_interval", self.guidance_interval, "0 <= low <= high <= 1")
        require(self.guidance_channels is None or self.guidance_channels > 0, "sample.guidance_channels", self.guidance_channels,
                "a positive number, or null for all")
        require(0 <= self.guidance_rescale <= 1, "sample.guidance_rescale", self.guidance_rescale, "a number in [0, 1]")
        require(self.batch_size > 0, "sample.batch_size", self.batch_size, "a positive number")


@dataclass
class ScoreConfig:
    """How good the EMA weights' samples are, measured while training goes on; see scoring.py. Samples are drawn as `sample` says."""

    every: int = 0  # steps between two scores; the last step has one too. 0: none
    num: int = 5_000  # samples
    num_steps: int | None = None  # of the sampler; None: sample.num_steps
    extractor: str = "inception"  # whose features are compared: inception, dinov2, timm:MODEL, digits, or a small encoder's file
    weights: str | None = None  # file with the extractor's weights; None: its download, or the cache of that
    # ADM's .npz or images; None: the images that are trained on. Their statistics are kept where the latents are (data.cache)
    reference: str | None = None

    def validate(self):
        require(self.every >= 0, "score.every", self.every, "a number of steps, or 0 for none")
        require(self.num >= 2, "score.num", self.num, "at least 2 samples")
        require(self.num_steps is None or self.num_steps > 0, "score.num_steps", self.num_steps, "a positive number, or null")


@dataclass
class DiTConfig:
    """One run of train/dit.py. The defaults are the paper's; recipes are in train/configs."""

    run: str = "runs/dit"  # run directory; the same command run again resumes from it
    seed: int = 0
    steps: int = 80_000
    batch_size: int = 1024  # images a step, over all processes and micro-batches
    # Images in one forward pass of one process. None: its whole share of the batch; auto: the largest divisor of it that fits
    micro_batch: int | Literal["auto"] | None = None
    compile: bool = False  # torch.compile, block by block
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # auto: bf16 autocast with an fp32 residual stream where the device multiplies bf16 in hardware (CUDA, AVX512-BF16, AMX), else fp32;
    # a run keeps what it meant. fp8: bf16, and the blocks' linear layers by torchao in float8
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"  # over several processes; auto: by size and memory
    deterministic: bool = False  # bitwise equal runs on the same hardware, some slower
    init: str | None = None  # weights to start from: a run, a .pt or a .safetensors file
    log_every: int = 100  # steps
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 2
    sample_every: int = 5_000
    sample_num: int = 64  # images in a grid
    validate_every: int = 1_000
    final_samples: int = 0  # digits only: images drawn at the end and scored by a classifier
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)

    @property
    def latent_size(self):
        return self.data.image_size // self.tokenizer.downsample

    def use_bf16(self, device):
        return self.precision in ("bf16", "fp8") or (self.precision == "auto" and bool(bf16_units(device)))

    def precision_on(self, device):
        return "fp8" if self.precision == "fp8" else "bf16" if self.use_bf16(device) else "fp32"

    def check_device(self, device):
        """ConfigError where this device cannot do what the configuration asks for."""
        require(not self.model.bf16_residual or self.use_bf16(device), "model.bf16_residual", True,
                f"false, or precision = bf16: on this {device.type} it is fp32")
        capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
        require(self.precision != "fp8" or capable, "precision", "fp8", f"bf16 or fp32 on this {device.type} device: float8 products need "
                "CUDA of compute capability 8.9 or higher (Ada, Hopper, Blackwell)")

    def model_arguments(self):
        """Keyword arguments of LightningDiT."""
        arguments = {f.name: getattr(self.model, f.name) for f in dataclasses.fields(self.model) if f.name != "size"}
        return arguments | dict(input_size=self.latent_size, in_channels=self.tokenizer.latent_channels, num_classes=self.data.num_classes)

    def sampling_arguments(self):
        """Keyword arguments of sampler.sample, apart from the labels, the seeds and the device."""
        if self.flow.model_guidance and self.sample.guidance_scale != 1:
            warnings.warn(f"sample.guidance_scale: got {self.sample.guidance_scale}, expected 1: the model has learnt its guidance "
                          f"(flow.model_guidance = {self.flow.model_guidance}) and is guided twice", stacklevel=1)
        arguments = {f.name: getattr(self.sample, f.name) for f in dataclasses.fields(self.sample) if f.name != "seed"}
        latent_shape = (self.tokenizer.latent_channels, self.latent_size, self.latent_size)
        return arguments | dict(latent_shape=latent_shape, num_classes=self.data.num_classes, path=self.flow.path,
                                prediction=self.flow.prediction, sample_eps=self.flow.sample_eps)

    def _unsharded(self):
        """[(field, its value, what it may be with sharded weights)] of the options that need whole ones."""
        options = (("optim.name", self.optim.name, "muon", "adamw"), ("optim.state", self.optim.state, "8bit", "fp32 or cpu"),
                   ("model.batch_adaln", self.model.batch_adaln, True, "false"), ("precision", self.precision, "fp8", "bf16"))
        return [(name, got, expected) for name, got, unsharded, expected in options if got == unsharded]

    def resolve(self):
        if self.parallel == "auto" and self._unsharded():
            self.parallel = "ddp"

    def validate(self):
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "sample_every", "sample_num",
                     "validate_every"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        require(self.final_samples >= 0, "final_samples", self.final_samples, "a number >= 0")
        require(self.micro_batch in (None, "auto") or 0 < self.micro_batch <= self.batch_size and self.batch_size % self.micro_batch == 0,
                "micro_batch", self.micro_batch, f"a divisor of batch_size = {self.batch_size}, auto, or null")
        require(self.data.image_size % self.tokenizer.downsample == 0, "data.image_size", self.data.image_size,
                f"a multiple of tokenizer.downsample = {self.tokenizer.downsample}")
        require(self.latent_size % self.model.patch_size == 0, "data.image_size", self.data.image_size,
                f"latents of {self.latent_size} positions a side do not divide by model.patch_size = {self.model.patch_size}; "
                f"a multiple of {self.tokenizer.downsample * self.model.patch_size}")
        channels, latent_channels = self.sample.guidance_channels, self.tokenizer.latent_channels
        require(channels is None or channels <= latent_channels, "sample.guidance_channels", channels,
                f"at most tokenizer.latent_channels = {latent_channels}")
        for name, got, expected in self._unsharded():
            require(self.parallel not in ("fsdp", "hsdp"), name, got, f"{expected} with parallel = {self.parallel}: it needs whole weights")
        if self.precision == "fp8":
            require(self.model.split_k == 1, "model.split_k", self.model.split_k, "1 with precision = fp8")
            width = int(self.model.hidden_size * self.model.mlp_ratio)
            width = int(2 / 3 * width) if self.model.use_swiglu else width
            tokens = (self.latent_size // self.model.patch_size) ** 2
            require(not any(n % 16 for n in (self.model.hidden_size, width, tokens)), "precision", "fp8", "bf16: float8 products need "
                    f"multiples of 16; model.hidden_size is {self.model.hidden_size}, the MLP's width {width}, tokens an image {tokens}")
        require(not self.model.bf16_residual or self.precision != "fp32", "model.bf16_residual", True, "false with precision = fp32")
        dropout = self.model.class_dropout_prob
        require(not self.flow.model_guidance or dropout > 0, "model.class_dropout_prob", dropout,
                "more than 0 with flow.model_guidance: without dropped labels there is no unconditional velocity")
        require(not self.optim.warmup or self.optim.warmup < self.steps, "optim.warmup", self.optim.warmup,
                f"fewer than steps = {self.steps}")


@dataclass
class EncodeTokenizerConfig:
    path: str | None = None  # "digits" (bundled), or a tokenizer file
    statistics: Literal["tokenizer", "data"] = "tokenizer"  # which normalise the latents; data: their own, saved with the tokenizer


@dataclass
class EncodeConfig:
    """One run of train/encode.py: images to a store of latents."""

    out: str = "latents"  # folder of the store; the same command run again goes on with it
    batch_size: int = 64  # images a pass through the encoder, of one process
    shard_size: int = 4096  # images a file; what a kill may cost of work
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the stored moments; bf16 halves the store
    precision: Literal["fp32", "bf16"] = "fp32"  # of the encoder
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None  # of the CPU; None: PyTorch's choice. The last bits of the latents depend on their number
    data: EncodeDataConfig = field(default_factory=EncodeDataConfig)
    tokenizer: EncodeTokenizerConfig = field(default_factory=EncodeTokenizerConfig)

    def validate(self):
        for name in ("batch_size", "shard_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        require(self.threads is None or self.threads > 0, "threads", self.threads, "a positive number, or null")
        require(self.tokenizer.path is not None, "tokenizer.path", None, "'digits' (bundled) or a tokenizer file; train/vavae.py makes one")


@dataclass
class ImageDataConfig:
    path: str | None = None  # images with classes: a folder of class folders, tar or zip files; None: the digits that scikit-learn ships
    val_path: str | None = None  # images to measure the reconstruction on; None: val_fraction of those in path
    val_fraction: float = 0.1
    image_size: int = 256  # pixels a side
    channels: Literal[1, 3] = 3  # grayscale or RGB
    crop: Literal["random", "center"] = "random"  # random: of the image resized to image_size; center: ADM's, the same each epoch
    flip: bool = False  # mirror each image with probability 1/2
    in_memory: bool = False  # decode once and keep all pixels; needs crop = center and no flip
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    workers: int = 4  # decoding threads
    num_images: int | None = None  # for --dry-run without the data at hand; None: counted from the data

    @property
    def augmented(self):
        return self.path is not None and (self.crop == "random" or self.flip)

    def validate(self):
        require(self.image_size > 0, "data.image_size", self.image_size, "a positive number of pixels")
        require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "a fraction in (0, 1)")
        require(self.workers > 0, "data.workers", self.workers, "a positive number")
        require(self.num_images is None or self.num_images > 0, "data.num_images", self.num_images, "a positive number, or null")
        require(self.path or self.num_images or (self.image_size, self.channels) == (8, 1), "data.path", self.path,
                f"images, or data.image_size = 8 and data.channels = 1 for the digits (they are {self.image_size} and {self.channels})")
        require(not (self.in_memory and self.augmented), "data.in_memory", self.in_memory,
                "data.crop = center and data.flip = false: other pixels each epoch cannot be kept")
        require(self.path or not self.val_path, "data.val_path", self.val_path, "null without data.path")


@dataclass
class EncoderConfig:
    """The frozen encoder that the latents are aligned with: a vision foundation model, or a small classifier of the data's own classes."""

    name: str | None = None  # foundation model, such as dinov2-l or mae-l, or a small encoder's file; None: train a small one first
    weights: str | None = None  # of the foundation model: a file; None: the hub's or its cache; "random" is for tests
    normalisation: Literal["model", "official"] = "model"  # official: pixels stay in [-1, 1], as the official code leaves them
    layer: int = -1  # block whose features are taken
    cache: bool = False  # keep the features of all images in memory; needs images that are the same each epoch
    width: int = 24  # the small one: channels of its first layer
    steps: int = 600
    batch_size: int = 256
    lr: float = 1e-3
    shift: int = 1  # random translation in pixels, each way

    def validate(self):
        require(self.width > 0 and self.width % 8 == 0, "encoder.width", self.width, "a positive multiple of 8")
        for name in ("steps", "batch_size"):
            require(getattr(self, name) > 0, f"encoder.{name}", getattr(self, name), "a positive number")
        require(self.lr > 0, "encoder.lr", self.lr, "a positive number")
        require(self.shift >= 0, "encoder.shift", self.shift, "a number of pixels >= 0")
        require(self.name or not self.weights, "encoder.weights", self.weights, "null without encoder.name")


@dataclass
class AutoencoderConfig:
    ch: int = 128  # channels of the first level
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # factor on them, one a level; the image is halved between levels
    num_res_blocks: int = 2
    z_channels: int = 32  # latent channels
    attn_resolutions: tuple[int, ...] = (16,)  # sides of the levels that have self-attention
    decoder_attention: bool = True  # False: MAR
    num_groups: int = 32

    @property
    def downsample(self):
        return 2 ** (len(self.ch_mult) - 1)

    def validate(self):
        for name in ("ch", "num_res_blocks", "z_channels", "num_groups"):
            require(getattr(self, name) > 0, f"autoencoder.{name}", getattr(self, name), "a positive number")
        require(self.ch_mult and all(m > 0 for m in self.ch_mult), "autoencoder.ch_mult", self.ch_mult, "at least one positive number")
        require(all(self.ch * m % self.num_groups == 0 for m in self.ch_mult), "autoencoder.num_groups", self.num_groups,
                f"a divisor of every width: {', '.join(str(self.ch * m) for m in self.ch_mult)}")


@dataclass
class TokenizerLossConfig:
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0  # LPIPS; 0: none
    perceptual_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    perceptual_weights: str | None = None  # file with torchvision's weights of that network; None: torch's hub cache, or its download
    perceptual_random_weights: bool = False  # for tests: a network that learned nothing
    vf_weight: float = 0.1  # alignment; 0: none
    adaptive_vf: bool = True  # times the ratio of gradient norms at the encoder's last layer
    cos_margin: float = 0.5
    distmat_margin: float = 0.25
    disc_weight: float = 0.5  # adversarial term, times the ratio of gradient norms at the decoder's last layer; 0: none
    disc_start: int = 2_500  # batches before it begins; official "5001", which counts the steps of both optimizers
    disc_width: int = 64
    disc_layers: int = 3

    def validate(self):
        for name in ("kl_weight", "perceptual_weight", "vf_weight", "disc_weight", "disc_start"):
            require(getattr(self, name) >= 0, f"loss.{name}", getattr(self, name), "a number >= 0")
        for name in ("cos_margin", "distmat_margin"):
            require(0 <= getattr(self, name) < 2, f"loss.{name}", getattr(self, name), "a number in [0, 2)")
        for name in ("disc_width", "disc_layers"):
            require(getattr(self, name) > 0, f"loss.{name}", getattr(self, name), "a positive number")
        require(not (self.perceptual_weights and self.perceptual_random_weights), "loss.perceptual_random_weights", True,
                "false where loss.perceptual_weights names a file")


@dataclass
class TokenizerOptimConfig:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.9)
    warmup: int = 0  # steps of linear warm-up
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up, down to 0
    ema: float = 0.0  # decay of the weights' average, which then becomes the tokenizer; 0: none, as the official code

    def validate(self):
        require(self.lr > 0, "optim.lr", self.lr, "a positive number")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        require(self.warmup >= 0, "optim.warmup", self.warmup, "a number of steps >= 0")
        require(0 <= self.ema < 1, "optim.ema", self.ema, "a decay in [0, 1); 0 is none")


@dataclass
class StageConfig:
    """One stage of the training: how long, and what differs from loss and optim there."""

    epochs: float | None = None  # one of the two
    steps: int | None = None
    vf_weight: float | None = None
    cos_margin: float | None = None
    distmat_margin: float | None = None
    disc_start: int | None = None  # batches of this stage before the adversarial term begins
    lr: float | None = None

    def validate(self, name):
        length = self.steps if self.steps is not None else self.epochs
        require((self.epochs is None) != (self.steps is None) and length > 0, f"{name}.epochs and {name}.steps", (self.epochs, self.steps),
                "one of the two, positive")
        for field_name, limit in dict(vf_weight=None, cos_margin=2, distmat_margin=2, disc_start=None).items():
            value = getattr(self, field_name)
            require(value is None or 0 <= value and (limit is None or value < limit), f"{name}.{field_name}", value,
                    f"a number >= 0{f' and below {limit}' if limit else ''}, or null")
        require(self.lr is None or self.lr > 0, f"{name}.lr", self.lr, "a positive number, or null")


@dataclass(frozen=True)
class Stage:
    """A stage with all of its settings: steps start <= step < end (0-based), the adversarial term from step disc_start on."""

    start: int
    end: int
    disc_start: int
    vf_weight: float
    cos_margin: float
    distmat_margin: float
    lr: float


@dataclass
class VAVAEConfig:
    """One run of train/vavae.py. The defaults are the paper's where it has them; recipes are train/configs/vavae_*.yaml."""

    run: str = "runs/vavae"  # run directory; the same command run again resumes from it
    tokenizer_out: str | None = None  # file for the tokenizer; None: RUN/tokenizer.safetensors
    encoder_out: str | None = None  # file for the small encoder, if one is trained; None: RUN/encoder.safetensors
    seed: int = 0
    steps: int | None = None  # stop after so many, all stages together; needed without stages
    batch_size: int = 256  # images a step, over all processes and micro-batches
    micro_batch: int | None = None  # images in one forward pass of one process; None: its whole share of the batch
    compile: bool = False  # torch.compile, level by level
    channels_last: bool | None = None  # None: yes; convolutions of cuDNN and of oneDNN both want it
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # auto: bf16 autocast, with losses and latents in fp32, on CUDA and on CPUs that multiply bf16 in hardware (AVX512-BF16, AMX),
    # else fp32; a run keeps what it meant
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int | None = None  # of the CPU; None: PyTorch's choice. The last bits of every sum, and so the weights, depend on their number
    log_every: int = 100  # steps
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 2
    sample_every: int = 5_000  # reconstructions and latent map of held-out images
    sample_num: int = 20
    statistics_images: int = 10_000  # over whose latents mean and deviation are taken
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    optim: TokenizerOptimConfig = field(default_factory=TokenizerOptimConfig)
    stages: tuple[StageConfig, ...] = ()  # one after the other; none: a single stage of `steps`

    @property
    def grid(self):
        return self.data.image_size // self.autoencoder.downsample

    @property
    def aligned(self):
        """Whether any stage aligns the latents."""
        own = [stage.vf_weight for stage in self.stages] or [None]
        return any(self.loss.vf_weight if weight is None else weight for weight in own)

    def use_bf16(self, device):
        return self.precision == "bf16" or (self.precision == "auto" and bool(bf16_units(device)))

    def autoencoder_arguments(self):
        """Keyword arguments of AutoencoderKL."""
        arguments = dataclasses.asdict(self.autoencoder)
        return arguments | dict(in_channels=self.data.channels, out_channels=self.data.channels, embed_dim=self.autoencoder.z_channels,
                                resolution=self.data.image_size)

    def plan(self, num_images):
        """The stages [Stage] for a training set of `num_images`, cut off after `steps`."""
        plan, start = [], 0
        for stage in self.stages or (StageConfig(steps=self.steps),):
            length = stage.steps if stage.steps is not None else max(1, round(stage.epochs * num_images / self.batch_size))
            end = start + length if self.steps is None else min(start + length, self.steps)
            chosen = {name: own if (own := getattr(stage, name)) is not None else getattr(part, name)
                      for part, names in ((self.loss, ("vf_weight", "cos_margin", "distmat_margin", "disc_start")), (self.optim, ("lr",)))
                      for name in names}
            chosen["disc_start"] = start + chosen["disc_start"] if self.loss.disc_weight else end
            if end > start:
                plan.append(Stage(start, end, **chosen))
            start += length
        return plan

    def validate(self):
        for name in ("batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "sample_every", "sample_num", "statistics_images"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        require(self.steps is None or self.steps > 0, "steps", self.steps, "a positive number, or null with stages")
        require(self.steps or self.stages, "steps", self.steps, "a positive number where there are no stages")
        require(self.threads is None or self.threads > 0, "threads", self.threads, "a positive number, or null")
        require(self.micro_batch is None or 0 < self.micro_batch <= self.batch_size and self.batch_size % self.micro_batch == 0,
                "micro_batch", self.micro_batch, f"a divisor of batch_size = {self.batch_size}, or null")
        size = self.data.image_size
        require(size % self.autoencoder.downsample == 0, "data.image_size", size,
                f"a multiple of {self.autoencoder.downsample} (autoencoder.ch_mult has {len(self.autoencoder.ch_mult)} levels)")
        least = 16 if self.loss.perceptual_net == "vgg" else 32
        require(not self.loss.perceptual_weight or size >= least, "loss.perceptual_weight", self.loss.perceptual_weight,
                f"0 with data.image_size = {size}: {self.loss.perceptual_net} needs {least} pixels")
        require(not self.loss.disc_weight or size >= 3 * 2**self.loss.disc_layers, "loss.disc_layers", self.loss.disc_layers,
                f"fewer, or loss.disc_weight 0: so many halvings need {3 * 2**self.loss.disc_layers} pixels, and data.image_size is {size}")
        require(not (self.encoder.cache and self.data.augmented), "encoder.cache", self.encoder.cache,
                "data.crop = center and data.flip = false: each random crop has features of its own")
        for i, stage in enumerate(self.stages):
            stage.validate(f"stages[{i}]")


def begun_precision(config, device):
    """In which precision a saved run was begun. "auto" is of a run that is older than precision settled once: bf16 on CUDA, else fp32."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" else "fp32"


def from_dict(cls, values, name=""):
    """Builds dataclass `cls` from nested dictionaries (a parsed YAML file); unknown keys and wrong types raise ConfigError."""
    if not isinstance(values, dict):
        expected = ", ".join(f.name for f in dataclasses.fields(cls))
        raise ConfigError(f"{name or 'configuration'}: got {values!r}, expected a mapping of {expected}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {_join(name, close[0])}?" if close else f"expected {', '.join(hints)}"
            raise ConfigError(f"{_join(name, key)}: unknown key; {hint}")
    return cls(**{key: _checked(hints[key], value, _join(name, key)) for key, value in values.items()})


def _join(prefix, key):
    return f"{prefix}.{key}" if prefix else str(key)


def _checked(hint, value, name):
    """`value` as the type `hint`, or ConfigError. Integers serve as floats and lists as tuples; nothing else is converted."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, name)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        *others, hint = [arg for arg in args if arg is not type(None)]
        for other in others:
            with contextlib.suppress(ConfigError):
                return _checked(other, value, name)
        try:
            return _checked(hint, value, name)
        except ConfigError:
            if not others:
                raise
            choices = [*(other.__name__ for other in others), *map(str, typing.get_args(hint))]
            raise ConfigError(f"{name}: got {value!r}, expected {' or '.join(choices)}") from None
    if origin is Literal:
        require(value in args and not isinstance(value, bool), name, value, f"one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        variadic = len(args) == 2 and args[1] is Ellipsis
        require(isinstance(value, (list, tuple)) and (variadic or len(value) == len(args)), name, value,
                f"a list of {'' if variadic else f'{len(args)} '}{args[0].__name__} values")
        return tuple(_checked(args[0] if variadic else arg, item, f"{name}[{i}]")
                     for i, (item, arg) in enumerate(zip(value, value if variadic else args, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    hint_text = hint.__name__
    if hint is float and isinstance(value, str) and "e" in value.lower():
        hint_text += " (YAML reads an exponent only after a decimal point: 1.0e-4)"
    require(isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool), name, value, hint_text)
    return value


def finish(config):
    """Resolves presets, then validates the parts and the whole; returns the same object."""
    for part in (*(getattr(config, f.name) for f in dataclasses.fields(config)), config):
        if hasattr(part, "resolve"):
            part.resolve()
        if hasattr(part, "validate"):
            part.validate()
    return config


def read_yaml(path):
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config: no file {path}")
    with optional("a recipe"):
        import yaml

    try:
        return yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not valid YAML: {error}") from None


def load(cls, path):
    """Reads a YAML file into a resolved and validated `cls`."""
    return finish(from_dict(cls, read_yaml(path)))


def save(config, path):
    """Writes every field of `config` as YAML, in the order of the dataclass, atomically."""
    with optional("saving a configuration"):
        import yaml

    values = dataclasses.asdict(config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})
    write_text(path, yaml.safe_dump(values, sort_keys=False))


def differences(old, new, ignore=(), name=""):
    """["field: old value -> new value", ...] of two configurations, leaving out the dotted names in `ignore` and all below them."""
    found = []
    for f in dataclasses.fields(old):
        path, before, after = _join(name, f.name), getattr(old, f.name), getattr(new, f.name)
        if path in ignore:
            continue
        if dataclasses.is_dataclass(before):
            found += differences(before, after, ignore, path)
        elif before != after:
            found.append(f"{path}: {before!r} -> {after!r}")
    return found


def parse(cls, argv, *, recipe=None, description=None):
    """Configuration from the command line: dataclass defaults, then `--config FILE` (default: `recipe`), then any field by its dotted name.

    Args:
        cls: a dataclass of this module.
        argv: arguments without the program's name.
        recipe: YAML file used when the command line has no `--config`.
    Returns: the resolved and validated object.
    Raises: ConfigError; SystemExit for --help and for what tyro rejects (it names the argument); ImportError without tyro, which only
        fields and --help need, or without pyyaml, which recipes need.
    """
    argv, path = list(argv), recipe
    for i, argument in enumerate(argv):
        if argument == "--config" or argument.startswith("--config="):
            if argument == "--config" and i + 1 == len(argv):
                raise ConfigError("config: --config needs a file")
            path = argument.partition("=")[2] or argv[i + 1]
            del argv[i : i + (2 if argument == "--config" else 1)]
            break
    default = from_dict(cls, read_yaml(path)) if path else cls()
    if not argv:
        return finish(default)
    with optional("reading fields of the configuration from the command line"):
        import tyro

    note = f"--config FILE reads a YAML recipe first{f' (default: {recipe})' if recipe else ''}; the fields below override it."
    return finish(tyro.cli(cls, args=argv, default=default, description=f"{description or (cls.__doc__ or '').strip()}\n\n{note}"))
