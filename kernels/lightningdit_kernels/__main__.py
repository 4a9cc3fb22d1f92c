"""Prints which backend serves which op on this machine, and why, and what was chosen by measurement: python -m lightningdit_kernels."""

import torch

from lightningdit_kernels import backends, tuning


def show(rows: list[tuple[str, ...]]) -> None:
    """A table, of which the last column may be as wide as it likes."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))


def measured(entry: dict) -> tuple[str, ...]:
    """The row of a choice: what was chosen, its time, and how many times as long the fastest of the others takes."""
    times, choice = entry["times_ms"], entry["choice"]
    others = {name: time_ms for name, time_ms in times.items() if name != choice}
    second = min(others, key=others.__getitem__, default=None)
    against = "the only one that serves" if second is None else f"{others[second] / times[choice]:.2f} x: {second}"
    return entry["op"], entry["gpu"], choice, f"{times[choice]:.4f}", entry["date"], against, entry["shape"]


def main() -> None:
    show([("op", "cpu", "cuda", "why"), *((op, row["cpu"], row["cuda"], row["why"]) for op, row in backends().items())])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} CPU threads, {device}\n")
    here, all_kept = tuning.choices_here(), tuning.choices()
    if here:
        print(f"Chosen by measurement, for {tuning.versions()}:")
        show([("op", "device", "choice", "ms", "date", "next best", "shape"), *map(measured, here)])
    reason = tuning.unmeasured()
    print("" if here else "Nothing was chosen by measurement here yet. ", end="")
    print(f"Nothing is timed now: {reason}. " if reason else "", end="")
    print(f"{tuning.cache_folder()} keeps {len(all_kept) - len(here)} choices of other GPUs or versions.")


if __name__ == "__main__":
    main()
