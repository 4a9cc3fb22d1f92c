"""group_norm_silu on CUDA, for channels-last and contiguous images alike: what differs is the direction of a tile's wide loads.

B images, C channels in G groups, P = H W pixels. A statistics kernel reduces one chunk of pixels per channel, a small kernel merges the
chunks of a group in their order, an apply kernel writes the result; the backward has the same three. Memory-bound: x is read twice forward
(the second time from L2 where it fits), x and the incoming gradient twice backward. No atomics, everything is summed in a fixed order.

Variance: a chunk is shifted by the mean of its first tile, so that what is subtracted in the end, sum^2 / n, is at most TILES times what is
left, and chunks are merged by Chan's formula. A mean of 1000 standard deviations costs nothing.
"""

import functools

import torch
import triton
import triton.language as tl

from lightningdit_kernels.tuning import Config, pick

TILES = 8  # tiles of pixels that one program of the reductions walks over

# BLOCK_P x BLOCK_C elements; for narrower tensors the launcher moves factors of two from one side to the other. Static choice: fewer
# elements a thread, so that most programs run at once; not yet measured on a GPU.
TABLE = {
    (80, "channels_last"): [Config(dict(BLOCK_P=32, BLOCK_C=128), num_warps=8)],
    (80, "contiguous"): [Config(dict(BLOCK_P=2048, BLOCK_C=1), num_warps=4), Config(dict(BLOCK_P=4096, BLOCK_C=1), num_warps=4)],
}
MERGE = Config(dict(BLOCK_K=64), num_warps=4)


@triton.jit
def _tile(program, C, P, SIZE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: the image, the first pixel, the channels, and the offset of the image's first pixel in these channels."""
    c_blocks, chunks = tl.cdiv(C, BLOCK_C), tl.cdiv(P, SIZE)
    image, index = program // c_blocks // chunks, program // c_blocks % chunks
    channel = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    base = image.to(tl.int64) * C * P
    return image, index * SIZE, channel, base


@triton.jit
def _offsets(pixel, channel, C, P, CHANNELS_LAST: tl.constexpr):
    """Offsets inside an image, and which of them exist: (BLOCK_P, BLOCK_C)."""
    inside = (pixel < P)[:, None] & (channel < C)[None, :]
    if CHANNELS_LAST:
        return pixel[:, None] * C + channel[None, :], inside
    return channel[None, :] * P + pixel[:, None], inside


@triton.jit
def _moments_kernel(x, mean, square, C, P, CHANNELS_LAST: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of every channel over one chunk of TILES * BLOCK_P pixels; mean, square (B, chunks, C)."""
    image, start, channel, base = _tile(tl.program_id(0), C, P, TILES * BLOCK_P, BLOCK_C)
    count = tl.minimum(P - start, TILES * BLOCK_P)
    first, inside = _offsets(start + tl.arange(0, BLOCK_P), channel, C, P, CHANNELS_LAST)
    tile = tl.load(x + base + first, mask=inside, other=0.0).to(tl.float32)
    shift = tl.sum(tile, 0) / tl.minimum(count, BLOCK_P)
    total, squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32), tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for index in range(0, TILES):
        offset, inside = _offsets(start + index * BLOCK_P + tl.arange(0, BLOCK_P), channel, C, P, CHANNELS_LAST)
        tile = tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32)
        tile = tl.where(inside, tile - shift[None, :], 0.0)
        total += tile
        squares += tile * tile
    total_c = tl.sum(total, 0)
    partial = (image.to(tl.int64) * tl.cdiv(P, TILES * BLOCK_P) + start // (TILES * BLOCK_P)) * C + channel
    tl.store(mean + partial, shift + total_c / count, mask=channel < C)
    tl.store(square + partial, tl.sum(squares, 0) - total_c * total_c / count, mask=channel < C)


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
def _channel(image, channel, weight, bias, mean, rstd, C, groups):
    """weight, bias, mean and rstd of the channels of a tile, fp32."""
    inside = channel < C
    group = image * groups + channel // (C // groups)
    w, b = tl.load(weight + channel, mask=inside, other=0.0), tl.load(bias + channel, mask=inside, other=0.0)
    return w.to(tl.float32), b.to(tl.float32), tl.load(mean + group, mask=inside, other=0.0), tl.load(rstd + group, mask=inside, other=0.0)


@triton.jit
def _group_norm_silu_fwd_kernel(x, weight, bias, mean, rstd, out, C, P, groups, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr,
                                BLOCK_C: tl.constexpr):
    image, start, channel, base = _tile(tl.program_id(0), C, P, BLOCK_P, BLOCK_C)
    w, b, centre, scale = _channel(image, channel, weight, bias, mean, rstd, C, groups)
    offset, inside = _offsets(start + tl.arange(0, BLOCK_P), channel, C, P, CHANNELS_LAST)
    x_hat = (tl.load(x + base + offset, mask=inside, other=0.0).to(tl.float32) - centre[None, :]) * scale[None, :]
    y = x_hat * w[None, :] + b[None, :]
    tl.store(out + base + offset, (y / (1.0 + tl.exp(-y))).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _grad_of_norm(grad, x, offset, inside, w, b, centre, scale):
    """x_hat and the gradient to y = x_hat * w + b: that of silu(y), recomputed."""
    x_hat = (tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - centre[None, :]) * scale[None, :]
    y = x_hat * w[None, :] + b[None, :]
    sigmoid = 1.0 / (1.0 + tl.exp(-y))
    d = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32) * (sigmoid + y * sigmoid * (1.0 - sigmoid))
    return x_hat, d


@triton.jit
def _grad_sums_kernel(grad, x, weight, bias, mean, rstd, d_sum, dx_sum, C, P, groups, CHANNELS_LAST: tl.constexpr, TILES: tl.constexpr,
                      BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """sum of dy and of dy * x_hat of every channel over one chunk of TILES * BLOCK_P pixels; d_sum, dx_sum (B, chunks, C)."""
    image, start, channel, base = _tile(tl.program_id(0), C, P, TILES * BLOCK_P, BLOCK_C)
    w, b, centre, scale = _channel(image, channel, weight, bias, mean, rstd, C, groups)
    total, along = tl.zeros([BLOCK_P, BLOCK_C], tl.float32), tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for index in range(0, TILES):
        offset, inside = _offsets(start + index * BLOCK_P + tl.arange(0, BLOCK_P), channel, C, P, CHANNELS_LAST)
        x_hat, d = _grad_of_norm(grad + base, x + base, offset, inside, w, b, centre, scale)
        total += d
        along += d * x_hat
    partial = (image.to(tl.int64) * tl.cdiv(P, TILES * BLOCK_P) + start // (TILES * BLOCK_P)) * C + channel
    tl.store(d_sum + partial, tl.sum(total, 0), mask=channel < C)
    tl.store(dx_sum + partial, tl.sum(along, 0), mask=channel < C)


@triton.jit
def _merge_grad_sums_kernel(d_sum, dx_sum, weight, grad_bias, grad_weight, offset, slope, C, P, groups, chunks, GROUP: tl.constexpr,
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
    total_c, along_c = tl.sum(total, 0), tl.sum(along, 0)
    w = tl.load(weight + channel, mask=member, other=0.0).to(tl.float32)
    members = (P * width).to(tl.float32)
    tl.store(grad_bias + image * C + channel, total_c, mask=member)
    tl.store(grad_weight + image * C + channel, along_c, mask=member)
    tl.store(offset + tl.program_id(0), tl.sum(total_c * w, 0) / members)
    tl.store(slope + tl.program_id(0), tl.sum(along_c * w, 0) / members)


@triton.jit
def _group_norm_silu_bwd_kernel(grad, x, weight, bias, mean, rstd, offset_g, slope_g, grad_x, C, P, groups, CHANNELS_LAST: tl.constexpr,
                                BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """dx = rstd * (dy * w - mean(dy * w) - x_hat * mean(dy * w * x_hat)), the means over the group."""
    image, start, channel, base = _tile(tl.program_id(0), C, P, BLOCK_P, BLOCK_C)
    w, b, centre, scale = _channel(image, channel, weight, bias, mean, rstd, C, groups)
    group = image * groups + channel // (C // groups)
    shift, slope = tl.load(offset_g + group, mask=channel < C, other=0.0), tl.load(slope_g + group, mask=channel < C, other=0.0)
    offset, inside = _offsets(start + tl.arange(0, BLOCK_P), channel, C, P, CHANNELS_LAST)
    x_hat, d = _grad_of_norm(grad + base, x + base, offset, inside, w, b, centre, scale)
    dx = (d * w[None, :] - shift[None, :] - x_hat * slope[None, :]) * scale[None, :]
    tl.store(grad_x + base + offset, dx.to(grad_x.dtype.element_ty), mask=inside)


def _blocks(config, C, P):
    """BLOCK_P, BLOCK_C of the configuration's number of elements, neither wider than the tensor needs."""
    elements = config.blocks["BLOCK_P"] * config.blocks["BLOCK_C"]
    block_c = min(config.blocks["BLOCK_C"], triton.next_power_of_2(C))
    block_p = min(elements // block_c, triton.next_power_of_2(P))
    return dict(BLOCK_P=block_p, BLOCK_C=min(elements // block_p, triton.next_power_of_2(C)))


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
        blocks = dict(CHANNELS_LAST=channels_last) | config.launch() | _blocks(config, C, P)
        size = TILES * blocks["BLOCK_P"]
        chunks, c_blocks = triton.cdiv(P, size), triton.cdiv(C, blocks["BLOCK_C"])
        part_mean, part_square = x.new_empty(B, chunks, C, dtype=torch.float32), x.new_empty(B, chunks, C, dtype=torch.float32)
        _moments_kernel[(B * chunks * c_blocks,)](x, part_mean, part_square, C, P, TILES=TILES, **blocks)
        _merge_moments_kernel[(B * num_groups,)](part_mean, part_square, mean, rstd, C, P, num_groups, chunks, size, eps,
                                                 GROUP=triton.next_power_of_2(C // num_groups), **MERGE.launch())
        grid = (B * triton.cdiv(P, blocks["BLOCK_P"]) * c_blocks,)
        _group_norm_silu_fwd_kernel[grid](x, weight, bias, mean, rstd, out, C, P, num_groups, **blocks)

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
        blocks = dict(CHANNELS_LAST=channels_last) | config.launch() | _blocks(config, C, P)
        chunks, c_blocks = triton.cdiv(P, TILES * blocks["BLOCK_P"]), triton.cdiv(C, blocks["BLOCK_C"])
        d_sum, dx_sum = x.new_empty(B, chunks, C, dtype=torch.float32), x.new_empty(B, chunks, C, dtype=torch.float32)
        offset, slope = torch.empty_like(mean), torch.empty_like(mean)
        arguments = grad, x, weight, bias, mean, rstd
        _grad_sums_kernel[(B * chunks * c_blocks,)](*arguments, d_sum, dx_sum, C, P, num_groups, TILES=TILES, **blocks)
        _merge_grad_sums_kernel[(B * num_groups,)](d_sum, dx_sum, weight, grad_bias, grad_weight, offset, slope, C, P, num_groups, chunks,
                                                   GROUP=triton.next_power_of_2(C // num_groups), **MERGE.launch())
        grid = (B * triton.cdiv(P, blocks["BLOCK_P"]) * c_blocks,)
        _group_norm_silu_bwd_kernel[grid](*arguments, offset, slope, grad_x, C, P, num_groups, **blocks)

    launch(pick("group_norm_silu_backward", TABLE, x.device, _shape_class(channels_last), [C, P, x.dtype, grad.dtype], launch))
    return grad_x, grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype)


def audit_cases():
    """Every kernel and configuration at the VA-VAE's widest image: 128 channels in 32 groups, 256 x 256 pixels. Only the merging kernels
    are compiled for the channels of a group: also for the 256 and 512 channels of its narrower images."""
    cases = []
    sizes = dict(C="i32", P="i32")
    for dtype in ("fp32", "bf16"):
        image, fp32 = f"*{dtype}", "*fp32"
        affine = dict(weight=fp32, bias=fp32, mean=fp32, rstd=fp32)
        both, result = dict(grad=image, x=image, **affine), dict(**sizes, groups="i32")
        signatures = {
            _moments_kernel: dict(x=image, mean=fp32, square=fp32, **sizes),
            _group_norm_silu_fwd_kernel: dict(x=image, **affine, out=image, **result),
            _grad_sums_kernel: dict(**both, d_sum=fp32, dx_sum=fp32, **result),
            _group_norm_silu_bwd_kernel: dict(**both, offset_g=fp32, slope_g=fp32, grad_x=image, **result),
        }
        for (arch, name), configs in TABLE.items():
            for config in configs:
                for kernel, signature in signatures.items():
                    constants = dict(CHANNELS_LAST=name == "channels_last", **config.blocks)
                    if "TILES" in kernel.arg_names:
                        constants["TILES"] = TILES
                    label = f"{kernel.fn.__name__.strip('_')} {dtype} {name} {','.join(map(str, config.blocks.values()))}"
                    cases.append(_case(label, kernel, signature, constants, config, "memory", arch))
    merge = dict(C="i32", P="i32", groups="i32", chunks="i32")
    moments = dict(part_mean="*fp32", part_square="*fp32", mean="*fp32", rstd="*fp32", **merge, size="i32", eps="fp32")
    names = ("d_sum", "dx_sum", "weight", "grad_bias", "grad_weight", "offset", "slope")
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
