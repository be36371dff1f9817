"""The Triton kernels without a GPU: interpreted, compiled ahead of time for a Hopper GPU, and read for host syncs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("FP8SCOPE_REQUIRE_ALL") != "1":
    pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the tests below compile", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp8core.formats import E4M3FN, E5M2FNUZ
from fp8core.kernels import triton as launchers
from fp8core.kernels import triton_jit as jit

HERE = Path(__file__).parent
POINTER = {
    "q_ptr": "*u8",
    "q_t_ptr": "*u8",
    "scale_ptr": "*fp32",
    "amax_ptr": "*i32",
    "partials_ptr": "*fp64",
    "counts_ptr": "*i64",
    "words_ptr": "*i64",
    "slot_ptr": "*i64",
}
INTEGERS = dict.fromkeys(("n", "rows", "columns", "iterations", "programs", "numel"), "i32")
TYPE_POINTER = {torch.bfloat16: "*i16", torch.float16: "*fp16", torch.float32: "*fp32"}
UNALIGNED = {"iterations", "programs", "numel"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BLOCK, TILE = launchers.BLOCK, {"BLOCK_ROWS": launchers.TILE[0], "BLOCK_COLUMNS": launchers.TILE[1]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def compile_for_hopper(kernel, constants, options, dtype=torch.bfloat16, aligned=True):
    """Compiles as the launcher would for sizes and addresses divisible by 16, or for none that are."""
    types = POINTER | INTEGERS | {"x_ptr": TYPE_POINTER[dtype]}
    names = kernel.arg_names
    divisible = [n for n in names if aligned and n not in constants and n not in UNALIGNED]
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def cast_constants(fmt, dtype, stats, hw_cast=False):
    return launchers._constants(torch.empty(0, dtype=dtype), fmt, stats, hw_cast)


def dumped(compiled, folder, what):
    """What cuobjdump says about the machine code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return subprocess.run([TOOLS / "cuobjdump", what, cubin], check=True, capture_output=True, text=True).stdout


def stack_bytes(compiled, folder):
    """What spilled out of the registers."""
    return int(re.search(r"STACK:(\d+)", dumped(compiled, folder, "--dump-resource-usage"))[1])


def accesses(compiled):
    return set(re.findall(r"(?:ld|st)\.global[\w.:]*", compiled.asm["ptx"]))


WIDE = {"ld.global.v4.b32", "st.global.v4.b32"}
SCALAR = {"ld.global.b32", "st.global.b64"}  # the scale, and a program's totals


@pytest.mark.parametrize(
    ("transpose", "dtype", "stats"),
    [
        (False, torch.bfloat16, False),
        (False, torch.bfloat16, True),
        (False, torch.float32, True),
        (True, torch.bfloat16, True),
        (True, torch.float16, True),
        (True, torch.float32, True),
    ],
)
def test_a_cast_spills_nothing_and_moves_16_bytes_at_a_time(transpose, dtype, stats, tmp_path):
    kernel, block = (jit.cast_transpose_kernel, TILE) if transpose else (jit.cast_kernel, {"BLOCK": BLOCK})

    compiled = compile_for_hopper(kernel, cast_constants(E4M3FN, dtype, stats) | block, launchers._OPTIONS, dtype=dtype)

    assert stack_bytes(compiled, tmp_path) == 0
    assert accesses(compiled) - SCALAR == WIDE
    instructions = dumped(compiled, tmp_path, "--dump-sass")
    assert "FADD" in instructions
    assert "FFMA" not in instructions, "a product and a sum were contracted into one rounding"
    assert not re.search(r"F(ADD|MUL)\S*\.FTZ", instructions), "subnormals are flushed"


def test_the_hardware_conversion_is_the_saturating_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(TOOLS / "ptxas-blackwell"))  # the other, of CUDA 12.8, crashes on it
    constants = cast_constants(E4M3FN, torch.bfloat16, True, hw_cast=True)

    compiled = compile_for_hopper(jit.cast_transpose_kernel, constants | TILE, launchers._OPTIONS)

    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.asm["ptx"]
    assert stack_bytes(compiled, tmp_path) == 0


def test_the_other_kernels_spill_nothing_and_merge_by_64_bit_atomics(tmp_path):
    options = launchers._OPTIONS
    sixteen_bits = {"TYPE": 0, "BLOCK": BLOCK}
    amax = compile_for_hopper(jit.amax_kernel, sixteen_bits, options)
    exponents = compile_for_hopper(jit.exponents_kernel, sixteen_bits, options)
    finalise = compile_for_hopper(jit.finalise_kernel, {"OVERWRITE": False, "BLOCK": 256}, options)
    overwrite = compile_for_hopper(jit.finalise_kernel, {"OVERWRITE": True, "BLOCK": 256}, options)

    for compiled in (amax, exponents, finalise, overwrite):
        assert stack_bytes(compiled, tmp_path) == 0
    assert accesses(amax) == accesses(exponents) == {"ld.global.v4.b32"}
    merged = set(re.findall(r"(?:red|atom)\.global\S*?\.(add|max|min)\.(\w+)", finalise.asm["ptx"]))
    assert merged == {("add", "u64"), ("max", "s64"), ("min", "s64"), ("add", "f64")}
    assert not re.search(r"(?:red|atom)\.global", overwrite.asm["ptx"])


@pytest.mark.parametrize(
    ("transpose", "ones"), [(False, {}), (True, {}), (True, {"iterations": 1, "rows": 1, "columns": 1})]
)
def test_odd_addresses_and_sizes_compile_and_so_do_sizes_of_one_which_triton_makes_constants(transpose, ones):
    kernel = jit.cast_transpose_kernel if transpose else jit.cast_kernel
    block = TILE if transpose else {"BLOCK": BLOCK}

    compile_for_hopper(
        kernel, cast_constants(E5M2FNUZ, torch.bfloat16, True) | block | ones, launchers._OPTIONS, aligned=False
    )


def test_a_single_element_compiles_too():
    one = {"n": 1, "iterations": 1, "TYPE": 0, "BLOCK": BLOCK}
    merge = {"programs": 1, "numel": 1, "BLOCK": 256}

    compile_for_hopper(jit.amax_kernel, one, launchers._OPTIONS, aligned=False)
    compile_for_hopper(jit.exponents_kernel, one, launchers._OPTIONS, aligned=False)
    compile_for_hopper(jit.finalise_kernel, merge | {"OVERWRITE": False}, launchers._OPTIONS, aligned=False)
    compile_for_hopper(jit.finalise_kernel, merge | {"OVERWRITE": True}, launchers._OPTIONS, aligned=False)


def test_the_launchers_never_ask_the_device_for_a_value():
    waits = {"item", "cpu", "tolist", "numpy", "synchronize", "nonzero", "is_nonzero", "to_dense"}
    converts = {"float", "int", "bool", "print"}

    for node in ast.walk(ast.parse(Path(launchers.__file__).read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in waits, f"line {node.lineno}: .{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in converts, f"line {node.lineno}: {node.func.id}()"


FILES = ["test_kernel_casts.py", "test_kernel_statistics.py", "test_kernel_transpose.py"]


def passed_in_the_interpreter(*options, timeout_s):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=timeout_s)

    assert done.returncode == 0, done.stdout[-3000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_in_the_interpreter_the_kernels_pass_the_tests_of_every_implementation():
    assert passed_in_the_interpreter("-m", "not slow", "-k", "not scale_large", *FILES, timeout_s=280) > 80


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_in_the_interpreter_the_kernels_pass_the_long_tests_too():
    assert passed_in_the_interpreter("-m", "slow", "test_kernel_casts.py", timeout_s=880) == 4


def test_registers_and_shared_memory_of_every_kernel_are_reported_and_leave_room_for_twelve_warps(
    tmp_path, record_property
):
    options = launchers._OPTIONS
    cast = cast_constants(E4M3FN, torch.bfloat16, True)
    kernels = {
        "amax": (jit.amax_kernel, {"TYPE": 0, "BLOCK": BLOCK}),
        "cast": (jit.cast_kernel, cast | {"BLOCK": BLOCK}),
        "cast_transpose": (jit.cast_transpose_kernel, cast | TILE),
        "exponents": (jit.exponents_kernel, {"TYPE": 0, "BLOCK": BLOCK}),
        "finalise": (jit.finalise_kernel, {"OVERWRITE": False, "BLOCK": 256}),
    }
    for name, (kernel, constants) in kernels.items():
        compiled = compile_for_hopper(kernel, constants, options)
        usage = dumped(compiled, tmp_path, "--dump-resource-usage")
        registers, shared_bytes = int(re.search(r"REG:(\d+)", usage)[1]), compiled.metadata.shared
        record_property(name, f"{registers} registers, {shared_bytes} bytes shared")
        print(f"{name}: {registers} registers, {shared_bytes} bytes of shared memory")
        # A multiprocessor has 65,536 registers and 228 KiB; three blocks of four warps have to live on it at once.
        assert 3 * 128 * registers <= 65536, name
        assert shared_bytes <= 48 * 1024, name
