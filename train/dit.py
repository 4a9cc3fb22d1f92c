"""Trains a LightningDiT on the latents of a folder of images, or of the bundled digits, and shows what it draws.

    python train/dit.py --compile                                   # the embedded default: handwritten digits, minutes on a CPU
    python train/dit.py --data.path photos --config my_recipe.yaml  # own images: one folder a class
    python train/dit.py --data.path STORE --config my_recipe.yaml   # latents that train/encode.py made
    python train/dit.py --config train/configs/lightningdit_xl_64ep.yaml --dry-run
    torchrun --nproc-per-node=8 train/dit.py --config ...            # the same on 8 GPUs; docs/distributed.md: on many nodes

The same command run again resumes, on any number of processes. B global batch, C latent channels, S latent positions a side.
"""

import contextlib
import faulthandler
import gc
import os
import sys
from pathlib import Path

# Before torch loads OpenMP: its threads give the core up after some microseconds of waiting for each other instead of milliseconds. On
# two cores shared with other programs the digits train 4 times faster so (87 -> 316 images/s), alone 7 % slower (1731 -> 1613):
# bench/results/spin_cpu.json.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch

from lightningdit import checkpoint, latents, optim
from lightningdit.config import DiTConfig, parse, require
from lightningdit.distributed import (
    check_compiler,
    choose_parallel,
    exit_code,
    gradient_sync,
    interruption,
    make_deterministic,
    parallelise,
    pick_device,
    process_group,
    whole,
    world,
)
from lightningdit.guard import Guard
from lightningdit.log import RunLog
from lightningdit.model import LightningDiT, forward_flops, to_float8
from lightningdit.plan import choose_micro_batch, out_of_memory_advice, print_plan, training_memory
from lightningdit.run import Incidents, Rollback, note_configuration, open_run, resume, settle_precision, trainer_state
from lightningdit.scoring import open_scorer
from lightningdit.training import (
    draw_batch,
    grid_path,
    losses,
    micro_batches,
    open_latents,
    open_tokenizer,
    over_processes,
    redraw_batch,
    save_samples,
    score_digits,
    set_lr,
    share,
    validate,
)

RECIPE = Path(__file__).parent / "configs" / "digits.yaml"


def main(argv):
    dry_run = "--dry-run" in argv
    config = parse(DiTConfig, [a for a in argv if a != "--dry-run"], recipe=RECIPE, description=__doc__)
    require(config.batch_size % world()[1] == 0, "batch_size", config.batch_size, f"a multiple of the {world()[1]} processes")
    with process_group(pick_device(config.device)) as device:
        precision = settle_precision(config, device)
        if dry_run:
            return print_plan(config, device)
        config.check_device(device)
        if world()[0] == 0:
            print(precision)
        if config.compile:
            check_compiler(device)
        if config.deterministic:
            print(make_deterministic())
        while True:
            try:
                return train(config, device)
            except Rollback:  # from the last checkpoint on, as if the program had been started again
                gc.collect()
            except torch.OutOfMemoryError as problem:
                raise SystemExit(f"error: {out_of_memory_advice(config)}\n{problem}") from None


def train(config, device):
    # Data: images -> store of posterior moments of latents, once.
    rank, size = world()
    tokenizer = open_tokenizer(config, device)
    run = open_run(config, tokenizer, device)
    scorer = open_scorer(config, tokenizer, device)
    train_set, val_set = open_latents(config, tokenizer, device)
    note_configuration(run, config)

    # Model, average, optimizer, spread over the processes; then the newest checkpoint over them.
    torch.manual_seed(config.seed)
    model = LightningDiT(**config.model_arguments()).to(device)
    if config.init is not None:
        model.load_weights(checkpoint.load_weights(config.init))
    bf16 = config.use_bf16(device)
    mode = choose_parallel(config.parallel, sum(training_memory(model, 0, bf16, state=config.optim.state).values()), device)
    found = None
    if config.micro_batch == "auto":
        config.micro_batch, found = choose_micro_batch(model, config.batch_size // size, mode, bf16, device, config.optim.state)
    average = optim.frozen_copy(model)
    if config.precision == "fp8":
        to_float8(model)
    if config.compile:
        for block in model.blocks:  # one block's graph serves all of them: compile time does not grow with depth
            block.compile()
    forward = parallelise(model, mode, device, bf16=bf16)
    parallelise(average, mode if mode in ("fsdp", "hsdp") else "none", device, bf16=bf16)
    average = optim.EMA(model, config.optim.ema, config.optim.ema_warmup, average)
    optimizer = optim.build_optimizer(model, config.optim.lr, config.optim.betas, config.optim.eps, config.optim.weight_decay,
                                      config.optim.state, config.optim.name, config.optim.muon_momentum)
    guard = Guard(optimizer, threshold=config.guard.threshold, window=config.guard.window, device=device)
    facts = dict(seed=config.seed, batch_size=config.batch_size, model=config.model_arguments(), classes=train_set.classes,
                 tokenizer=tokenizer.sha256, data=train_set.plan["data"], image_size=config.data.image_size)
    start = resume(run, model, average.model, optimizer, guard, facts)
    incidents = Incidents(run, config.guard.policy, config.guard.most, config.guard.lr_factor)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    log = RunLog(run, start, config.steps, config.log_every, config.batch_size, forward_flops(model), rank, config.keep_checkpoints)
    log.say(f"{run}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(train_set)} images, "
            f"{len(train_set.classes)} classes, {device.type}, {config.precision_on(device)}{', compiled' if config.compile else ''}"
            f"{f', {size} processes ({mode})' if size > 1 else ''}, {f'resuming at step {start}' if start else 'from the beginning'}")
    if found:
        log.say(f"micro-batch {config.micro_batch} of {config.batch_size // size} images a process, the largest that fits {found}")
    model.train()
    pauses = config.log_every, config.checkpoint_every, config.validate_every, config.sample_every, config.score.every or config.steps
    loader = latents.Loader(train_set, config.batch_size, seed=config.seed, start=start, flip=config.data.flip, rank=rank, world=size,
                            device=device)
    with interruption() as interrupted, contextlib.closing(log), contextlib.closing(loader):
        for done in range(start + 1, config.steps + 1):  # updates done at the end of the iteration
            batch = draw_batch(config, tokenizer, *next(loader), done - 1, device, share(config.batch_size))
            lr = set_lr(optimizer, done - 1, config, incidents.lr_factor)
            values, parts, guide = {}, micro_batches(config, batch), average.model if config.flow.guides(done - 1) else None
            for i, part in enumerate(parts):
                with gradient_sync(forward, i + 1 == len(parts)):
                    terms = losses(config, forward, autocast, guide=guide, **part)
                    terms = {name: term.sum() / config.batch_size for name, term in terms.items()}
                    terms["loss"] = sum(terms.values())
                    (terms["loss"] * size).backward()  # gradients are averaged over the processes, terms are parts of the batch's mean
                values = {name: values.get(name, 0) + term.detach() for name, term in terms.items()}
            values = over_processes(values)
            values["grad_norm"] = whole(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
            if config.optim.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.optim.clip_grad_norm, values["grad_norm"])
            values["verdict"] = guard.judge(values["loss"], values["grad_norm"], skip=done in incidents.left_out)
            optimizer.step()  # changes nothing where the guard says so
            optimizer.zero_grad(set_to_none=True)
            average.update(done - 1)
            log.step(done, lr, values)

            end, stopped_by = done == config.steps, interrupted(done)
            stop = end or bool(stopped_by)
            pause = stop or any(done % every == 0 for every in pauses)
            if pause:  # before validation, scores and pictures, whose time is not that of training
                log.flush()
                if log.bad:
                    incidents.handle(log.take_bad(), log, lambda step: redraw_batch(config, tokenizer, train_set, step - 1, device), run)
            if val_set is not None and (done % config.validate_every == 0 or end):
                log.event(done, **validate(config, average.model, tokenizer, val_set, autocast, device))
            if scorer is not None and (done % config.score.every == 0 or end):
                log.score(done, scorer(average.model, autocast))
            if done % config.sample_every == 0 or end:
                log.image(done, "samples", save_samples(config, average.model, tokenizer, grid_path(run, done), autocast, device))
            if done % config.checkpoint_every == 0 or stop:
                log.checkpoint(done, trainer_state(model, average.model, optimizer, guard), facts, last=stop)
            if pause and (end or not stop):  # what interrupts may not wait for long
                log.plot(last=end)
            if stop and not end:
                log.say(f"interrupted: step {done} is saved in {run}; the same command goes on from there")
                return exit_code(stopped_by)

    digits = config.data.path is None and config.final_samples
    score = score_digits(config, average.model, tokenizer, autocast, device) if digits else None
    if rank == 0:
        print(f"grid of samples   {grid_path(run, config.steps)}\nloss curve        {run / 'loss.png'}"
              + (f"\nscore curve       {run / 'score.png'}" if scorer else ""))
        if digits:
            print(f"digits recognised {score:.1%} of {config.final_samples} generated digits are classified as the digit asked for "
                  "(by kernel regression on the real ones)")
    return 0


if __name__ == "__main__":
    faulthandler.enable()  # names the place of a bus error: the store was truncated, or its mount vanished, while it was being read
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, ImportError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C: the last checkpoint stands
        print("interrupted", file=sys.stderr)
        sys.exit(130)
