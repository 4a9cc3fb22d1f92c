"""The part of the report about the goals: one row each, with what was measured and the peers of the same run. bench/report.py calls it.

Each goal is for one H200; beside it stands what a CPU says of the same work at a small size.
"""

import dataclasses
import re
from collections.abc import Callable

from bench import report_kernels
from bench.report_kinds import CONTESTS, Results, records_of
from bench.tables import UNMEASURED, about, cell, link, markdown, number, percent, times, times_marked


@dataclasses.dataclass(frozen=True)
class Found:
    """What the records of one file say of a goal. peer: all that it met, with their values; ratio: to the fastest of them."""

    value: str
    peer: str = ""
    ratio: float | None = None


@dataclasses.dataclass(frozen=True)
class Goal:
    """A goal for one GPU. work: what it is about at any size; "" where a CPU has no row of it.

    measured: (records of one file, whether it was made on a GPU) -> Found, or None where they say nothing of it.
    """

    what: str
    work: str
    goal: str
    measured: Callable[[list[dict], bool], Found | None]


def op_record(records: list[dict], op: str, cuda: bool, tokens: int) -> dict | None:
    """The one of the largest batch where ours was timed. GPU: bf16, XL's width, so many tokens; CPU: fp32, a preset's shape."""
    found = [r for r in records if r["kind"] == "op" and r["op"] == op and "ours" in report_kernels.timed(r)]
    if cuda:
        found = [r for r in found if r["dtype"] == "bfloat16" and r["shapes"].startswith("xl") and "Dh64" not in r["shapes"]
                 and r["sizes"]["rows"] * r["sizes"]["columns"] == tokens]
    else:
        found = [r for r in found if r["dtype"] == "float32" and not report_kernels.is_point(r)]
    return max(found, key=lambda r: (report_kernels.is_as_trained(r), r["sizes"]["batch"]), default=None)


def peers_of(record: dict, step: str = "forward_backward") -> list[str]:
    """The others who were timed in this step, the fastest first."""
    others = [name for name in report_kernels.timed(record, step) if not name.startswith("ours")]
    return sorted(others, key=lambda name: report_kernels.ratio(record, name, step))


def of_op(op: str, tokens: int = 256, of_copy: bool = False) -> Callable[[list[dict], bool], Found | None]:
    """Milliseconds of ours, forward and both passes, and its share of the copy bandwidth, against everybody."""

    def measured(records: list[dict], cuda: bool) -> Found | None:
        record = op_record(records, op, cuda, tokens)
        if record is None:
            return None
        ours, copy, value = report_kernels.timed(record)["ours"], report_kernels.ceilings(records).get("copy"), []
        for step, name in (("forward", "forward"), ("backward", "backward"), ("forward_backward", "both passes")):
            if step in ours:
                share = f", {percent(ours[step]['gb_per_s'], copy)} of copy bandwidth" if of_copy and copy else ""
                value.append(f"{name} {number(ours[step]['median_ms'])} ms{share}")
        if op == "marginal_distance_matrix_loss" and ours.get("peak_mib"):
            value.append(f"peak memory {percent(ours['peak_mib'], report_kernels.timed(record)['eager'].get('peak_mib'))} of eager")
        met = [f"{name}: forward {times(report_kernels.ratio(record, name, 'forward'))}, both {times(report_kernels.ratio(record, name))}"
               for name in peers_of(record)]
        met += [f"{name}: forward {times(report_kernels.ratio(record, name, 'forward'))}, it has no backward"
                for name in peers_of(record, "forward") if report_kernels.timed(record)[name].get("forward_only")]
        if not cuda:
            value.append(report_kernels.shape_of(record))
        return Found("; ".join(value), "; ".join(met), min((report_kernels.ratio(record, name) for name in peers_of(record)), default=None))

    return measured


def of_contest(kind: str, wanted: Callable[[dict], bool], at_any_size: Callable[[dict], bool] = lambda record: True,
               ) -> Callable[[list[dict], bool], Found | None]:
    """Of the first record of a kind that is wanted: the best of ours, and the peers that it met.

    Args: wanted: whether a record that was made on a GPU is of the goal. at_any_size: whether any record is of the same work.
    """

    def measured(records: list[dict], cuda: bool) -> Found | None:
        fitting = [r for r in records if r["kind"] == kind and at_any_size(r) and (wanted(r) or not cuda)]
        contest = CONTESTS[kind]
        if not fitting or (ours := contest.best(fitting[0], contest.ours)) is None:
            return None
        record, rate = fitting[0], contest.rate(fitting[0], ours)
        ratios = {row["name"]: rate / contest.rate(record, row) for row in record["rows"] if re.match(contest.peers, row["name"])}
        met = [f"{name}: {times(ratio)}" for name, ratio in sorted(ratios.items(), key=lambda item: item[1])]
        mfu = f", MFU {percent(ours['mfu'], 1)}" if "mfu" in ours else ""
        shape = "" if cuda else f"; {contest.shape(record)}"
        return Found(f"{number(rate)} {contest.unit} ({ours['name']}){mfu}{shape}", "; ".join(met), min(ratios.values(), default=None))

    return measured


def ladder(record: dict) -> bool:
    return record.get("part") != "kernels"


def xl_step(record: dict) -> bool:
    model = record["model"]
    return (model["tokens"], model["width"], model["depth"]) == (256, 1152, 28)


def of_tokenizer(case: str) -> Callable[[list[dict], bool], Found | None]:
    return of_contest("tokenizer", lambda record: record["preset"] == "f16d32", lambda record: record["case"] == case)


def of_first_step(records: list[dict], cuda: bool) -> Found | None:
    for record in records:
        if record["kind"] == "training_step" and ladder(record) and (xl_step(record) or not cuda):
            first = {row["name"]: row["first_step_s"] for row in record["rows"] if "first_step_s" in row}
            if ours := first.get("ours compiled"):
                theirs = first.get("reference compiled")
                return Found(f"{number(ours)} s", f"reference compiled: {number(theirs)} s" if theirs else "", theirs and theirs / ours)
    return None


GOALS = (
    Goal("LightningDiT-XL/1 training, 256 tokens", "LightningDiT training",
         "700 images/s; 1.2 x the official graph compiled; 4 x its published 169 images/s", of_contest("training_step", xl_step, ladder)),
    Goal("fused norm, gate, modulation, residual", "fused norm, gate, modulation, residual",
         "90 % of copy bandwidth forward, 85 % backward; backward 1.8 x Inductor", of_op("gated_residual_rms_norm_modulate", of_copy=True)),
    Goal("RoPE attention, head dimension 72, N = 256", "RoPE attention", "faster than RoPE + the best peer, both ways",
         of_op("rope_attention")),
    Goal("RoPE attention, head dimension 72, N = 1024", "", "level with RoPE + the best peer", of_op("rope_attention", 1024)),
    Goal("SwiGLU", "SwiGLU", "93 % of copy bandwidth, bias gradients in the same pass", of_op("swiglu", of_copy=True)),
    Goal("alignment margin losses, N = 1024", "marginal distance matrix loss", "3 x eager, at most 10 % of its peak memory",
         of_op("marginal_distance_matrix_loss", 1024)),
    Goal("guided sampling, 249 evaluations", "guided sampling", "5.3 images/s; 4 x the official script as written",
         of_contest("sampling", lambda record: record["num_steps"] == 249)),
    Goal("VA-VAE encoding", "VA-VAE encoding", "1,500 images/s", of_tokenizer("encode")),
    Goal("VA-VAE decoding", "VA-VAE decoding", "900 images/s", of_tokenizer("decode")),
    Goal("VA-VAE training step", "VA-VAE training step", "200 images/s", of_tokenizer("step")),
    Goal("image decoding, random crops of 256 pixels", "image decoding", "2,400 images/s, so that encoding never waits",
         of_contest("images", lambda record: True, lambda record: record["case"] == "imagenet-256-random")),
    Goal("latent loading", "latent loading", "50 x the official loader", of_contest("latents", lambda record: True)),
    Goal("first training step of XL/1 from a cold cache", "first training step, compiled, from a cold cache", "60 s", of_first_step),
)  # fmt: skip


def found_of(results: Results, cuda: bool) -> list[tuple[Goal, Found | None, str]]:
    """(goal, what was measured on a GPU or on a CPU, file) of each; the newest file that says something of it."""
    files = [(name, run) for name, run in results.items() if records_of(run) and about(name, run).cuda == cuda]
    files.sort(key=lambda item: about(*item).date)
    told = []
    for goal in GOALS:
        of_files = [(found, name) for name, run in files if (found := goal.measured(records_of(run), cuda))]
        told.append((goal, *(of_files[-1] if of_files else (None, ""))))
    return told


def lines(results: Results) -> list[str]:
    """Two tables: on a GPU and on a CPU."""
    out = ["## Goals on a GPU", "", "Goals are for one H200. What was measured is of the GPU that the file names, in bf16, side by side",
           f"with the peers of the same run. What no file holds is {UNMEASURED}. A ratio is how many times better ours is than",
           "a peer; the column has the one to the fastest peer.", ""]
    for cuda in (True, False):
        rows = []
        for goal, found, name in found_of(results, cuda):
            head = [goal.what, goal.goal] if cuda else [goal.work]
            if found is None:
                rows.append([*head, UNMEASURED if cuda else "not measured on a CPU", "", "", ""])
            else:
                rows.append([*head, found.value, found.peer, times_marked(found.ratio), link(name)])
        if not cuda:
            out += ["", "The same work at a small size on a CPU, where the goals do not apply:", ""]
        header = ["what", "goal on one H200", "measured", "ours over each peer", "ratio", "file"] if cuda else [
            "what", "measured", "ours over each peer", "ratio", "file"]
        out += markdown(header, [list(map(cell, row)) for row in rows if row[0]])
    return out
