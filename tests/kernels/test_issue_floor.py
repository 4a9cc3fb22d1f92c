"""The issue floor of code whose instructions are counted by hand."""

import collections
from dataclasses import replace

import pytest

from lightningdit_kernels import issue_floor, traffic
from lightningdit_kernels.issue_floor import count, floor_of, floors, mma_cycles, mma_flop
from lightningdit_kernels.machine_code import Code, read_sass

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   FFMA R4, R4, R5, R6 ;
        /*0030*/                   IMAD R8, R4, R5, R6 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8] ;
        /*0050*/                   MUFU.EX2 R8, R8 ;
        /*0060*/               @P2 BRA 0x40 ;
        /*0070*/               @P3 BRA 0x10 ;
        /*0080*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0090*/               @P3 BRA 0x80 ;
        /*00a0*/                   STG.E.128 [R2.64], R4 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
        /*00d0*/                   NOP;
"""
CODE = Code(64, 0, 0, 0, 0, 4, 0, 1, 0, 0, 1.0, 1.0, 0, 0)
LAUNCH = traffic.Launch(
    kernel="_kernel",
    case="case",
    small=False,
    signature={},
    constexprs={},
    divisible=(),
    options=dict(num_warps=4, num_stages=1),
    blocks={},
    programs=132,
    trips=(10, 40),
    flop=132 * 4 * 40 * 2 * 64 * 64 * 16 / 4,
    stored=132 * 4 * 32 * 16,
    asked=0,
    l2=0,
    dram=0,
    arguments={},
)


def test_instructions_are_weighted_by_their_loops():
    counts = count(read_sass(SASS), (10, 40))
    assert counts == {
        "MOV": 1,
        "LDG.E.128": 10,
        "FFMA": 10,
        "IMAD": 10,
        "HGMMA.64x64x16.F32.BF16": 40,
        "MUFU.EX2": 40,
        "BRA": 40 + 10 + 1 + 1,  # of the search and of the end, one pass each
        "IADD3": 1,
        "STG.E.128": 1,
        "EXIT": 1,
    }


def test_a_loop_of_one_trip_leaves_none():
    assert count(read_sass(SASS), (10, 1, 40)) == count(read_sass(SASS), (10, 40))


@pytest.mark.parametrize("trips", [(), (10,), (10, 40, 5)])
def test_loops_that_were_not_expected_are_an_error(trips):
    with pytest.raises(
        ValueError, match=rf"found loops of \[7, 3\] instructions, expected {len(trips)}"
    ):
        count(read_sass(SASS), trips)


def test_the_floors_of_known_counts():
    """528 warps on 132 multiprocessors: one a scheduler, so that cycles are a warp's own."""
    us = floors(count(read_sass(SASS), (10, 40)), warps=528, clock_ghz=1.0)
    assert us["issue"] == pytest.approx(0.166)
    assert us["fma"] == pytest.approx(0.020)
    assert us["alu"] == pytest.approx(2 * 2 / 1e3)  # MOV and IADD3
    assert us["mufu"] == pytest.approx(8 * 40 / 1e3)
    assert us["lsu"] == pytest.approx(4 * 11 / 1e3)
    assert us["mma"] == pytest.approx(32 * 40 / 1e3)


def test_imad_has_half_the_pipe():
    us = floors(collections.Counter(FFMA=1, IMAD=10), warps=528, clock_ghz=1.0)
    assert us["fma"] == pytest.approx(20 / 1e3)


@pytest.mark.parametrize(
    "opcode, flop, cycles",
    [
        ("HGMMA.64x64x16.F32.BF16", 32768, 32),
        ("HGMMA.64x128x8.F32.TF32", 32768, 64),
        ("HMMA.16816.F32.BF16", 4096, 4),
        ("HMMA.1688.F32.TF32", 2048, 4),
    ],
)
def test_matrix_instructions(opcode, flop, cycles):
    assert mma_flop(opcode) == flop
    assert mma_cycles(opcode) == cycles


def test_a_matrix_instruction_of_unknown_shape_is_an_error():
    with pytest.raises(ValueError, match="HMMA.F32: expected a shape"):
        mma_flop("HMMA.F32")


def test_the_check_compares_products_with_what_the_interpreter_counted():
    floor = floor_of(LAUNCH, CODE, read_sass(SASS))
    assert floor.check == pytest.approx(1)
    assert floor.us["issue"] == pytest.approx(166 / 1755)


@pytest.mark.parametrize(
    "change",
    [
        dict(flop=LAUNCH.flop * 3),
        dict(flop=LAUNCH.flop / 3),
        dict(flop=0, stored=LAUNCH.stored * 2),
    ],
)
def test_a_count_that_does_not_agree_is_an_error(change):
    with pytest.raises(ValueError, match="times what the interpreter counted"):
        floor_of(replace(LAUNCH, **change), CODE, read_sass(SASS))


def test_stores_are_checked_where_nothing_is_multiplied():
    assert floor_of(replace(LAUNCH, flop=0), CODE, read_sass(SASS)).check == pytest.approx(1)
    assert floor_of(replace(LAUNCH, flop=0, stored=132 * 4), CODE, read_sass(SASS)).check is None


def test_the_memory_floor_is_a_copy_at_4_3_TB_a_second():
    assert issue_floor.memory_us(453_000_000) == pytest.approx(105.3, abs=0.1)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--maxnreg", "0"], "--maxnreg is 0, expected at least 24"),
        (["--opcodes", "-1"], "--opcodes is -1, expected at least 0"),
        (["--sms", "0"], "--sms is 0"),
        (["--clock", "0"], "--clock is 0.0, expected more than 0"),
        (["--tile", "100"], "--tile is '100', expected powers of two"),
    ],
)
def test_bad_arguments_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        issue_floor.main(flags)
    assert said in capsys.readouterr().err
