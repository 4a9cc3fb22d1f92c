"""Prints which backend serves which op on this machine, and why: python -m lightningdit_kernels."""

import torch

from lightningdit_kernels import backends

rows = [("op", "cpu", "cuda", "why")] + [(op, row["cpu"], row["cuda"], row["why"]) for op, row in backends().items()]
widths = [max(len(row[column]) for row in rows) for column in range(3)]
for row in rows:
    print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} CPU threads, {device}")
