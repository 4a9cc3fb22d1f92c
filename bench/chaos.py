"""A seeded fault campaign: train/dit.py is killed, starved and fed NaNs, started again until it is through, and compared with a quiet run.

    python bench/chaos.py --runs 100 --seed 0 --out bench/results/chaos_cpu.json
    python bench/chaos.py --short                     # about a minute; part of `make test`

One run is one training of a tiny model, in as many lives as its faults make of it. Every life is a process of its own, or 2 or 4 of them,
forked from a server that has imported torch already: a life then costs about a second. Faults come from the outside (kill -9, signals,
damaged files between two lives), or from hooks that this file sets in the forked process before it runs the unchanged script: an audit hook
that makes the n-th write fail or kills the process in it, and a wrapper around the loss that makes it NaN. The last life is left alone.

Then losses and all tensors of the last checkpoint must be those of the quiet run: bitwise where the number of processes and the mode stayed
the same, else to the rounding of fp32, RTOL and ATOL. Anything else is a corruption, and the exit code is 1.
"""

import argparse
import collections
import contextlib
import dataclasses
import errno
import faulthandler
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script, this folder alone is on the path

from bench.fork import server  # noqa: E402
from lightningdit import checkpoint, training  # noqa: E402
from lightningdit.log import environment, read_log  # noqa: E402
from lightningdit.optional import progress_bar  # noqa: E402

STEPS, EVERY = 20, 3  # updates of a run; updates between two checkpoints
TINY = ("--model.depth 1 --model.hidden-size 16 --model.num-heads 2 --batch-size 8 --optim.warmup 2 --optim.schedule constant "
        f"--log-every 2 --precision fp32 --sample-every 1000 --validate-every 1000 --sample-num 1 --sample.num-steps 1 --final-samples 0 "
        f"--score.every 0 --steps {STEPS} --checkpoint-every {EVERY}").split()
NAN_STEPS = (5, 13)  # updates whose loss is NaN in some runs; 1 is the first update
RTOL, ATOL = 2e-4, 2e-5  # between numbers of processes: sums in another order, amplified by 20 steps of Adam
PATIENCE_S = 60  # a life that takes longer hangs
GRACE_S = 30  # after SIGTERM, before torchrun kills a process
IN_COLLECTIVE = re.compile(r'Current thread .*\n  File ".*/torch/(?:autograd|distributed|nn/parallel)/')
WRITES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}


@dataclasses.dataclass
class Fault:
    """What happens to one process of a life.

    kind:  "kill" (SIGKILL), "signal", "write" (fails with `number`, as the `length` - 1 writes after it), "full" (files of more than
           `number` bytes are refused, for `length` steps), "nan" and "spike" (of the loss, times `number`; whenever the update is done,
           or with `once`, a path, the first time only).
    where: "step" (before update `n`, from 1 on), "save" (the n-th write of the thread that saves), "log" (the n-th of all other writes);
           with `path`, only writes to paths that contain it count.
    """

    kind: str
    where: str = "step"
    n: int = 1
    rank: int = 0
    number: int = 0
    length: int = 1
    once: str | None = None
    path: str = ""


class Hooks:
    """Sets the faults of one process, and notes in its journal what happened: one JSON line a fault. Its file `steps` counts updates."""

    def __init__(self, faults, run, journal):
        self.run, self.counts, self.step, self.draws = str(Path(run).resolve()), collections.Counter(), 0, 0
        self.faults = {where: [f for f in faults if f.where == where] for where in ("step", "save", "log")}
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.steps = os.open(f"{journal}.steps", os.O_WRONLY | os.O_CREAT)
        self.draw_batch, training.draw_batch = training.draw_batch, self.before_step
        self.losses, training.losses = training.losses, self.instead_of_losses
        self.fsync, os.fsync = os.fsync, self.before_fsync
        sys.addaudithook(self.before_write)

    def note(self, fault, **more):
        with without_limit():
            os.write(self.journal, (json.dumps(dict(kind=fault.kind, where=fault.where, step=self.step, **more)) + "\n").encode())

    def before_step(self, *arguments):
        if arguments[-1] != slice(None):  # not the batch of an incident, drawn once more
            self.step, self.draws = arguments[4] + 1, self.draws + 1
            with without_limit():
                os.pwrite(self.steps, f"{self.draws} {self.step} {self.counts['save']} {self.counts['log']}".ljust(40).encode(), 0)
            for fault in self.faults["step"]:
                if fault.kind == "full" and self.step in (fault.n, fault.n + fault.length):
                    limit = fault.number if self.step == fault.n else resource.RLIM_INFINITY
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # write() fails, as on a full disk
                    if self.step == fault.n:
                        self.note(fault)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                if fault.kind in ("kill", "signal") and fault.n == self.step and first_time(fault.once):
                    self.strike(fault)
        return self.draw_batch(*arguments)

    def instead_of_losses(self, config, model, *arguments, **batch):
        terms = self.losses(config, model, *arguments, **batch)
        for fault in self.faults["step"]:
            if fault.kind in ("nan", "spike") and model.training and fault.n == self.step and first_time(fault.once):
                self.note(fault)
                terms = {name: term * (math.nan if fault.kind == "nan" else fault.number) for name, term in terms.items()}
        return terms

    def before_fsync(self, descriptor):
        self.count(os.readlink(f"/proc/self/fd/{descriptor}"))
        return self.fsync(descriptor)

    def before_write(self, event, arguments):
        if event not in WRITES or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self.count(os.path.abspath(os.fsdecode(arguments[0])))

    def count(self, path):
        if not path.startswith(self.run):
            return
        where = "save" if threading.current_thread().name == "checkpoint" else "log"
        self.counts[where] += 1
        for fault in self.faults[where]:
            n = self.counts[where]
            if fault.path:
                self.counts[fault.path] += fault.path in path
                n = self.counts[fault.path] if fault.path in path else 0
            if fault.kind == "write" and fault.n <= n < fault.n + fault.length:
                self.note(fault, path=path)
                raise OSError(fault.number, os.strerror(fault.number), path)
            if fault.kind in ("kill", "signal") and fault.n == n:
                self.strike(fault, path=path)

    def strike(self, fault, **more):
        self.note(fault, **more)
        os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else fault.number)


@contextlib.contextmanager
def without_limit():
    """The campaign's own files are not on the disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def first_time(marker):
    """True for faults without a marker, and once for each of the others, whatever process asks."""
    try:
        if marker is not None:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def live(arguments, variables, faults, output, journal):
    """In a forked process: train/dit.py as if the shell had started it. `output` is a pipe, which no full disk silences."""
    os.environ.update(variables)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    faulthandler.enable()
    sys.stdin = open(os.devnull)
    sys.argv = [str(ROOT / "train" / "dit.py"), *arguments]
    Hooks(faults, arguments[arguments.index("--run") + 1], journal)
    runpy.run_path(sys.argv[0], run_name="__main__")


def collect(end, path):
    """In a thread: writes what comes out of a pipe to a file, until nobody can write to the pipe any more."""
    with end, open(path, "wb") as file:
        while data := os.read(end.fileno(), 65536):
            file.write(data)


class Life:
    """train/dit.py in one or more processes, started at once.

    Args:
        arguments: of the command line; must name --run. processes: their number. per_node: as many count as one node.
        faults: [Fault]. folder: for outputs and journals, one file a process.
    """

    def __init__(self, arguments, folder, processes=1, per_node=None, faults=()):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        number, per_node = len(list(folder.glob("*.out.0"))), per_node or processes
        self.outputs = [folder / f"{number:03d}.out.{rank}" for rank in range(processes)]
        self.journals = [folder / f"{number:03d}.journal.{rank}" for rank in range(processes)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.processes, self.readers, self.missed_a_death = [], [], 0
        for rank in range(processes):
            variables = dict(RANK=rank, WORLD_SIZE=processes, LOCAL_RANK=rank % per_node, LOCAL_WORLD_SIZE=per_node,
                             MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            own = [fault for fault in faults if fault.rank % processes == rank]
            end, output = server().Pipe(duplex=False)
            process = server().Process(target=live, args=(list(map(str, arguments)), {k: str(v) for k, v in variables.items()}, own,
                                                          output, str(self.journals[rank])))
            process.start()
            output.close()
            reader = threading.Thread(target=collect, args=(end, self.outputs[rank]))
            reader.start()
            self.processes.append(process)
            self.readers.append(reader)

    def wait(self, timeout=PATIENCE_S):
        """Exit codes when all have ended; None for those that hung and were killed, after faulthandler has printed their stacks.

        As torchrun, it ends the others when one has failed: they get 5 s to find out for themselves, SIGTERM, and GRACE_S later SIGKILL.
        One that is killed inside a collective of PyTorch did not hang: gloo now and then misses that a process has died.
        """
        deadline, told, outlived = time.monotonic() + timeout, None, []
        while alive := [process for process in self.processes if process.exitcode is None]:
            if told is None and any(process.exitcode for process in self.processes):
                told, deadline = time.monotonic() + 5, time.monotonic() + 5 + GRACE_S
            if told is not None and time.monotonic() > told:
                told = math.inf
                for process in alive:
                    process.terminate()
            if time.monotonic() > deadline:
                outlived = alive
                for process in alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGABRT)  # its faulthandler prints where it is
                for process in alive:
                    process.join(5)
                self.kill()
            else:
                multiprocessing.connection.wait([process.sentinel for process in alive], timeout=0.5)
        for reader in self.readers:
            reader.join()
        codes = []
        for process, path in zip(self.processes, self.outputs, strict=True):
            missed = process in outlived and told is not None and IN_COLLECTIVE.search(path.read_text(errors="replace"))
            self.missed_a_death += bool(missed)
            codes.append(None if process in outlived and not missed else process.exitcode)
        return codes

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def text(self):
        return "".join(path.read_text(errors="replace") for path in self.outputs if path.is_file())

    def events(self):
        """What the faults did."""
        return [json.loads(line) for path in self.journals if path.is_file() for line in path.read_text().splitlines()]

    def counts(self):
        """(updates begun, the last one's number, writes of saves, other writes), of the first process."""
        path = Path(f"{self.journals[0]}.steps")
        return tuple(map(int, path.read_text().split())) if path.is_file() and path.stat().st_size else (0, 0, 0, 0)

    def start(self):
        """The update that it went on from; None if it did not come so far."""
        text = self.text()
        if resumed := re.search(r"resuming at step (\d+)", text):  # another process may go on in the same line
            return int(resumed[1])
        return 0 if "from the beginning" in text else None


def outcome(run):
    """{step: (loss, gradient norm)} of a finished run, and every tensor of its last checkpoint by name."""
    rows = {line["step"]: (line["loss"], line["grad_norm"]) for line in read_log(run) if "loss" in line}
    path, state = checkpoint.latest_checkpoint(run, warn=lambda text: None)
    tensors = {f"{group}.{name}": tensor for group in ("model", "ema", "trainer")
               for name, tensor in checkpoint.load_tensors(path, group).items() if not name.startswith("rng.")}
    return state["step"], rows, tensors


def difference(ours, theirs, exact):
    """None if two outcomes are equal, bitwise or to fp32 rounding; else what differs, in words."""
    (step, rows, tensors), (true_step, true_rows, true_tensors) = ours, theirs
    if step != true_step or rows.keys() != true_rows.keys() or tensors.keys() != true_tensors.keys():
        return f"step {step}, {len(rows)} losses, {len(tensors)} tensors; expected {true_step}, {len(true_rows)}, {len(true_tensors)}"
    pairs = {f"losses of step {s}": (torch.tensor(rows[s]), torch.tensor(true_rows[s])) for s in rows}
    pairs |= {name: (tensors[name].double(), true_tensors[name].double()) for name in tensors}
    for name, (a, b) in pairs.items():
        limits = dict(rtol=0, atol=0) if exact else dict(rtol=RTOL, atol=ATOL)
        if not torch.allclose(a, b, equal_nan=True, **limits):
            return f"{name}: differs by {(a - b).abs().nan_to_num().max():.2e} at {b.abs().nan_to_num().max():.2e}"
    return None


class Campaign:
    """The runs of one seed. Quiet runs to compare with are made when they are first needed, and kept."""

    def __init__(self, folder, seed):
        self.folder, self.seed, self.quiet, self.lock = Path(folder), seed, {}, threading.Lock()
        self.arguments = [*TINY, "--data.cache", str(self.folder / "latents")]

    def reference(self, processes, mode, nans, precision="fp32"):
        """(outcome, counts of writes) of the quiet run; NaNs are left out of it by the policy skip."""
        with self.lock:
            key = (processes, mode if processes > 1 else "none", precision, nans)
            if key not in self.quiet:
                name = "quiet_" + "_".join(map(str, (*key[:3], len(nans))))
                options = "--run", self.folder / name, "--parallel", mode, "--guard.policy", "skip", "--precision", precision
                life = Life([*self.arguments, *options], self.folder / "lives" / name, processes,
                            faults=[Fault("nan", n=step) for step in nans])
                codes = life.wait()
                if any(codes):
                    raise RuntimeError(f"the quiet run {name} ended with {codes}:\n{life.text()}")
                self.quiet[key] = outcome(self.folder / name), life.counts()[2:]
        return self.quiet[key]

    def plan(self, rng, world, nans, run):
        """The faults of one life, and the seconds after which it is killed from outside, or None."""
        _, (saves, logs) = self.reference(1, "ddp", ())

        def up_to(count):  # one draw of rng, whatever the count, which is not always the same; randint takes one or more
            return 1 + int(rng.random() * count)

        rank, once = rng.randrange(world), str(run.parent / "lives" / run.name / "nan")
        step = rng.randint(1, STEPS)
        error = rng.choice([errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
        faults = [Fault("nan", n=n) for n in nans] if nans else []
        after = None
        for kind in rng.sample(["step", "save", "save", "log", "write", "write", "full", "moment", "signal", "nan"], 2):
            if kind in ("step", "save", "log"):
                n = dict(step=step, save=up_to(saves), log=up_to(logs))[kind]
                faults.append(Fault("kill", kind, n, rank))
            elif kind == "write":
                where, length = rng.choice(["save", "save", "log"]), rng.randint(1, 4)
                faults.append(Fault("write", where, up_to(saves if where == "save" else logs), rank, error, length))
            elif kind == "full":
                faults.append(Fault("full", n=step, rank=rank, number=rng.choice([0, 4096, 20_000]), length=rng.randint(1, 6)))
            elif kind == "moment":
                after = rng.uniform(0.3, 3.0)
            elif kind == "signal":
                faults.append(Fault("signal", n=step, rank=rank, number=rng.choice([signal.SIGTERM, signal.SIGUSR1])))
            elif not nans:
                faults.append(Fault("nan", n=step, once=once))
        return faults, after

    def run(self, index):
        """One run, from its first life to the comparison. Returns {"faults": [...], "lives", "lost", "corruption": None or words, ...}."""
        rng = random.Random(f"{self.seed} {index}")
        elastic = rng.random() < 0.4
        world, mode = rng.choice([1, 1, 1, 1, 2, 2, 4]), rng.choice(["ddp", "fsdp"])
        policy = rng.choice(["stop", "stop", "skip", "rollback"])  # with "stop", NaNs come once, as from a faulty device
        nans = () if policy == "stop" else NAN_STEPS
        # bf16 is compared bitwise only; once there is a run, "auto" means what it was begun with.
        precision = "bf16" if index % 2 and not elastic else "fp32"
        run, settings = self.folder / f"run_{index:04d}", set()
        faulty, happened, damaged, lost, lives = rng.randint(2, 4), [], [], 0, 0
        begun = unclear = hung = missed = 0
        stacks = ""
        while True:
            rng = random.Random(f"{self.seed} {index} {lives}")  # the moment at which a life ended changes nothing in the next one's draws
            if elastic and lives:
                changed = rng.choice([1, 1, 2, 2, 4])
                if changed != world:
                    happened.append("number of processes changed")
                world, mode = changed, rng.choice(["ddp", "fsdp"])
            settings.add((world, mode if world > 1 else "none"))
            last = lives >= faulty
            faults, after = ([Fault("nan", n=n) for n in nans], None) if last else self.plan(rng, world, nans, run)
            asked = "auto" if (run / "config.yaml").is_file() else precision
            options = "--run", run, "--parallel", mode, "--guard.policy", policy, "--precision", asked
            life = Life([*self.arguments, *options], self.folder / "lives" / run.name, world, faults=faults)
            if after is not None:
                with contextlib.suppress(TimeoutError):
                    multiprocessing.connection.wait([p.sentinel for p in life.processes], timeout=after)
                victim = rng.choice(life.processes)
                if victim.exitcode is None:
                    victim.kill()
                    happened.append("killed at a random moment" if world == 1 else "one rank killed")
            codes = life.wait()
            lives += 1
            draws, start = life.counts()[0], life.start()
            hung += None in codes
            missed += life.missed_a_death
            begun += draws
            text = life.text()
            stacks += text[-6000:] if None in codes else ""
            events = life.events()
            happened += [self.name(event, world) for event in events]
            clear = any(word in text for word in ("error: ", "interrupted: ", "grid of samples")) or codes.count(-signal.SIGKILL)
            unclear += not clear
            if not any(codes) or (last and lives > faulty + 3):
                break
            if start is not None and not last:
                damaged += self.damage(rng, run)
        lost = max(0, begun - STEPS)
        corruption = f"processes ended with {codes}: {text[-1500:]}" if any(codes) else None
        if corruption is None:
            exact = len(settings) == 1
            true, _ = self.reference(*((world, mode) if exact else (1, "ddp")), nans, precision)
            corruption = difference(outcome(run), true, exact)
        result = dict(index=index, processes=sorted({w for w, _ in settings}), policy=policy, bitwise=len(settings) == 1, lives=lives,
                      faults=happened + damaged, lost_steps=lost, unclear_ends=unclear, hung=hung, missed=missed, stacks=stacks,
                      corruption=corruption)
        if corruption is None and not unclear and not hung:
            shutil.rmtree(run)
        return result

    @staticmethod
    def name(event, world):
        kind, where = event["kind"], event["where"]
        if kind == "kill":
            place = dict(step="at a step", save="inside a save", log="while it wrote something else")[where]
            return "one rank killed" if world > 1 and where == "step" else f"killed {place}"
        if kind == "write":
            return f"{'write of a save' if where == 'save' else 'other write'} failed"
        return dict(full="disk full for some steps", signal="preempted by a signal", nan="NaN loss")[kind]

    def damage(self, rng, run):
        """Truncates a file of the newest checkpoint, or flips one bit in it, now and then. Never of the only one."""
        checkpoints = checkpoint.list_checkpoints(run)
        if len(checkpoints) < 2 or rng.random() < 0.6:
            return []
        file = rng.choice(sorted(path for path in checkpoints[-1][1].rglob("*") if path.is_file()))
        data = bytearray(file.read_bytes())
        if rng.random() < 0.5:
            file.write_bytes(data[: rng.randrange(len(data))])
            return ["newest checkpoint truncated"]
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        return ["byte flipped in the newest checkpoint"]


def table(results):
    """What the campaign did, as text."""
    faults = collections.Counter(fault for result in results for fault in result["faults"])
    recovered = collections.Counter(fault for result in results if result["corruption"] is None for fault in result["faults"])
    lost = [result["lost_steps"] for result in results]
    lines = [f"{'fault':42} {'times':>6} {'recovered':>10}"]
    lines += [f"{name:42} {times:6} {recovered[name]:10}" for name, times in faults.most_common()]
    lines += [f"{'all':42} {faults.total():6} {recovered.total():10}", ""]
    lives = sum(result["lives"] for result in results)
    lines.append(f"runs {len(results)}, lives {lives}; compared bitwise {sum(r['bitwise'] for r in results)}, to fp32 rounding "
                 f"{sum(not r['bitwise'] for r in results)}")
    lines.append(f"steps done twice or more: {sum(lost)} of {STEPS * len(results)}, at most {max(lost)} in a run, "
                 f"{sum(lost) / max(1, lives - len(results)):.1f} a lost life (a checkpoint every {EVERY})")
    lines.append(f"ends without a clear message: {sum(r['unclear_ends'] for r in results)}; lives with a process that hung: "
                 f"{sum(r['hung'] for r in results)}")
    lines.append(f"processes that torchrun would have killed inside a collective with a dead one: {sum(r['missed'] for r in results)}")
    lines.append(f"corruptions: {sum(r['corruption'] is not None for r in results)}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first run: one run of a campaign can be looked at alone")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="runs at a time")
    parser.add_argument("--short", action="store_true", help="8 runs, or 4 and as many more as begin within 60 s")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--keep", type=Path, help="folder for all runs and outputs; not given: a temporary one, removed at the end")
    options = parser.parse_args()
    count, budget_s = (8, 60) if options.short else (options.runs, math.inf)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        campaign = Campaign(options.keep or temporary, options.seed)

        def one(index):
            soon = index - options.first < 4 or time.monotonic() - begin < budget_s
            return campaign.run(index) if soon else None

        with ThreadPoolExecutor(options.jobs) as pool:
            runs = progress_bar(pool.map(one, range(options.first, options.first + count)), total=count, unit="run", file=sys.stderr)
            results = [result for result in runs if result is not None]
        for result in results:
            if result["corruption"] or result["hung"] or result["unclear_ends"]:
                print(f"run {result['index']} ({result['processes']} processes, {result['policy']}): {result['faults']}, hung "
                      f"{result['hung']}, unclear {result['unclear_ends']}: {result['corruption']}\n{result['stacks']}")
    print(table(results))
    wall_s = round(time.monotonic() - begin, 1)
    print(f"{wall_s} s")
    if options.out:
        options.out.write_text(json.dumps(dict(seed=options.seed, steps=STEPS, checkpoint_every=EVERY, rtol=RTOL, atol=ATOL, wall_s=wall_s,
                                               environment=environment(torch.device("cpu")), table=table(results).splitlines(),
                                               runs=results), indent=1) + "\n")
    return int(any(result["corruption"] or result["hung"] for result in results))


if __name__ == "__main__":
    from bench import chaos  # under the name by which forked processes know it

    sys.exit(chaos.main())
