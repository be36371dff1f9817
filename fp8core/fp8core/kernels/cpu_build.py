"""Compiles the C++ kernels of a CPU with the system's compiler, on first use, in seconds; then they are cached."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(f"cpu{part}.cpp") for part in ("", "_gemm", "_operator"))
HEADERS = tuple(Path(__file__).with_name(f"cpu_{part}.h") for part in ("vectors", "gemm"))
# Contracting x * scale + c into one rounding would break the rounding to FP8.
_COMMON_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-pthread", "-w")
_FLAG_SETS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
_COMPILE_DEADLINE_S = 120.0


class UnavailableError(Exception):
    """The library cannot be built or loaded here; the message says why."""


def build(cache_dir: Path | None = None, compiler: str | None = None) -> Path:
    """The compiled library's path, compiling it unless it is cached.

    The name carries a hash of the source, the flags, the compiler and the processor, so that a cache on a shared
    home serves different machines. Several processes may build at once: each renames its own file into place.

    Raises:
        UnavailableError: there is no compiler, it fails, or the cache cannot be written.
    """
    cache_dir = cache_dir or _user_cache() / "fp8scope" / "kernels"
    compiler = compiler or _find_compiler()
    sources = [path.read_bytes() for path in (*SOURCES, *HEADERS)]
    reasons = []
    for extra in _FLAG_SETS:
        flags = (*_COMMON_FLAGS, *extra)
        key = hashlib.sha256(repr((sources, flags, compiler, _processor())).encode()).hexdigest()[:20]
        library = cache_dir / f"cpu-{key}.so"
        if library.exists():
            return library
        failure = _compile(compiler, flags, library)
        if failure is None:
            return library
        reasons.append(failure)
    raise UnavailableError(f"{compiler} did not compile the CPU kernels: {reasons[-1]}")


def _user_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise UnavailableError(f"no place for the compiled CPU kernels: {error} Set XDG_CACHE_HOME") from None


def _find_compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise UnavailableError("no C++ compiler: install g++ (or set CXX) for casts that are many times faster")


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> str | None:
    """Compiles to `library`; returns the compiler's first complaint, or None when it worked."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as scratch:
            built = Path(scratch) / library.name
            objects = [Path(scratch) / f"{source.stem}.o" for source in SOURCES]
            commands = [
                [compiler, *flags, "-c", str(source), "-o", str(target)]
                for source, target in zip(SOURCES, objects, strict=True)
            ]
            link = [compiler, *flags, "-shared", *map(str, objects), "-o", str(built)]
            with ThreadPoolExecutor(len(commands)) as pool:
                complaint = next(filter(None, pool.map(_run, commands)), None) or _run(link)
            if complaint:
                return complaint
            built.replace(library)
    except subprocess.TimeoutExpired:
        return f"it took more than {_COMPILE_DEADLINE_S:.0f} s"
    except OSError as error:
        raise UnavailableError(f"cannot write the compiled CPU kernels: {error}; set XDG_CACHE_HOME") from None
    return None


def _run(command: list[str]) -> str | None:
    """The first line of its complaint, or None when it worked."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_DEADLINE_S, check=False)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]


def _processor() -> str:
    """What -march=native depends on: the processor's model and features, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), *told])
