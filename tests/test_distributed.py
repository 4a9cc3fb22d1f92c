"""What lightningdit.distributed says and sets before any work."""
import os
import stat

import pytest
import torch
from torch._inductor import config, cpu_vec_isa

from lightningdit.distributed import check_compiler, trust_vector_units

TRIES = os.uname().machine == "x86_64" and "TORCHINDUCTOR_VEC_ISA_OK" not in os.environ
x86 = pytest.mark.skipif(not TRIES, reason="Inductor tries the vector units of x86, and where it has no orders")


def forget():
    """What Inductor knows of the vector units by now."""
    for unit in (cpu_vec_isa.VecISA, *map(type, cpu_vec_isa.supported_vec_isa_list)):
        for kept in vars(unit).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()
    cpu_vec_isa.valid_vec_isa_list.cache_clear()


@pytest.fixture
def trials(monkeypatch):
    """The programs by which Inductor tries vector units; none is compiled here, and all are good."""
    tried = []
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda unit, code: tried.append(code) or True)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    forget()
    with config.patch({"cpp.vec_isa_ok": None}):
        yield tried
    forget()


def compiler(folder, code):
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\nexit {code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@x86
def test_the_longest_trials_are_spared_where_the_compiler_knows_the_units(trials, tmp_path):
    chosen = str(cpu_vec_isa.pick_vec_isa())
    assert cpu_vec_isa.VecISA._avx_code in trials, "Inductor has no such trial: trust_vector_units is of no use"
    trials.clear()
    forget()
    assert trust_vector_units(compiler(tmp_path, 0)) and config.cpp.vec_isa_ok is True
    assert str(cpu_vec_isa.pick_vec_isa()) == chosen and cpu_vec_isa.VecISA._avx_code not in trials


@x86
def test_an_old_compiler_leaves_the_trial_to_inductor(trials, tmp_path):
    assert not trust_vector_units(compiler(tmp_path, 1)) and config.cpp.vec_isa_ok is None
    assert not trust_vector_units(str(tmp_path / "absent")) and config.cpp.vec_isa_ok is None
    config.cpp.vec_isa_ok = False
    assert not trust_vector_units(compiler(tmp_path, 0)) and config.cpp.vec_isa_ok is False, "the user's word counts"


def test_a_gpu_needs_no_vector_units(trials, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler(tmp_path, 0))
    check_compiler(torch.device("cuda"))
    assert config.cpp.vec_isa_ok is None and trials == []
