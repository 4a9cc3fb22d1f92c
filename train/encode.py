"""Encodes images to a store of latents, once, for any number of trainings.

    python train/encode.py --data.path photos --data.image-size 256 --tokenizer.path tokenizer.safetensors --out latents
    torchrun --nproc-per-node=8 train/encode.py ...           # the same store, byte for byte
    python train/dit.py --data.path latents --tokenizer.path tokenizer.safetensors

The same command run again goes on where it was killed. Images that cannot be read are named, counted and skipped.
"""

import logging
import sys

import torch

from lightningdit import config as configuration
from lightningdit import images, latents
from lightningdit.config import EncodeConfig
from lightningdit.distributed import pick_device, process_group, world
from lightningdit.tokenizer.vavae import load_tokenizer


def main(argv):
    config = configuration.parse(EncodeConfig, argv, description=__doc__)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rank, processes = world()
    with process_group(pick_device(config.device)) as device:
        own = config.tokenizer.statistics == "data"  # then the file need not have any
        tokenizer = load_tokenizer(config.tokenizer.path, statistics=1.0 if own else None, device=device)
        configuration.require(config.data.image_size % tokenizer.downsample == 0, "data.image_size", config.data.image_size,
                              f"a multiple of {tokenizer.downsample}, the tokenizer's pixels a latent position")
        batches = images.open_batches(config.data, config.batch_size, tokenizer.image_channels, device)
        store = latents.encode(tokenizer, batches, config.out, flip=config.data.flip, dtype=config.dtype, shard_size=config.shard_size,
                               statistics=config.tokenizer.statistics, bf16=config.precision == "bf16", rank=rank, world=processes)
        if rank == 0:
            print(store.describe())
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, ImportError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        print("interrupted: the shards that are whole stay; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
