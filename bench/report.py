"""Writes docs/results.md, docs/results_kernels.md, their plots, and the marked regions of the READMEs and docs/*.md: make report.

    python bench/report.py [--results FOLDER] [--root FOLDER]

Everything comes from the files in bench/results and from kernels/audit.json. A file that report_kinds does not know is an error. Every row
appears, winning or losing; ratios are of the medians in a file, or of its samples where it has them. What no file holds reads "not yet
measured". A region lies between `<!-- results NAME WORDS -->` and `<!-- /results -->`; REGIONS says what NAME writes.
"""

import argparse
import collections
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script, this folder alone is on the path

from bench import report_goals, report_kernels, tokenizer_study  # noqa: E402
from bench.report_kinds import (  # noqa: E402
    COMMANDS,
    FOR_GPUS,
    HARNESS,
    KINDS,
    TOPICS,
    Part,
    Results,
    kind_of,
    load,
    parts_of,
    records_of,
    study_sentence,
)
from bench.tables import UNMEASURED, about, cell, link, markdown, origin, shared, times, times_marked  # noqa: E402

# The documents


INTRODUCTION = """# Results

Written by `make report` from the files in bench/results; do not edit. Each row is one measurement against the fastest peer of the same
run: the ratio is how many times better ours is, by the medians of both; **below 1 ours loses**. The spread is from the 20th to the 80th
percentile of the rounds unless it says otherwise. [results_kernels.md](results_kernels.md) has every contestant of every op."""

OVERVIEW = ["what", "shape", "hardware", "versions", "commit", "date", "value", "spread", "peer", "ratio", "file"]


def overview(parts: list[tuple[str, Part]], results: Results) -> list[str]:
    rows = []
    for topic in TOPICS:
        for name, row in ((name, row) for name, part in parts if part.topic == topic for row in part.rows):
            made = about(name, results[name])
            origins = [made.hardware, made.versions, made.commit, made.date[:10]]
            rows.append([row.what, row.shape, *origins, row.value, row.spread, row.peer, times_marked(row.ratio), link(name)])
    return markdown(OVERVIEW, [list(map(cell, row)) for row in rows])


def missing(results: Results) -> dict[str, list[str]]:
    """By topic, lines about what no file holds, or none that was made on a GPU."""
    wanted = COMMANDS | {prefix: (kind.topic, kind.command) for prefix, kind in KINDS.items() if kind is not HARNESS}
    held = {(what, about(name, content).cuda) for name, content in results.items()
            for what in ([record["kind"] for record in records_of(content)] or [kind_of(name)])}
    found = collections.defaultdict(list)
    for what, (topic, command) in wanted.items():
        if not {(what, False), (what, True)} & held:
            found[topic].append(f"- {what}: not yet measured (`{command}`)")
        elif what in FOR_GPUS and (what, True) not in held:
            found[topic].append(f"- {what}: {UNMEASURED}")
    return found


def picture(name: str, suffix: str) -> str:
    return "_".join(filter(None, (Path(name).stem, suffix))) + ".png"


def results_page(results: Results) -> str:
    """docs/results.md."""
    parts, absent = parts_of(results), missing(results)
    lines = [INTRODUCTION, "", "## Overview", "", *overview(parts, results), "", *report_goals.lines(results)]
    for topic in TOPICS:
        lines += ["", f"## {topic}", ""]
        for name, part in ((name, part) for name, part in parts if part.topic == topic):
            lines += [f"### {Path(name).stem}: {about(name, results[name]).hardware}", "", origin(name, results[name]), ""]
            lines += part.lines + [line for suffix in part.figures for line in (f"![{suffix or part.topic}]({picture(name, suffix)})", "")]
        lines += absent[topic]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def kernels_page(results: Results) -> str:
    """docs/results_kernels.md."""
    held = {name: run for name, run in results.items() if any(record["kind"] == "op" for record in records_of(run))}
    return report_kernels.document(held)


# Regions of documents that people write


def short_table(results: Results) -> str:
    """The README's: one line of each topic, what loses included."""
    rows = []
    told = [(goal, found, name) for goal, found, name in report_goals.found_of(results, cuda=True) if found]
    rows += [[goal.what, found.value, "; ".join(filter(None, (f"goal: {goal.goal}", found.peer))), link(name, "")]
             for goal, found, name in told]
    if len(told) < (count := len(report_goals.GOALS)):
        what = "everything on a GPU" if not told else f"{count - len(told)} other goals on a GPU"
        rows.append([what, UNMEASURED, "", "[goals](docs/results.md#goals-on-a-gpu)"])
    if not any(kind_of(name) == "convergence" and about(name, content).cuda for name, content in results.items()):
        paper = "the paper: 2.5 to 2.8 x by alignment, 21.8 x in all"
        rows.append(["convergence, from DiT to LightningDiT on aligned latents", UNMEASURED, paper, "`make convergence`"])
    for name, run in results.items():
        for dtype in ("float32", "bfloat16"):
            met = {rival: report_kernels.rivalry(records_of(run), rival, dtype) for rival in ("eager", "compiled")}
            values = [f"{times(found[0])} {rival} ({found[1]} of {found[2]} lose)" for rival, found in met.items() if found]
            if values:
                rough = "; rough: other processes shared the cores" if shared(run) else ""
                what = f"our ops, {dtype}, forward + backward, geometric mean; {about(name, run).hardware}{rough}"
                rows.append([what, ", ".join(values), "", link(name, "")])
    parts = parts_of(results)
    for name, row in ((name, row) for topic in TOPICS for name, part in parts if part.topic == topic for row in part.rows if row.short):
        value = f"{row.value}; {times(row.ratio)}" if row.ratio is not None else row.value
        rows.append([f"{row.what}; {row.shape}; {about(name, results[name]).hardware}", value, row.peer, link(name, "")])
    rows.append(audit_row())
    return "\n".join(markdown(["what was measured", "value", "against", "file"], [list(map(cell, row)) for row in rows]))


def audit() -> dict[str, dict[str, dict]]:
    """What `make audit` compiled without a GPU: {kernel and configuration: {architecture: what came out}}."""
    return json.loads((ROOT / "kernels" / "audit.json").read_text(encoding="utf-8"))["cases"]


def spills(found: dict) -> bool:
    return bool(found["stack"] or found["local_loads"] or found["local_stores"])


def audit_row() -> list[str]:
    compiled = [found for by_architecture in audit().values() for found in by_architecture.values()]
    names = ", ".join(f"sm_{name}" for name in sorted({name for case in audit().values() for name in case}, key=int))
    found = f"{sum(map(spills, compiled)) or 'no'} spills in {len(compiled)} compilations"
    return [f"every Triton kernel compiled for {names} and its machine code read", found, "", "[kernels/audit.json](kernels/audit.json)"]


# Rows of the table in kernels/README.md: title, and the case of the audit.
REGISTERS = [(f"norm {name}, {residual} residual", f"norm: norm_{short}{{}} D=1152 residual {residual}", bias)
             for residual in ("fp32", "bf16") for name, short, bias in (("forward", "fwd", "bias"), ("backward", "bwd", "bias gradient"))]
REGISTERS += [(f"swiglu {name}", f"swiglu: swiglu_{short}{{}} F=3072", bias)
              for name, short, bias in (("forward", "fwd", "bias"), ("backward", "bwd", "bias gradient"))]


def region_registers(results: Results) -> str:
    """Of the norm and swiglu kernels at XL's widths, with and without the bias that they take over."""
    cases, rows = audit(), []
    for title, case, bias in REGISTERS:
        for name, key in ((title, case.format("")), (f"the same with the {bias}", case.format("+bias"))):
            found = [cases[key][architecture] for architecture in ("80", "90", "100")]
            rows.append([name, " / ".join(str(one["registers"]) for one in found), "some" if any(map(spills, found)) else "none",
                         f"{100 * cases[key]['90']['wide_loads']:.0f} %"])
    header = ["kernel", "registers on sm_80 / sm_90 / sm_100", "spills", "share of loads 16 bytes wide (sm_90)"]
    return "\n" + "\n".join(markdown(header, rows)) + "\n"


def of_kind(results: Results, prefix: str) -> tuple[str, dict] | None:
    """The newest file PREFIX_*.json that was not made on a GPU, if there is one."""
    found = [(name, content) for name, content in results.items() if kind_of(name) == prefix and not about(name, content).cuda]
    return max(found, key=lambda item: about(*item).date, default=None)


def region_table(results: Results) -> str:
    return f"\n{short_table(results)}\n"


def region_demo(results: Results) -> str:
    """Of the recipe of the digits."""
    found = of_kind(results, "demo")
    if found is None:
        return "not yet measured"
    name, content = found
    return f"[{100 * content['runs'][0]['recognised']:.1f} % of the generated digits recognised](bench/results/{name})"


def region_study(results: Results) -> str:
    """Every tokenizer study: settings, both arms, and the picture that bench/tokenizer_study.py drew."""
    lines = []
    for name, content in ((name, content) for name, content in results.items() if kind_of(name) == "tokenizer_study"):
        lines += ["", origin(name, content), "", *study_sentence(content), "", *tokenizer_study.table(content).splitlines(), ""]
        lines += [f"![held-out images, reconstructions and samples of both]({Path(name).stem}.png)"]
    return "\n" + "\n".join(lines[1:] or ["Not yet measured."]) + "\n"


def region_origin(results: Results, prefix: str) -> str:
    found = of_kind(results, prefix)
    return f"\n{origin(*found)}\n" if found else "\nNot yet measured.\n"


def region_op(results: Results, op: str) -> str:
    """Speed-ups over eager, of ours and of torch.compile, forward + backward in fp32 on a CPU."""
    found = of_kind(results, "kernels")
    for record in report_kernels.op_records(found[1]["results"]) if found else ():
        contestants = report_kernels.timed(record)
        wanted = record["op"] == op and record["dtype"] == "float32" and not report_kernels.is_point(record)
        if wanted and record.get("variant", "") == "" and "ours" in contestants:
            both = report_kernels.timed(record, "forward_backward")
            found = {name: times(row["forward_backward"]["speedup"]) for name, row in both.items()}
            return f"{found['ours']} ({found.get('compiled', '-')})"
    return "not measured"


REGIONS = {"": region_table, "demo": region_demo, "study": region_study, "origin": region_origin, "op": region_op,
           "registers": region_registers}
MARKED = re.compile(r"(<!-- results *([^>]*?) *-->)(.*?)(<!-- /results -->)", re.DOTALL)


def fill(text: str, results: Results, where: str) -> str:
    """A document with all its regions written anew. ValueError for one that REGIONS does not know, or whose end is missing."""

    def write(found: re.Match) -> str:
        name, *words = found[2].split() or [""]
        if name not in REGIONS:
            raise ValueError(f"{where} has a region {found[2]!r}, expected one of {', '.join(filter(None, REGIONS))}")
        return found[1] + REGIONS[name](results, *words) + found[4]

    if text.count("<!-- results") != text.count("<!-- /results -->") or text.count("<!-- results") != len(MARKED.findall(text)):
        raise ValueError(f"{where}: the regions <!-- results --> to <!-- /results --> do not match")
    return MARKED.sub(write, text)


def texts(results: Results, root: Path) -> dict[Path, str]:
    """Every document that the report writes, whole or in regions, by its path: what it should read."""
    docs = root / "docs"
    found = {docs / "results.md": results_page(results), docs / "results_kernels.md": kernels_page(results)}
    for path in (root / "README.md", root / "kernels" / "README.md", *sorted(docs.glob("*.md"))):
        text = path.read_text(encoding="utf-8") if path not in found and path.is_file() else ""
        if "<!-- results" in text:
            found[path] = fill(text, results, str(path.relative_to(root)))
    return found


def figures(results: Results) -> dict[str, Callable]:
    """Functions that draw the figures, by the names of their files."""
    return {picture(name, suffix): draw for name, part in parts_of(results) for suffix, draw in part.figures.items()}


def write_all(folder: Path, root: Path) -> list[Path]:
    """Writes documents and plots under root; removes plots whose file is gone. Returns what it wrote."""
    results, docs = load(folder), root / "docs"
    docs.mkdir(parents=True, exist_ok=True)
    written = []
    for path, text in texts(results, root).items():
        path.write_text(text, encoding="utf-8")
        written.append(path)
    for name, draw in figures(results).items():
        drawn = io.BytesIO()
        draw().savefig(drawn, dpi=100)
        Image.open(drawn).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(docs / name, optimize=True)  # small, no metadata
        written.append(docs / name)
    stems = tuple(f"{Path(name).stem}" for name in results)
    for path in docs.glob("*.png"):
        if re.match(rf"({'|'.join(KINDS)})_", path.name) and not path.name.startswith(stems):
            path.unlink()
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the JSON files")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    options = parser.parse_args()
    for path in write_all(options.results, options.root):
        print(path)


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem:
        sys.exit(f"error: {problem}")
