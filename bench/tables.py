"""What the parts of the report share: rows of the overview, Markdown tables, numbers, and who measured on what."""

import dataclasses
import math
from pathlib import Path

UNMEASURED = "not yet measured on a GPU"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the overview. Hardware, versions, commit, date and file are those of the file that it is from."""

    what: str
    shape: str
    value: str  # with its unit
    spread: str = ""
    peer: str = ""  # with its value
    ratio: float | None = None  # how many times better than the peer: above 1 is a win
    short: bool = False  # whether the README has it too


@dataclasses.dataclass(frozen=True)
class About:
    """Where and when a file was made."""

    hardware: str
    versions: str
    commit: str
    date: str  # with the time
    cuda: bool


def about(name: str, content: dict) -> About:
    """What a results file says of itself, by the environment() of bench/harness.py or lightningdit/log.py. ValueError if it does not."""
    env = content.get("environment", content)
    device = env.get("device", "")
    if env.get("gpu"):
        hardware = env["gpu"]
    elif "threads" in env:  # by the harness, or by bench/demo.py, whose device is the processor's name
        hardware = f"{env.get('cpu', device)}, {env['threads']} of {env['cores']} cores"
    elif "cpu" in env and device == "cpu":
        hardware = f"{env['cpu']}, {env['cores']} cores"
    else:
        hardware = env.get("hardware", "")
    versions = env.get("versions") or {key: env[key] for key in ("python", "torch") if env.get(key)}
    found = dict(hardware=hardware, versions=", ".join(f"{key} {value}" for key, value in sorted(versions.items())),
                 commit=env.get("commit"), date=env.get("date"))
    for key, value in found.items():
        if not value:
            raise ValueError(f"{name} holds no {key}, expected what lightningdit.log.environment says")
    return About(**found, cuda=device.startswith("cuda"))


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(value: float | None, of: float | None) -> str:
    return f"{100 * value / of:.0f} %" if value and of else ""


def times(ratio: float | None) -> str:
    """Three digits; four just below 1, so that a loss does not read 1."""
    if ratio is None:
        return ""
    return f"{ratio:.0f} x" if ratio >= 100 else f"{ratio:.4g} x" if 0.995 <= ratio < 1 else f"{ratio:.3g} x"


def times_marked(ratio: float | None) -> str:
    """As `times`, a loss in bold."""
    return f"**{times(ratio)}**" if ratio is not None and ratio < 1 else times(ratio)


def geometric_mean(values: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def link(name: str, folder: str = "..") -> str:
    """To a results file, from a document whose way to the project's root is `folder`."""
    return f"[{name}]({Path(folder, 'bench/results', name).as_posix()})"


def cell(text: str) -> str:
    """Text that breaks no table."""
    return " ".join(text.replace("|", "/").split())


def loads(content: dict) -> list[float]:
    """Load averages that were noted while it was measured."""
    found = [record["load"] for record in (*content.get("results", ()), *content.get("speeds", ())) if "load" in record]
    return found + [content[key] for key in ("load", "load_before") if key in content]


def shared(content: dict) -> bool:
    """Whether so many other processes wanted the cores that the figures are rough."""
    return bool(loads(content)) and max(loads(content)) > 1.5 * content.get("environment", content).get("cores", math.inf)


def origin(name: str, content: dict) -> str:
    """One line: link, hardware, versions, commit, date and load of a file, for a document in docs/."""
    env, made = content.get("environment", content), about(name, content)
    native = f"; native library: {env['native']}" if "native" in env else ""
    found = loads(content)
    load = "; load average " + " to ".join(dict.fromkeys(f"{f(found):.1f}" for f in (min, max))) if found and not made.cuda else ""
    if load and shared(content):
        load += ": **other processes shared the cores, so these figures are rough**"
    return f"{link(name)}: {made.hardware}; {made.versions}{native}; commit {made.commit}; {made.date}{load}."
