"""Compiles Triton kernels for a named GPU on a machine without one, and reads the machine code.

Each <op>_triton.py lists (kernel, configuration) pairs in audit_cases(). triton's own compiler
compiles them; cuobjdump and nvdisasm, which triton's wheel carries, disassemble the result.
lightningdit_kernels.audit judges it.

A case is a dict: name; kernel; signature {argument: "*bf16", "i32", ...}; constexprs {argument:
value}; divisible [arguments that are multiples of 16]; num_warps; num_stages; kind "memory",
"attention", "matmul" or "small"; optional archs, hgmma, wide, reason.
"""

import collections
import functools
import importlib
import importlib.util
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lightningdit_kernels.tuning import COMPILE_OPTIONS

OPS = ("swiglu", "norm", "attention", "alignment", "groupnorm")
KINDS = ("memory", "attention", "matmul", "small")

# Of a streaming multiprocessor; the first three are the same on these architectures (CUDA C++
# Programming Guide, 21.1).
WARPS, BLOCKS, REGISTERS = 64, 32, 65536
TENSOR_MEMORY = 512  # columns, on sm_100
# Shared memory, of which a block may have all but 1 KiB.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


@dataclass(frozen=True)
class Code:
    """What the compiler made of one case on one architecture. Loads and stores are shares in [0, 1]
    of the bytes moved.
    """

    registers: int  # of one thread
    stack: int  # bytes of one thread
    local_loads: int
    local_stores: int
    shared: int  # bytes of one block
    warps: int  # of one block
    tensor_memory: int  # columns of one block, sm_100
    hgmma: int  # warpgroup MMA, sm_90
    hmma: int  # warp MMA
    other_mma: int  # tcgen05 on sm_100, and the MMAs of fp8, integers and fp64
    wide_loads: float | None  # share of 16 bytes a thread or more; None: no global load
    wide_stores: float | None
    fp64: int
    atomics: int


@dataclass(frozen=True)
class Sass:
    """Opcodes with their modifiers in the order of the code, and the loops as (first, last)
    instruction.
    """

    opcodes: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    def depths(self) -> list[int]:
        """How many loops lie around each instruction."""
        return [
            sum(head <= at <= end for head, end in self.loops) for at in range(len(self.opcodes))
        ]


# The x is that of HGMMA.64x64x16.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)(.*)$")
_INSTRUCTION_BYTES = 16


def read_sass(text: str) -> Sass:
    """The output of nvdisasm --binary."""
    return _sass_of(_instructions(text), 0)


def _instructions(text: str) -> list[re.Match[str]]:
    return [found for line in text.splitlines() if (found := _INSTRUCTION.match(line))]


def _sass_of(instructions: Iterable[re.Match[str]], begin: int) -> Sass:
    """The Sass of a kernel whose first instruction is number `begin` of what was disassembled.

    Several branches back to one head are one loop, up to the last of them.
    """
    opcodes: list[str] = []
    loops: dict[int, int] = {}
    for at, (opcode, operands) in enumerate(found.groups() for found in instructions):
        target = re.search(r"\b0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        head = int(target[1], 16) // _INSTRUCTION_BYTES - begin if target else at
        if head < at:
            loops[head] = at
        opcodes.append(opcode)
    return Sass(tuple(opcodes), tuple(sorted(loops.items())))


def access_bytes(opcode: str) -> int:
    """Bytes that one thread moves with this load or store."""
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[modifier] for modifier in opcode.split(".")[1:] if modifier in sizes), 4)


def wide_share(sass: Sass, names: tuple[str, ...]) -> float | None:
    """Share of the bytes that these opcodes move 16 or more at a time; None if there are none.

    An access in a loop counts 16 times per level.
    """
    total = wide = 0
    for opcode, depth in zip(sass.opcodes, sass.depths(), strict=True):
        if opcode.partition(".")[0] in names:
            copied = opcode.startswith("U")  # by the tensor memory accelerator
            weight = (16 if copied else access_bytes(opcode)) * 16**depth
            total += weight
            wide += weight * (copied or access_bytes(opcode) >= 16)
    return wide / total if total else None


def occupancy(code: Code, arch: int) -> tuple[float, str]:
    """Upper bound on resident warps as a share of what the multiprocessor can hold, and what sets
    it.
    """
    per_warp = -(-code.registers // 8) * 8 * 32
    bounds = {
        "registers": REGISTERS
        // per_warp
        // 4
        * 4
        // code.warps,  # warps get registers from one of four partitions
        "shared": SHARED[arch] // (code.shared + 1024),  # 1 KiB of every block is the system's
        "warps": WARPS // code.warps,
        "tensor memory": TENSOR_MEMORY // max(1, code.tensor_memory),
        "blocks": BLOCKS,
    }
    limit = min(bounds, key=lambda name: (bounds[name], name != "warps"))
    return bounds[limit] * code.warps / WARPS, limit


def describe(usage: str, sass: Sass, shared: int, warps: int, tensor_memory: int = 0) -> Code:
    """Code from the output of cuobjdump -res-usage, the machine code, and what the compiler says of
    a block.
    """
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    counts = collections.Counter(opcode.partition(".")[0] for opcode in sass.opcodes)

    def count(pattern: str) -> int:
        return sum(number for opcode, number in counts.items() if re.fullmatch(pattern, opcode))

    loads, stores = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP"), ("STG", "UTMASTG")
    return Code(
        registers=registers,
        stack=stack,
        local_loads=count("LDL"),
        local_stores=count("STL"),
        shared=shared,
        warps=warps,
        tensor_memory=tensor_memory,
        hgmma=count("HGMMA"),
        hmma=count("HMMA"),
        other_mma=count("(?!HGMMA|HMMA).*MMA"),
        wide_loads=wide_share(sass, loads),
        wide_stores=wide_share(sass, stores),
        fp64=count("D(ADD|MUL|FMA|SETP|MNMX)|MUFU64"),
        atomics=count("ATOM|ATOMG|RED|REDG"),
    )


@functools.cache
def load_module(op: str) -> ModuleType:
    """<op>_triton.py of this package, or the file that is named by a path ending in .py."""
    if not op.endswith(".py"):
        return importlib.import_module(f"lightningdit_kernels.{op}_triton")
    spec = importlib.util.spec_from_file_location(Path(op).stem, op)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases_of(op: str) -> list[dict[str, Any]]:
    """audit_cases() of an op, or of a file that is named by a path ending in .py, checked.

    Raises: ValueError if a case is malformed or two have one name.
    """
    cases = load_module(op).audit_cases()
    names = [case["name"] for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"{op}: {max(names, key=names.count)} is the name of several cases")
    for case in cases:
        check_case(op, case)
    return cases


def check_case(op: str, case: dict[str, Any]) -> None:
    """ValueError if the case is malformed."""
    name, arguments = f"{op}: {case['name']}", case["kernel"].arg_names
    signature, constexprs = case["signature"], case["constexprs"]
    given = signature.keys() | constexprs.keys()
    if given != set(arguments):
        missing, unknown = sorted(set(arguments) - given), sorted(given - set(arguments))
        raise ValueError(
            f"{name}: signature and constexprs lack {missing} and have {unknown} too much"
        )
    without = [
        argument
        for argument, kind in signature.items()
        if kind == "constexpr" and argument not in constexprs
    ]
    if without or not set(case["divisible"]) <= signature.keys():
        wrong = f"divisible names other arguments than the signature: {case['divisible']}"
        raise ValueError(f"{name}: no value for {without}, or {wrong}")
    if case["kind"] not in KINDS:
        raise ValueError(f"{name}: kind is {case['kind']!r}, expected one of {', '.join(KINDS)}")
    usual = case.get("hgmma", True) and case.get("wide", True) and not case.get("fp64")
    if not usual and not case.get("reason"):
        raise ValueError(f"{name}: hgmma=False, wide=False or fp64=True needs a reason")


def compile_case(case: dict[str, Any], arch: int, **options: int) -> tuple[Code, Sass]:
    """Compiles a case for sm_<arch>, options (maxnreg) given to triton, and reads what came out.

    For a process in which TRITON_INTERPRET is not set.
    """
    return read_kernels([compile_kernel(case, arch, **options)], arch)[0]


def compile_kernel(case: dict[str, Any], arch: int, **options: int) -> Any:
    """What triton compiled of a case; as compile_case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = case["kernel"], case["constexprs"]
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else case["signature"][name] for name in names
    }
    multiples = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in case["divisible"]
        if name not in constants
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
    launch = {"num_warps": case["num_warps"], "num_stages": case["num_stages"]}
    launch |= COMPILE_OPTIONS | options
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)


def read_kernels(compiled: Sequence[Any], arch: int) -> list[tuple[Code, Sass]]:
    """Reads kernels that compile_kernel compiled for sm_<arch>, with one start of nvdisasm, which
    takes it as long as a compilation.
    """
    import triton

    if not compiled:
        return []
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubins = [kernel.asm["cubin"] for kernel in compiled]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        usages = []
        for cubin in cubins:
            path.write_bytes(cubin)
            usages.append(_output_of(tools / "cuobjdump", "-res-usage", path))
        codes = [_code_of(cubin) for cubin in cubins]
        path.write_bytes(b"".join(codes))
        name = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
        instructions = _instructions(_output_of(tools / "nvdisasm", "--binary", name, path))
    lengths = [len(code) // _INSTRUCTION_BYTES for code in codes]
    assert len(instructions) == sum(lengths), "nvdisasm lists other instructions than there are"
    read, begin = [], 0
    for kernel, usage, length in zip(compiled, usages, lengths, strict=True):
        sass = _sass_of(instructions[begin : begin + length], begin)
        begin += length
        block = kernel.metadata
        code = describe(usage, sass, block.shared, block.num_warps, block.tmem_size)
        read.append((code, sass))
    return read


def _output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _code_of(cubin: bytes) -> bytes:
    """The instructions of the one kernel in an ELF file of 64 bits: its section .text.<kernel>."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    # Of a section: where its name is among the names, where it begins, its size.
    sections = [
        struct.unpack_from("<I20xQQ", cubin, table + size * index) for index in range(count)
    ]
    found = [
        cubin[begin : begin + length]
        for name, begin, length in sections
        if cubin[sections[names][1] + name :].startswith(b".text.")
    ]
    (code,) = found
    return code
