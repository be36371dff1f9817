"""A product goes past torch's dispatcher where nothing could tell, and nowhere else."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fp8core import Fp8Linear, matmul, quantize_for_inference
from fp8core.kernels import cpu, cpu_direct
from fp8core.matmul import scaled_mm

pytestmark = pytest.mark.skipif(
    bool(cpu.unavailable_reason()) or not cpu.is_registered(), reason="needs the compiled GEMM and torch 2.10"
)

ONE = torch.tensor(1.0)
A, B = (torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((24, 40), (40, 16)))
A_CODES, B_CODES = A.to(torch.float8_e5m2), B.to(torch.float8_e4m3fn)


@pytest.fixture
def operation_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows with each call of the operation."""
    calls: list[str] = []
    operation = matmul._operation

    def counted(*arguments: Any) -> Any:
        calls.append("scaled_mm")
        return operation(*arguments)

    monkeypatch.setattr(matmul, "_operation", counted)
    return calls


def by_operation(a: Tensor, b: Tensor, s_a: Tensor, s_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    y: Tensor = torch.ops.fp8core.scaled_mm(a, b, s_a, s_b, out_dtype, False, False)
    return y


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode], ids=lambda each: each.__name__)
def test_a_plain_call_does_not_reach_the_operation_and_gives_its_bits(
    out_dtype: torch.dtype, context: Callable[[], AbstractContextManager[None]], operation_calls: list[str]
) -> None:
    s_a, s_b = torch.tensor([3.7, 0.011])

    with context():
        for a, b in ((A_CODES, B_CODES), (A_CODES.t(), A_CODES), (B_CODES[::3, 1:].t(), A_CODES.t()[::3])):
            y, expected = scaled_mm(a, b, s_a, s_b, out_dtype=out_dtype), by_operation(a, b, s_a, s_b, out_dtype)

            assert type(y) is Tensor
            assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), out_dtype)
            assert torch.equal(y, expected)
            assert y.is_inference() == expected.is_inference()
    assert not operation_calls


class _SeesFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class _SeesOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def product_with(a: Tensor) -> Tensor:
    return scaled_mm(a, B_CODES, ONE, ONE, out_dtype=torch.float32)


def product() -> Tensor:
    return product_with(A_CODES)


@pytest.mark.parametrize("mode", [_SeesFunctions(), _SeesOperations()], ids=lambda mode: type(mode).__name__)
def test_a_mode_sees_the_operation(mode: Any) -> None:
    with mode:
        y = product()

    assert "fp8core.scaled_mm.default" in mode.seen
    assert torch.equal(y, product())


def test_a_profiler_sees_the_operation() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        product()

    assert "fp8core::scaled_mm" in {event.name for event in profiler.events()}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_tracers_see_the_operation() -> None:
    graph = make_fx(product_with)(A_CODES)
    traced = torch.jit.trace(product_with, A_CODES)

    assert "fp8core.scaled_mm.default" in graph.code
    assert "fp8core::scaled_mm" in str(traced.inlined_graph)


def test_compiled_code_has_the_operation_in_its_one_graph() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    y = torch.compile(product_with, backend=backend, fullgraph=True)(A_CODES)

    assert len(graphs) == 1
    assert "scaled_mm" in graphs[0]
    assert torch.equal(y, product())


def test_fake_tensors_get_a_fake_product() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = product_with(mode.from_tensor(A_CODES))

    assert isinstance(y, torch._subclasses.FakeTensor)
    assert y.shape == (24, 16)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transformations_reach_the_operation(operation_calls: list[str]) -> None:
    batch = torch.stack([A_CODES.view(torch.uint8)] * 3)

    y = torch.func.vmap(lambda codes: product_with(codes.view(torch.float8_e5m2)))(batch)
    z = torch.func.functionalize(product_with)(A_CODES)

    assert torch.equal(y, product().expand(3, 24, 16))
    assert torch.equal(z, product())
    assert len(operation_calls) == 2


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x.as_subclass(_Subclass),
        lambda x: torch.nn.Parameter(x, requires_grad=False),
        lambda x: x.detach().requires_grad_(),
        torch._to_functional_tensor,
        lambda x: x.to("meta"),
    ],
    ids=["subclass", "parameter", "with a gradient", "functional", "meta"],
)
def test_tensors_that_are_not_plain_go_to_the_operation(
    wrap: Callable[[Tensor], Tensor], operation_calls: list[str]
) -> None:
    scaled_mm(wrap(A_CODES), wrap(B_CODES), wrap(ONE), wrap(ONE), out_dtype=torch.float32)

    assert operation_calls == ["scaled_mm"]
    for place in range(4):
        operands = [A_CODES, B_CODES, ONE, ONE]
        operands[place] = wrap(operands[place])
        assert cpu.product_or_none(*operands, torch.float32) is None


@pytest.mark.parametrize(
    "arguments",
    [
        (A_CODES, B_CODES, ONE, ONE, torch.float16),
        (A_CODES, B_CODES, ONE, ONE, None),
        (A_CODES, B_CODES, ONE, ONE),
        (A_CODES, B_CODES, ONE, 1.0, torch.float32),
        (None, B_CODES, ONE, ONE, torch.float32),
        (A_CODES, A_CODES, ONE, ONE, torch.float32),
        (A, B_CODES, ONE, ONE, torch.float32),
        (A_CODES, B_CODES, A, ONE, torch.float32),
        (A_CODES, B_CODES, ONE, ONE.double(), torch.float32),
    ],
    ids=["float16", "no dtype", "too few", "a number", "None", "shapes", "not FP8", "scales", "float64"],
)
def test_what_it_cannot_do_is_left_to_the_operation(arguments: tuple[Any, ...]) -> None:
    assert cpu.product_or_none(*arguments) is None


def test_a_training_step_and_inference_go_past_the_dispatcher(operation_calls: list[str]) -> None:
    layer, x = Fp8Linear(32, 48), torch.randn(8, 32)

    layer(x.requires_grad_()).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
    quantized = quantize_for_inference(layer)
    with torch.inference_mode():
        quantized(x)

    assert not operation_calls


def test_a_hundred_thousand_calls_leak_nothing() -> None:
    kept = (A_CODES, B_CODES, ONE, None, torch.float32)

    def rounds(count: int) -> None:
        for _ in range(count):
            cpu.product_or_none(A_CODES, B_CODES, ONE, ONE, torch.float32)
            cpu.product_or_none(A_CODES, A_CODES, ONE, ONE, torch.float32)  # fails after it has begun

    rounds(1000)
    references, blocks = [sys.getrefcount(each) for each in kept], sys.getallocatedblocks()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounds(50_000)

    assert [sys.getrefcount(each) for each in kept] == references
    assert abs(sys.getallocatedblocks() - blocks) < 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kilobytes < 4096


def test_a_product_dies_with_its_last_reference() -> None:
    y = product()

    assert sys.getrefcount(y) == 2
    assert y._use_count() == 1  # type: ignore[no-untyped-call]  # torch's own signature


def test_other_threads_run_during_a_product() -> None:
    large = torch.zeros(1024, 1024).to(torch.float8_e4m3fn)
    turns, stop = 0, False

    def turn() -> None:
        nonlocal turns
        while not stop:
            turns += 1
            time.sleep(0)  # gives the interpreter up; nobody is asked to

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    other = threading.Thread(target=turn)
    other.start()
    try:
        before = turns
        y = cpu.product_or_none(large, large, ONE, ONE, torch.float32)
        during = turns - before
    finally:
        stop = True
        sys.setswitchinterval(interval)
        other.join()

    assert y is not None
    assert during > 0


def test_threads_multiply_at_the_same_time() -> None:
    expected = [by_operation(A_CODES[n:], B_CODES, ONE, ONE, torch.bfloat16) for n in range(20)]

    def one(n: int) -> bool:
        results = [scaled_mm(A_CODES[n:], B_CODES, ONE, ONE, out_dtype=torch.bfloat16) for _ in range(200)]
        return all(torch.equal(y, expected[n]) for y in results)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(20)))


def test_a_mode_is_seen_in_its_own_thread_only() -> None:
    with _SeesOperations() as mode, ThreadPoolExecutor(1) as pool:
        given = pool.submit(cpu.product_or_none, A_CODES, B_CODES, ONE, ONE, torch.float32).result()
        seen_here = cpu.product_or_none(A_CODES, B_CODES, ONE, ONE, torch.float32)

    assert given is not None
    assert seen_here is None
    assert not mode.seen


def found(reference: Callable[..., Any] = cpu.scaled_mm) -> cpu_direct.DirectProduct | None:
    return cpu_direct.direct_product(cpu._library(), reference)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_LIBC10", ("_ZNK3c1010TensorImpl13no_such_nameEv",)),
        ("_PYTHON", ("PyEval_SaveThread", "PyEval_RestoreThread", "Py_NoSuchName")),
    ],
)
def test_without_one_of_torchs_functions_it_is_off(
    name: str, value: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found() is not None
    monkeypatch.setattr(cpu_direct._Direct, name, value)

    assert found() is None


def test_where_tensors_have_another_layout_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_direct, "_IMPL_WORDS", 4)

    assert found() is None


def test_where_it_gives_another_product_it_is_off() -> None:
    assert found(lambda *arguments: cpu.scaled_mm(*arguments) + 1) is None


def test_a_mode_of_the_caller_does_not_disturb_the_search() -> None:
    with _SeesOperations() as mode, FakeTensorMode(), torch.device("meta"):
        assert found() is not None

    assert not mode.seen


def test_without_it_the_operation_is_called(operation_calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "product_or_none", cpu._no_product)

    product()

    assert operation_calls == ["scaled_mm"]
