"""Builds the native library: every op once per instruction set level, linked into one file that chooses at run time.

    python kernels/build.py

Compiles what changed since the last build and needs nothing but a C++17 compiler ($CXX, g++ or clang++).
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LIBRARY = ROOT / "kvrun_kernels" / "native.so"

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno"]
# A sum must have the same bits in every loop that forms it: the compiler may not fuse what the source does not.
COMMON += ["-ffp-contract=off"]
# GCC's own AVX-512 intrinsics trip the last two.
COMMON += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86_LEVELS = {"generic": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

# The only ops that gain from a level's last instruction; the others would be compiled twice for nothing.
BF16_OPS = {"grouped_linear", "linear", "paged_attention", "quantized_linear", "sgmv"}


def find_compiler() -> str:
    """The C++ compiler to use; ends the program with advice where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    sys.exit(
        "kernels/build.py needs a C++17 compiler; looked for $CXX, g++, clang++ and c++, found none. "
        "Install one (Debian, Ubuntu: apt install g++) and run it again. "
        "Until then every op is served by its slower PyTorch reference."
    )


def build(out: Path = LIBRARY, cache: Path = ROOT / "build", jobs: int | None = None) -> bool:
    """Bring the library at `out` up to date; says whether anything had to be done."""
    compiler = find_compiler()
    cache.mkdir(parents=True, exist_ok=True)
    headers = b"".join(path.read_bytes() for path in sorted((ROOT / "include").glob("*.h")))
    objects, stale = [], []
    for name, source, flags in _units():
        command = [compiler, *COMMON, f"-I{ROOT / 'include'}", *flags, "-c", str(source)]
        digest = hashlib.sha256(repr(command).encode() + source.read_bytes() + headers).hexdigest()[:16]
        target = cache / f"{name}-{digest}.o"
        objects.append(target)
        if not target.exists():
            stale.append((command, target))
    key = " ".join(target.name for target in objects)
    stamp = cache / "linked"
    if not stale and out.exists() and stamp.exists() and stamp.read_text() == f"{out} {key}":
        return False
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda unit: _compile(*unit), stale))
    _run([compiler, "-shared", "-pthread", "-o", f"{out}.new", *map(str, objects)])
    # Replaced, not rewritten: a running server keeps the file that it has mapped.
    os.replace(f"{out}.new", out)
    stamp.write_text(f"{out} {key}")
    for old in set(cache.glob("*.o")) - set(objects):
        old.unlink()
    return True


def _units() -> list[tuple[str, Path, list[str]]]:
    """Every object to make, as (name, source, flags), the slowest first."""
    levels = X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else {"generic": []}
    units = []
    for source in sorted(ROOT.glob("kvrun_kernels/*/cpu.cpp"), key=lambda path: -path.stat().st_size):
        op = source.parent.name
        for level in reversed(levels):
            if level != "avx512_bf16" or op in BF16_OPS:
                units.append((f"{op}.{level}", source, [*levels[level], f"-DKVRUN_LEVEL={level}"]))
    units += [(f"runtime.{source.stem}", source, []) for source in sorted(ROOT.glob("runtime/*.cpp"))]
    return units


def _compile(command: list[str], target: Path) -> None:
    _run([*command, "-o", f"{target}.new"])
    os.replace(f"{target}.new", target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


if __name__ == "__main__":
    print("built" if build() else "up to date", LIBRARY)
