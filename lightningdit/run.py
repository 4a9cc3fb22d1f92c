"""A run directory: opening it, going on from what it holds, and what it keeps about updates that went wrong.

    run/config.yaml, environment.json, tokenizer.safetensors      what the run is
    run/checkpoints/                                              see checkpoint.py
    run/incidents.json, run/incidents/step_XXXXXXX.safetensors    updates that the guard left out, and their batches
"""
import json
from pathlib import Path

import torch.distributed as dist

from . import checkpoint
from .config import ConfigError, DiTConfig, begun_precision, differences, load, require, save
from .distributed import bf16_units, on_every_rank, wait_for_all, world
from .guard import reason
from .log import write_environment
from .tokenizer.vavae import Tokenizer

# What may change between a run and its resumption; anything else would make it another run.
MAY_CHANGE = (
    "run", "steps", "micro_batch", "compile", "device", "parallel", "log_every", "checkpoint_every", "keep_checkpoints", "sample_every",
    "sample_num", "validate_every", "final_samples", "sample", "score", "guard", "deterministic", "data.path", "data.cache", "data.workers",
    "data.decoder", "data.num_images", "data.resident", "tokenizer.path",
    "model.use_checkpoint", "model.checkpoint_policy",
    "precision",  # settle_precision has compared it
)


def settle_precision(config, device):
    """Replaces precision "auto": by what the run at config.run was begun with, else by bf16 where every device multiplies it in hardware.

    Returns: the precision and the reason for it, a line.
    Raises: ConfigError for another precision than that of the run.
    """
    before, units = Path(config.run) / "config.yaml", bf16_units(device)
    everywhere = on_every_rank(bool(units))
    who = "a process" if world()[1] > 1 else "this CPU"
    if before.is_file():
        begun = begun_precision(load(type(config), before), device)
        require(config.precision in ("auto", begun), "precision", config.precision, f"auto or {begun}, with which {config.run} was begun")
        config.precision, why = begun, f"{config.run} was begun with it"
    elif config.precision == "auto":
        config.precision = "bf16" if everywhere else "fp32"
        why = f"{units} multiplies bf16 in hardware" if everywhere else f"{who} has neither AMX nor AVX512-BF16 for bf16"
    else:
        why = "as configured"
    if config.precision != "fp32" and not everywhere:
        why += f"; {who} has neither AMX nor AVX512-BF16 and emulates bf16, which takes longer than fp32"
    return f"precision {config.precision}: {why}"


def open_run(config, tokenizer, device):
    """Makes the run directory, or checks that the one there belongs to this configuration and tokenizer. The first process writes.

    Returns: its path.
    Raises: ConfigError that lists every difference.
    """
    run, writes = Path(config.run), not dist.is_initialized() or dist.get_rank() == 0
    if (run / "config.yaml").is_file():
        before = load(DiTConfig, run / "config.yaml")
        config.data.num_classes = config.data.num_classes or before.data.num_classes
        same_state = ("optim.state",) if {before.optim.state, config.optim.state} <= {"fp32", "cpu"} else ()  # in another place
        if changes := differences(before, config, ignore=MAY_CHANGE + same_state):
            raise ConfigError(f"run: {run} holds a run of another configuration; choose another --run, or undo\n  " + "\n  ".join(changes))
        trained_on = Tokenizer.load(run / "tokenizer.safetensors").sha256
        require(tokenizer.sha256 == trained_on, "tokenizer.path", f"{config.tokenizer.path}, SHA-256 {tokenizer.sha256[:16]}...",
                f"the tokenizer that {run} was begun with, SHA-256 {trained_on[:16]}...")
    wait_for_all()  # nobody looks after somebody has written
    if writes:
        run.mkdir(parents=True, exist_ok=True)
        if not (run / "tokenizer.safetensors").is_file():
            tokenizer.save(run / "tokenizer.safetensors")  # the run alone is enough to sample from
        write_environment(run, device)
    wait_for_all()
    return run


def note_configuration(run, config):
    """Writes config.yaml, once the configuration is whole: by it a directory becomes a run."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        save(config, run / "config.yaml")


def trainer_state(model, average, optimizer, guard):
    """{"model", "ema", "trainer"}: every tensor of a training state, for checkpoint.Saver."""
    return dict(model=model.state_dict(), ema=average.state_dict(),
                trainer=checkpoint.trainer_tensors(model, optimizer) | guard.tensors())


def resume(run, model, average, optimizer, guard, facts):
    """Loads the newest undamaged checkpoint; returns the number of updates done, 0 without one."""
    found = checkpoint.latest_checkpoint(run)
    if found is None:
        return 0
    path, state = found
    checkpoint.load_into(path, "model", model.state_dict())
    checkpoint.load_into(path, "ema", average.state_dict())
    checkpoint.load_trainer(path, model, optimizer, guard.tensors())
    if state["data"] != facts["data"]:
        print(f"warning: the images have changed since {path} was saved, and with them the order of the data")
    return state["step"]


class Rollback(Exception):
    """Training is to begin anew from the last checkpoint."""


class Incidents:
    """The updates that the guard left out, and what the run does about them. In a file, so that it outlives the process.

    Args:
        policy: "stop", "skip" or "rollback". most: so many incidents stop the run whatever the policy. lr_factor: times the learning rate
            after each rollback.
    Attributes: left_out, the steps whose batches are not trained on after a rollback; lr_factor, of all rollbacks so far.
    """

    def __init__(self, run, policy, most, lr_factor):
        self.path, self.policy, self.most, self.factor_each = Path(run) / "incidents.json", policy, most, lr_factor
        self.left_out, self.lr_factor = set(), 1.0
        if self.path.is_file():
            try:
                held = json.loads(self.path.read_text())
                self.left_out, self.lr_factor = {int(step) for step in held["left_out"]}, float(held["lr_factor"])
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise ConfigError(f"run: {self.path} is damaged ({type(error).__name__}: {error}); it names updates that rollbacks left "
                                  'out, as {"left_out": [7], "lr_factor": 1.0}; without the file none is') from None
        self.count = len(self.left_out)  # so that a run that only ever goes back comes to an end

    def handle(self, bad, log, draw, run):
        """Tells what was left out, keeps the batches, and does what the policy says.

        Args:
            bad: [(step, verdict)]. draw: step (from 1 on) -> {name: tensor}, its batch.
        Raises: SystemExit (stop, or too many); Rollback.
        """
        for step, verdict in bad:
            self.count += 1
            path = run / "incidents" / f"step_{step:07d}.safetensors"
            kept = ""
            if self.count <= self.most:
                batch = draw(step)  # on every process: it may gather
                if log.writes:
                    try:
                        checkpoint.save_weights(path, batch)
                        kept = f"; its batch is in {path}, `lightningdit replay --incident {path}` looks at it"
                    except OSError as error:
                        kept = f"; its batch could not be saved ({error})"
            log.event(step, incident=reason(verdict), policy=self.policy)
            log.say(f"warning: step {step}: {reason(verdict)}; the update was left out{kept}")
        if self.policy != "skip" or self.count > self.most:
            log.settle()
        steps = [step for step, _ in bad]
        advice = "A lower optim.lr, optim.clip_grad_norm or model.use_qknorm helps against it"
        if self.policy == "stop" or self.count > self.most:
            why = "" if self.policy == "stop" else f" These are {self.count} incidents, guard.most is {self.most}."
            raise SystemExit(f"error: {reason(bad[0][1])} at step {steps[0]}.{why} The update was left out; "
                             f"{f'the last checkpoint is of step {log.saved}' if log.saved else 'there is no checkpoint'}. {advice}; "
                             "guard.policy says what else to do")
        if self.policy == "rollback":
            self.left_out.update(steps)
            self.lr_factor *= self.factor_each
            wait_for_all()
            if log.writes:
                checkpoint.write_text(self.path, json.dumps(dict(left_out=sorted(self.left_out), lr_factor=self.lr_factor)))
            wait_for_all()
            log.say(f"going back to step {log.saved}; steps {', '.join(map(str, sorted(self.left_out)))} will be left out, the learning "
                    f"rate is {self.lr_factor:g} of the planned one")
            raise Rollback
