"""group_norm_silu on CUDA, for channels-last and contiguous images alike: what differs is the direction of a tile's wide loads.

B images, C channels in G groups, P = H W pixels. A statistics kernel reduces one chunk of pixels per channel, a small kernel merges the
chunks of a group in their order, an apply kernel writes the result; the backward has the same three. Memory-bound: x is read twice forward,
x and the incoming gradient twice backward. Apply kernels start at the end, where the reductions stopped: what these read last, up to the
50 MB of L2, is still on the chip. No atomics, everything is summed in a fixed order.

A program walks over tiles of pixels of the same channels: what is known of a channel is loaded once, and an element costs 11 instructions
forward and 19 backward (sm_90, bf16). Compiled for C and G, of which a model has few, and for EVEN, never for a number of images.

Variance: a chunk is shifted by the mean of its first tile, so that what is subtracted in the end, sum^2 / n, is at most TILES times what is
left, and chunks are merged by Chan's formula. A mean of 1000 standard deviations costs nothing.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from lightningdit_kernels.launch_triton import cdiv, fast_launch, next_power_of_2
from lightningdit_kernels.tuning import Config, pick

TILES = 8  # tiles of pixels that one program walks over, at most
PROGRAMS = 64  # of an image, before they walk over more than one tile: 8 images keep 132 multiprocessors busy with 4 programs each

# BLOCK_P x BLOCK_C elements; for narrower tensors the launcher moves factors of two from one side to the other. Static choice: fewer
# elements a thread, so that three programs or more share a multiprocessor (sm_90); not yet measured on a GPU.
TABLE = {
    (80, "channels_last"): [Config(dict(BLOCK_P=32, BLOCK_C=128), num_warps=8)],
    (80, "contiguous"): [Config(dict(BLOCK_P=2048, BLOCK_C=1), num_warps=8)],
}
MERGE = Config(dict(BLOCK_K=64), num_warps=4)


@triton.jit
def _first_tile(program, tiles, P, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program's first tile: image, first pixel, channels; offset of its first pixel in all images, those of its elements from
    there, (BLOCK_P, BLOCK_C), and the step to the next tile."""
    c_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    chunks = tl.cdiv(P, tiles * BLOCK_P)
    image, start = (program // c_blocks // chunks).to(tl.int64), program // c_blocks % chunks * (tiles * BLOCK_P)
    channel = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.arange(0, BLOCK_P)[:, None]
    if CHANNELS_LAST:
        return image, start, channel, image * P * C + start * C, pixel * C + channel[None, :], BLOCK_P * C
    return image, start, channel, image * P * C + start, channel[None, :] * P + pixel, BLOCK_P


@triton.jit
def _inside(pixel, channel, P, C: tl.constexpr):
    return (pixel < P)[:, None] & (channel < C)[None, :]


@triton.jit
def _load(x, offset, pixel, channel, P, C: tl.constexpr, EVEN: tl.constexpr):
    """A tile in fp32, zero outside of the image. EVEN: all tiles lie inside."""
    if EVEN:
        return tl.load(x + offset).to(tl.float32)
    return tl.load(x + offset, mask=_inside(pixel, channel, P, C), other=0.0).to(tl.float32)


@triton.jit
def _store(x, offset, value, pixel, channel, P, C: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        tl.store(x + offset, value.to(x.dtype.element_ty))
    else:
        tl.store(x + offset, value.to(x.dtype.element_ty), mask=_inside(pixel, channel, P, C))


@triton.jit
def _sigmoid(y):
    """In 5 instructions: a division alone takes 7 (sm_90), most of them for denominators beyond 2^126. Its error is at most 2^-22 of the
    quotient, that of the squared root 2^-21.9."""
    root = tl.rsqrt(1.0 + tl.exp2(y * -1.4426950408889634))
    return root * root


@fast_launch
@triton.jit(do_not_specialize=["tiles"])
def _moments_kernel(x, mean, square, tiles, P, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr,
                    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of every channel over one chunk of tiles * BLOCK_P pixels; mean, square (B, chunks, C)."""
    image, start, channel, base, offset, step = _first_tile(tl.program_id(0), tiles, P, C, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    pixel = start + tl.arange(0, BLOCK_P)
    x += base
    shift = tl.sum(_load(x, offset, pixel, channel, P, C, EVEN), 0) / tl.minimum(P - start, BLOCK_P)
    total, squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32), tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for _ in range(0, tiles):
        tile = _load(x, offset, pixel, channel, P, C, EVEN) - shift[None, :]
        if not EVEN:
            tile = tl.where(_inside(pixel, channel, P, C), tile, 0.0)
        total += tile
        squares += tile * tile
        x += step
        pixel += BLOCK_P
    total_c, count = tl.sum(total, 0), tl.minimum(P - start, tiles * BLOCK_P)
    partial = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64) * C + channel
    tl.store(mean + partial, shift + total_c / count, mask=channel < C)
    tl.store(square + partial, tl.sum(squares, 0) - total_c * total_c / count, mask=channel < C)


@fast_launch
@triton.jit
def _merge_moments_kernel(part_mean, part_square, mean, rstd, C, P, groups, chunks, size, eps, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of one group of one image, over the chunks of `size` pixels; mean, rstd (B, G)."""
    image, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    width = C // groups
    channel = group * width + tl.arange(0, GROUP)
    part_mean += image * chunks * C
    part_square += image * chunks * C
    members = (P * width).to(tl.float32)
    total = tl.zeros([BLOCK_K, GROUP], tl.float32)
    for start in range(0, chunks, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < chunks)[:, None] & (tl.arange(0, GROUP) < width)[None, :]
        count = tl.minimum(P - k * size, size).to(tl.float32)[:, None]
        total += count * tl.load(part_mean + k[:, None] * C + channel[None, :], mask=mask, other=0.0)
    centre = tl.sum(total) / members
    total = tl.zeros([BLOCK_K, GROUP], tl.float32)
    for start in range(0, chunks, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < chunks)[:, None] & (tl.arange(0, GROUP) < width)[None, :]
        count = tl.minimum(P - k * size, size).to(tl.float32)[:, None]
        away = tl.load(part_mean + k[:, None] * C + channel[None, :], mask=mask, other=0.0) - centre
        total += tl.load(part_square + k[:, None] * C + channel[None, :], mask=mask, other=0.0) + tl.where(mask, count * away * away, 0.0)
    tl.store(mean + tl.program_id(0), centre)
    tl.store(rstd + tl.program_id(0), 1.0 / tl.sqrt(tl.sum(total) / members + eps))


@triton.jit
def _channel(image, channel, weight, bias, mean, rstd, C: tl.constexpr, GROUPS: tl.constexpr):
    """Of the channels of a tile, fp32: mean, scale and bias of y = (x - mean) * scale + bias; rstd, and where their groups are."""
    inside = channel < C
    group = image * GROUPS + channel // (C // GROUPS)
    w, b = tl.load(weight + channel, mask=inside, other=0.0), tl.load(bias + channel, mask=inside, other=0.0)
    centre, inverse = tl.load(mean + group, mask=inside, other=0.0), tl.load(rstd + group, mask=inside, other=0.0)
    return centre, inverse * w.to(tl.float32), b.to(tl.float32), inverse, group


@fast_launch
@triton.jit(do_not_specialize=["tiles"])
def _group_norm_silu_fwd_kernel(x, weight, bias, mean, rstd, out, tiles, P, C: tl.constexpr, GROUPS: tl.constexpr,
                                CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, start, channel, base, offset, step = _first_tile(program, tiles, P, C, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    centre, scale, b, _, _ = _channel(image, channel, weight, bias, mean, rstd, C, GROUPS)
    b -= centre * scale  # one multiply-add an element
    pixel = start + tl.arange(0, BLOCK_P)
    x += base
    out += base
    for _ in range(0, tiles):
        y = _load(x, offset, pixel, channel, P, C, EVEN) * scale[None, :] + b[None, :]
        _store(out, offset, y * _sigmoid(y), pixel, channel, P, C, EVEN)
        x += step
        out += step
        pixel += BLOCK_P


@triton.jit
def _grad_of_norm(grad, x, centre, scale, b):
    """x - mean, and the gradient to y = (x - mean) * scale + b: that of silu(y), recomputed."""
    x -= centre[None, :]
    y = x * scale[None, :] + b[None, :]
    sigmoid = _sigmoid(y)
    return x, grad * (sigmoid + sigmoid * (y - y * sigmoid))


@fast_launch
@triton.jit(do_not_specialize=["tiles"])
def _grad_sums_kernel(grad, x, weight, bias, mean, rstd, d_sum, dx_sum, tiles, P, C: tl.constexpr, GROUPS: tl.constexpr,
                      CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """sum of dy and of dy * (x - mean) of every channel over one chunk of tiles * BLOCK_P pixels; d_sum, dx_sum (B, chunks, C)."""
    image, start, channel, base, offset, step = _first_tile(tl.program_id(0), tiles, P, C, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    centre, scale, b, _, _ = _channel(image, channel, weight, bias, mean, rstd, C, GROUPS)
    pixel = start + tl.arange(0, BLOCK_P)
    grad += base
    x += base
    # One offset moves: with two pointers, fp32 of 256 channels spills (triton 3.9, sm_90). Second passes spill with the offset (sm_100).
    total, along = tl.zeros([BLOCK_P, BLOCK_C], tl.float32), tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for _ in range(0, tiles):
        d = _load(grad, offset, pixel, channel, P, C, EVEN)
        centred, d = _grad_of_norm(d, _load(x, offset, pixel, channel, P, C, EVEN), centre, scale, b)
        total += d
        along += d * centred
        offset += step
        pixel += BLOCK_P
    partial = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64) * C + channel
    tl.store(d_sum + partial, tl.sum(total, 0), mask=channel < C)
    tl.store(dx_sum + partial, tl.sum(along, 0), mask=channel < C)


@fast_launch
@triton.jit
def _merge_grad_sums_kernel(d_sum, dx_sum, weight, rstd, grad_bias, grad_weight, offset, slope, C, P, groups, chunks, GROUP: tl.constexpr,
                            BLOCK_K: tl.constexpr):
    """Of one group of one image: the sums of its channels, (B, C), and the means of dy * w and of dy * w * x_hat, (B, G)."""
    image, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    width = C // groups
    channel = group * width + tl.arange(0, GROUP)
    member = tl.arange(0, GROUP) < width
    total, along = tl.zeros([BLOCK_K, GROUP], tl.float32), tl.zeros([BLOCK_K, GROUP], tl.float32)
    for start in range(0, chunks, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < chunks)[:, None] & member[None, :]
        place = (image * chunks + k[:, None]) * C + channel[None, :]
        total += tl.load(d_sum + place, mask=mask, other=0.0)
        along += tl.load(dx_sum + place, mask=mask, other=0.0)
    total_c, along_c = tl.sum(total, 0), tl.sum(along, 0) * tl.load(rstd + tl.program_id(0))
    w = tl.load(weight + channel, mask=member, other=0.0).to(tl.float32)
    members = (P * width).to(tl.float32)
    tl.store(grad_bias + image * C + channel, total_c, mask=member)
    tl.store(grad_weight + image * C + channel, along_c, mask=member)
    tl.store(offset + tl.program_id(0), tl.sum(total_c * w, 0) / members)
    tl.store(slope + tl.program_id(0), tl.sum(along_c * w, 0) / members)


@fast_launch
@triton.jit(do_not_specialize=["tiles"])
def _group_norm_silu_bwd_kernel(grad, x, weight, bias, mean, rstd, offset_g, slope_g, grad_x, tiles, P, C: tl.constexpr,
                                GROUPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, EVEN: tl.constexpr, BLOCK_P: tl.constexpr,
                                BLOCK_C: tl.constexpr):
    """dx = rstd * (dy * w - mean(dy * w) - x_hat * mean(dy * w * x_hat)), the means over the group."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image, start, channel, base, offset, step = _first_tile(program, tiles, P, C, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    centre, scale, b, inverse, group = _channel(image, channel, weight, bias, mean, rstd, C, GROUPS)
    shift = inverse * tl.load(offset_g + group, mask=channel < C, other=0.0)
    slope = inverse * inverse * tl.load(slope_g + group, mask=channel < C, other=0.0)
    pixel = start + tl.arange(0, BLOCK_P)
    grad += base
    x += base
    grad_x += base
    for _ in range(0, tiles):
        d = _load(grad, offset, pixel, channel, P, C, EVEN)
        centred, d = _grad_of_norm(d, _load(x, offset, pixel, channel, P, C, EVEN), centre, scale, b)
        _store(grad_x, offset, d * scale[None, :] - (centred * slope[None, :] + shift[None, :]), pixel, channel, P, C, EVEN)
        grad += step
        x += step
        grad_x += step
        pixel += BLOCK_P


def _launch_options(config, C, P, channels_last):
    """Keywords of a launch, tiles of a program, chunks of pixels and programs of an image. Blocks have the configuration's number of
    elements, neither side wider than the tensor needs. Nothing depends on the number of images.
    """
    elements, widest = config.blocks["BLOCK_P"] * config.blocks["BLOCK_C"], config.blocks["BLOCK_C"]
    block_c = math.gcd(C, widest)  # no masked channels; 96 as 3 blocks of 32
    if block_c < min(32, widest):
        block_c = min(widest, next_power_of_2(C))
    block_p = min(elements // block_c, next_power_of_2(P))
    block_c = min(elements // block_p, next_power_of_2(C))
    tiles = max(1, min(TILES, P // block_p, P * C // (PROGRAMS * elements)))
    tiles = 1 << tiles.bit_length() - 1  # divides the pixels of more images
    chunks = cdiv(P, tiles * block_p)
    even = P % (tiles * block_p) == 0 and C % block_c == 0
    blocks = dict(CHANNELS_LAST=channels_last, EVEN=even, BLOCK_P=block_p, BLOCK_C=block_c)
    return config.launch() | blocks, tiles, chunks, chunks * cdiv(C, block_c)


def _shape_class(channels_last):
    return "channels_last" if channels_last else "contiguous"


def group_norm_silu_fwd(x, weight, bias, num_groups, eps, out_dtype, channels_last):
    """x (B, C, H, W), dense in the stated format -> (out in out_dtype and x's format, mean (B, G), rstd (B, G) fp32)."""
    B, C, P = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    mean, rstd = x.new_empty(B, num_groups, dtype=torch.float32), x.new_empty(B, num_groups, dtype=torch.float32)
    out = torch.empty_like(x, dtype=out_dtype)
    if x.numel() == 0:
        return out, mean, rstd

    def launch(config):
        blocks, tiles, chunks, programs = _launch_options(config, C, P, channels_last)
        size = tiles * blocks["BLOCK_P"]
        part_mean, part_square = x.new_empty(B, chunks, C, dtype=torch.float32), x.new_empty(B, chunks, C, dtype=torch.float32)
        _moments_kernel[(B * programs,)](x, part_mean, part_square, tiles, P, C, **blocks)
        _merge_moments_kernel[(B * num_groups,)](part_mean, part_square, mean, rstd, C, P, num_groups, chunks, size, eps,
                                                 GROUP=next_power_of_2(C // num_groups), **MERGE.launch())
        _group_norm_silu_fwd_kernel[(B * programs,)](x, weight, bias, mean, rstd, out, tiles, P, C, num_groups, **blocks)

    launch(pick("group_norm_silu", TABLE, x.device, _shape_class(channels_last), [C, P, x.dtype, out_dtype], launch))
    return out, mean, rstd


def group_norm_silu_bwd(grad, x, weight, bias, mean, rstd, num_groups, channels_last):
    """grad and x (B, C, H, W), dense in the stated format -> the gradients to x, weight and bias, in their dtypes."""
    B, C, P = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    grad_weight, grad_bias = x.new_empty(B, C, dtype=torch.float32), x.new_empty(B, C, dtype=torch.float32)

    def launch(config):
        blocks, tiles, chunks, programs = _launch_options(config, C, P, channels_last)
        d_sum, dx_sum = x.new_empty(B, chunks, C, dtype=torch.float32), x.new_empty(B, chunks, C, dtype=torch.float32)
        offset, slope = torch.empty_like(mean), torch.empty_like(mean)
        arguments = grad, x, weight, bias, mean, rstd
        _grad_sums_kernel[(B * programs,)](*arguments, d_sum, dx_sum, tiles, P, C, num_groups, **blocks)
        results = grad_bias, grad_weight, offset, slope
        _merge_grad_sums_kernel[(B * num_groups,)](d_sum, dx_sum, weight, rstd, *results, C, P, num_groups, chunks,
                                                   GROUP=next_power_of_2(C // num_groups), **MERGE.launch())
        _group_norm_silu_bwd_kernel[(B * programs,)](*arguments, offset, slope, grad_x, tiles, P, C, num_groups, **blocks)

    launch(pick("group_norm_silu_backward", TABLE, x.device, _shape_class(channels_last), [C, P, x.dtype, grad.dtype], launch))
    return grad_x, grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype)


def audit_cases():
    """Every kernel and configuration at the widths of the VA-VAE: 128, 256 and 512 channels in 32 groups. Channels last, tiles are the same
    for all its images; contiguous ones of 32 x 32 and 16 x 16 pixels have tiles of several channels."""
    cases = []
    sizes = dict(tiles="i32", P="i32")
    shapes = [("channels_last", 128, 256), ("channels_last", 256, 128), ("channels_last", 512, 32)]
    shapes += [("contiguous", 128, 256), ("contiguous", 256, 32), ("contiguous", 512, 16)]
    for dtype in ("fp32", "bf16"):
        image, fp32 = f"*{dtype}", "*fp32"
        affine = dict(weight=fp32, bias=fp32, mean=fp32, rstd=fp32)
        both = dict(grad=image, x=image, **affine)
        signatures = {
            _moments_kernel: dict(x=image, mean=fp32, square=fp32, **sizes),
            _group_norm_silu_fwd_kernel: dict(x=image, **affine, out=image, **sizes),
            _grad_sums_kernel: dict(**both, d_sum=fp32, dx_sum=fp32, **sizes),
            _group_norm_silu_bwd_kernel: dict(**both, offset_g=fp32, slope_g=fp32, grad_x=image, **sizes),
        }
        for (name, C, size), config in ((shape, config) for shape in shapes for config in TABLE[80, shape[0]]):
            options = dict(C=C, GROUPS=32) | _launch_options(config, C, size * size, name == "channels_last")[0]
            blocks = f"{options['BLOCK_P']},{options['BLOCK_C']}"
            for kernel, signature in signatures.items():
                label = f"{kernel.fn.__name__.strip('_')} {dtype} {name} {C} {blocks}"
                constants = {key: options[key] for key in kernel.arg_names if key in options}
                cases.append(_case(label, kernel, signature, constants, config, "memory", 80))
    merge = dict(C="i32", P="i32", groups="i32", chunks="i32")
    moments = dict(part_mean="*fp32", part_square="*fp32", mean="*fp32", rstd="*fp32", **merge, size="i32", eps="fp32")
    names = ("d_sum", "dx_sum", "weight", "rstd", "grad_bias", "grad_weight", "offset", "slope")
    sums = {**{name: "*fp32" for name in names}, **merge}
    for group in (4, 8, 16):
        constants, suffix = dict(GROUP=group, **MERGE.blocks), "" if group == 4 else f" GROUP={group}"
        cases.append(_case(f"merge_moments_kernel{suffix}", _merge_moments_kernel, moments, constants, MERGE, "small", 80))
        cases.append(_case(f"merge_grad_sums_kernel{suffix}", _merge_grad_sums_kernel, sums, constants, MERGE, "small", 80))
    return cases


def _case(name, kernel, signature, constants, config, kind, arch):
    divisible = [key for key, value in signature.items() if value[0] == "*" or key in ("C", "P")]
    return dict(name=name, kernel=kernel, signature={**signature, **{key: "constexpr" for key in constants}}, constexprs=constants,
                divisible=divisible, num_warps=config.num_warps, num_stages=config.num_stages, kind=kind,
                archs=tuple(a for a in (80, 90, 100) if a >= arch))


def workloads(images: int = 8):
    """What training the VA-VAE launches, for lightningdit_kernels.traffic: 128 channels in 32 groups, 256 x 256 pixels, channels last."""
    weight, bias, mean, rstd = torch.empty(128), torch.empty(128), torch.empty(images, 32), torch.empty(images, 32)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        x, grad = (torch.empty(images, 256, 256, 128, dtype=dtype).permute(0, 3, 1, 2) for _ in range(2))
        forward, backward = (x, weight, bias), (grad, x, weight, bias, mean, rstd)
        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        # Statistics come first: what they are taken of is read twice.
        found += [dict(name=f"group norm forward {name}", launch=functools.partial(group_norm_silu_fwd, *forward, 32, 1e-6, dtype, True),
                       reads=(x, *forward)),
                  dict(name=f"group norm backward {name}", launch=functools.partial(group_norm_silu_bwd, *backward, 32, True),
                       reads=(grad, x, *backward))]
    return found
