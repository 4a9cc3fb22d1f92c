"""What the studies in bench/ share: stages that are done once, and the scripts of train/, called in this process until a deadline."""

import gc
import json
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNFINISHED = 3  # exit status: the same command again goes on
INTERRUPTED = 130  # what a script of train/ returns after Ctrl-C, its state saved


class OutOfTime(Exception):
    """The deadline came; what is done is kept."""


def launch(script, arguments, deadline):
    """Runs a script of train/ here, which saves the start of a process for each of dozens of short runs.

    At the deadline (of time.monotonic(), or None) it gets the signal of Ctrl-C, saves its state, and goes on at the next call.

    Raises: OutOfTime at the deadline; KeyboardInterrupt when the user interrupted it; SystemExit when it failed.
    """
    main, late = runpy.run_path(str(ROOT / "train" / script))["main"], []

    def interrupt(number, frame):
        late.append(number)
        signal.raise_signal(signal.SIGINT)

    before = {signal.SIGALRM: signal.signal(signal.SIGALRM, interrupt),
              signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}  # a background job starts with it ignored
    try:
        if deadline is not None:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - time.monotonic()))
        code = main([str(argument) for argument in arguments])
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        gc.collect()
    if code == INTERRUPTED:
        raise OutOfTime(script) if late else KeyboardInterrupt
    if code:
        print(f"train/{script} ended with exit code {code}", file=sys.stderr)
        raise SystemExit(code)


class Stages:
    """Stages in the folder `out`, each done once: a marker there says so, with the settings that it was done with.

    Args:
        about: JSON values; a folder with markers of others is refused. deadline: of time.monotonic(), or None.
    Attributes: seconds, of each stage by name.
    """

    def __init__(self, out, about, deadline=None):
        self.out, self.about, self.deadline = Path(out), json.loads(json.dumps(about)), deadline
        self.out.mkdir(parents=True, exist_ok=True)
        self.seconds, self.begun = {}, False

    def stage(self, name, work, *arguments, needs_s=0, note=""):
        """Calls work(*arguments) unless it is done. Returns whether it did.

        Args: needs_s: seconds that it takes if it cannot be interrupted; with less time left it is put off, except as the first of a call.
        Raises: OutOfTime before it is begun or from within; ValueError for a folder of other settings.
        """
        marker = self.out / f"{name}.done.json"
        before = marker.is_file()
        if before:
            done = json.loads(marker.read_text())
            if done["settings"] != self.about:
                raise ValueError(f"out: {self.out} holds a study of other settings; choose another --out")
        else:
            self.check_time(name, needs_s if self.begun else 0)
            print(f"== {name}{note}", flush=True)
            self.begun, begin = True, time.perf_counter()
            work(*arguments)
            done = dict(settings=self.about, seconds=round(time.perf_counter() - begin, 1))
            partial = marker.with_suffix(".partial")
            partial.write_text(json.dumps(done))
            partial.replace(marker)
        self.seconds[name] = done["seconds"]
        return not before

    def check_time(self, name, needs_s=0):
        """Raises: OutOfTime(name) with less than needs_s seconds left."""
        if self.deadline is not None and time.monotonic() + needs_s > self.deadline:
            raise OutOfTime(name)
