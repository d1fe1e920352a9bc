"""What the built CUDA kernels cost for an element, from the SASS that is in the extension.

Budgets are for bfloat16 without a softcap or statistics: a plain row has to stay bound by memory.
"""

from __future__ import annotations

import re

import pytest

from benchmarks import model, sass
from dpo_kernels.backends import native

# issue slots an element of forward and backward; counted 6.5 and 7.5, 6.3 and 7.7, 5.8 and 7.0
BUDGETS = {80: (7.6, 10.0), 90: (7.6, 10.0), 100: (7.6, 10.0)}
# of a row that begins between two vectors, where each word comes by a shuffle and a select: 1.4 to
# 1.6x the slots of an even row, hidden behind memory
ODD_BUDGETS = {80: (10.0, 11.0), 90: (9.8, 11.3), 100: (9.2, 10.3)}
ELEMENTS = 32
LOCAL = ("LDL", "STL")
LOADS = (r"LDG\.E\.(EF\.)?128", 4)
SHUFFLES = ("SHFL", 4)


@pytest.fixture(scope="module")
def built():
    if native.MODULE is None or not hasattr(native.MODULE, "cuda_forward"):
        pytest.skip("the extension is not built with the CUDA kernels")
    if reason := sass.unavailable():
        pytest.skip(reason)
    path = model.extension()
    archs = set(map(int, re.findall(r"sm_(\d+)\.cubin", sass.dump(path, "-lelf"))))

    def kernels(arch: int):
        if arch not in archs:
            pytest.skip(f"the extension has no code for sm_{arch}")
        return sass.functions(path, arch), sass.registers(path, arch)

    return kernels


@pytest.mark.parametrize("arch", [*BUDGETS, 120])
def test_no_kernel_spills(built, arch):
    functions, registers = built(arch)
    # forward: 3 dtypes, statistics or not, softcap or not; backward: 3 dtypes and two of 16 bits
    # for float32 logits, softcap or not
    assert len(functions) == 22
    assert functions.keys() == registers.keys()
    spilled = {n: r for n, r in registers.items() if r["STACK"] + r["LOCAL"]}
    assert spilled == {}
    accesses = {n for n, code in functions.items() if any(i.opcode.startswith(LOCAL) for i in code)}
    assert accesses == set()


@pytest.mark.parametrize("arch", BUDGETS)
@pytest.mark.parametrize("which", [0, 1], ids=["forward", "backward"])
def test_the_inner_loop_is_within_its_budget(built, arch, which):
    functions, registers = built(arch)
    name = model.plain_kernel(functions, which)
    loop = sass.inner_loop(functions[name], ELEMENTS, LOADS)
    assert 1 < loop.slots <= BUDGETS[arch][which]
    # one an element; forward rescales its sum once for each lane and segment
    assert loop.count("MUFU") == ELEMENTS + (which == 0)
    # four vectors of a lane, all in flight before the first is used
    assert loop.load_widths == {16: 4}
    threads = model.threads_in_flight(registers[name]["REG"], which)
    assert threads * 4 * 16 >= 40 * 1024, "bytes in flight on a multiprocessor"


@pytest.mark.parametrize("arch", ODD_BUDGETS)
@pytest.mark.parametrize("which", [0, 1], ids=["forward", "backward"])
def test_odd_rows_are_within_their_budget(built, arch, which):
    functions, _ = built(arch)
    code = functions[model.plain_kernel(functions, which)]
    even, odd = (sass.inner_loop(code, ELEMENTS, *n) for n in ((LOADS,), (LOADS, SHUFFLES)))
    assert even.slots < odd.slots <= ODD_BUDGETS[arch][which]
    assert odd.count("MUFU") == even.count("MUFU")
    # and the vector behind the segment
    assert odd.load_widths == {16: 5}
    # an element takes what memory or the slowest pipe takes
    moved = (2, 4)[which]
    for chip in (c for c in model.CHIPS if c.arch == arch):
        slow, fast = (model.seconds(chip, loop.pipes, moved)[0] for loop in (odd, even))
        assert slow <= 1.3 * fast, chip.name


SNIPPET = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P1 BRA 0x60 ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/                   FADD R9, R9, R4 ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   LDL R1, [R1] ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
        /*0080*/                   STG.E.64 [R2.64], R4 ;
        /*0090*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00a0*/                   BRA P2, 0x10 ;
        /*00b0*/                   EXIT ;
"""


def test_the_reader_finds_the_shortest_loop_that_does_what_it_must():
    code = sass.parse(SNIPPET)
    assert [i.opcode for i in code if i.predicated] == ["BRA", "BRA"]
    plain = sass.inner_loop(code, 1, (r"LDG\.E", 1))
    assert plain.opcodes == ("MUFU.EX2", "FADD", "BRA", "LDG.E.128", "BRA")
    assert (plain.slots, plain.spills, plain.load_widths) == (5, 0, {16: 1})
    # a guarded branch may fall through, one without a guard or a predicate may not
    storing = sass.inner_loop(code, 1, (r"LDG\.E", 1), ("STG", 1))
    assert storing.opcodes[-2:] == ("LDG.E.128", "BRA")
    assert (len(storing.opcodes), storing.spills) == (7, 1)
    assert storing.pipes == {"issue": 7, "FMA": 0, "IMAD": 0, "MUFU": 1, "ALU": 1, "SHFL": 0}
    # no block has two of them
    assert sass.inner_loop(code, 2, (r"LDG\.E", 1)) is None
    # and none behind the loop counts
    assert sass.inner_loop(code, 1, ("EXIT", 1)) is None


def test_a_branch_of_lanes_that_diverge_may_fall_through():
    text = SNIPPET.replace("@!P1 BRA 0x60", "BRA.DIV ~URZ, 0x60")
    assert sass.inner_loop(sass.parse(text), 1, ("FADD", 1), (r"LDG\.E", 1)) is not None


def test_the_model_is_the_slower_of_memory_and_pipes():
    chip = model.Chip("even", 90, 100, 1.0, 25.6, 128)
    assert chip.clock == 1e9
    free = dict.fromkeys(("issue", "FMA", "IMAD", "MUFU", "ALU", "SHFL"), 0.0)
    assert model.seconds(chip, free, 2) == (2e-12, "memory")
    # 16 results a clock of 100 multiprocessors at 1 GHz: 1.6e12 a second
    assert model.seconds(chip, {**free, "MUFU": 8.0}, 2) == (5e-12, "MUFU")
    assert model.seconds(chip, {**free, "issue": 64.0}, 2) == (5e-12, "issue")
    # multiply-adds of both kinds queue for one pipe
    assert model.seconds(chip, {**free, "FMA": 32.0, "IMAD": 16.0}, 2) == (5e-12, "FMA")

    call = model.Call(tokens=10, scored=4, vocab=1000, backward=True)
    assert call.floor_bytes == 4 * 2000 + 4 * 2000 + 10 * 2000
    assert model.modelled(chip, call, free, free) == (pytest.approx(36e-9), "memory")
    # forward waits for a pipe, the scored rows of backward do not, nor do the cleared ones
    slow = {**free, "MUFU": 8.0}
    took, waits = model.modelled(chip, call, slow, free)
    assert took == pytest.approx(4000 * 5e-12 + 4000 * 4e-12 + 6 * 2000e-12)
    assert waits == "MUFU, memory"


def test_clocks_follow_from_the_data_sheets():
    """They are the boost clocks that NVIDIA states, to the digits of the peaks."""
    clocks = {chip.name: round(chip.clock / 1e9, 2) for chip in model.CHIPS}
    assert clocks == {"A100": 1.41, "H100": 1.98, "H200": 1.98, "B200": 1.98}


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_no_measured_call_beats_the_model(backend):
    """The modelled time of a call is below the measured one, wherever it was measured."""
    free = dict.fromkeys(("issue", "FMA", "IMAD", "MUFU", "ALU", "SHFL"), 0.0)
    count = 0
    for chip in (c for c in model.CHIPS if c.name in model.MEASURED):
        for (name, call), took in model.measured_calls(chip.name, backend).items():
            assert model.modelled(chip, call, free, free)[0] < took, (chip.name, name, call)
            count += 1
    assert count >= 10
