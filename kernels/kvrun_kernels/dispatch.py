"""Hands each op what serves it: on the CPU the native function for this processor's instruction set, on a GPU its Triton code.

What lives here: finding `native.so`, choosing a level, knowing devices, counting threads. What never does: tensors' meaning.
Two variables force a choice, for tests and for diagnosis: `KVRUN_ISA` (a level's name) and
`KVRUN_KERNELS=reference` (neither native code nor Triton).
"""

import ctypes
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

LIBRARY = Path(__file__).with_name("native.so")

# Best first. A level runs the functions compiled for it, or for the next lower one that has them.
LEVELS = ("avx512_bf16", "avx512", "avx2", "generic")

# The codes that the C++ side knows dtypes by (include/dtypes.h).
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_ARGUMENTS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class Kernel:
    """One op's native function, and its Triton code. `run` is None while the reference has to serve on the CPU.

    `signature` has a letter per argument: p pointer, i 64-bit integer, f float. `elsewhere` names what serves off the CPU
    where the op's folder has no `triton.py`.
    """

    def __init__(self, name: str, signature: str, elsewhere: str = "reference"):
        self.name = name
        self.elsewhere = "triton" if Path(__file__).with_name(name).joinpath("triton.py").exists() and _has_triton else elsewhere
        self.run: Callable[..., None] | None = None
        self.level: str | None = None
        self._types = [_ARGUMENTS[letter] for letter in signature if letter != " "]
        _kernels[name] = self
        self.resolve(_chosen)

    def resolve(self, level: str | None) -> None:
        """Point `run` at the best function at or below `level`; None means the reference."""
        self.run, self.level = None, None
        if level is None or _library is None:
            return
        for candidate in LEVELS[LEVELS.index(level) :]:
            function = getattr(_library, f"kvrun_{self.name}_{candidate}", None)
            if function is not None:
                function.argtypes, function.restype = self._types, None
                self.run, self.level = function, candidate
                return

    def triton(self, first: torch.Tensor, *others: torch.Tensor | None) -> ModuleType | None:
        """The op's `triton.py` if it serves these: on a GPU, of a known dtype, last dimension contiguous.

        It is imported when the first such tensors come: a server on CPUs never loads Triton.
        """
        # On the CPU this is asked for every call.
        if first.is_cpu and "cpu" not in _triton_devices:
            return None
        if self.elsewhere != "triton" or not all(t is None or _triton_reads(t) for t in (first, *others)):
            return None
        return importlib.import_module(f"kvrun_kernels.{self.name}.triton")


def levels() -> tuple[str, ...]:
    """The levels that this processor can run, best first; empty without the library."""
    if _library is None:
        return ()
    return tuple(level for level in LEVELS if _library.kvrun_can_run(level.encode()))


def use(level: str = "native") -> None:
    """Serve every op from `level`: "native" (the best of each device), "reference", or a name out of `levels()`.

    "triton" has Triton's interpreter serve the CPU too, which tests use; it needs TRITON_INTERPRET=1 before Triton is loaded.
    """
    global _chosen, _triton_devices
    if level == "triton" and not (_has_triton and os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            "Triton asked for the CPU, where it runs interpreted: install triton and set TRITON_INTERPRET=1 before it is loaded"
        )
    _triton_devices = {"reference": frozenset[str](), "triton": frozenset({"cuda", "cpu"})}.get(level, frozenset({"cuda"}))
    if level in ("reference", "triton") or (level == "native" and _library is None):
        _chosen = None
    elif level == "native" and _library is not None:
        _chosen = _best(_library)
    elif level in levels():
        _chosen = level
    else:
        raise ValueError(
            f"instruction set level {level!r} asked, this machine has {', '.join(levels()) or 'no native library'}; "
            'use one of these, "native", "reference" or "triton"'
        )
    for kernel in _kernels.values():
        kernel.resolve(_chosen)


def describe(device: str = "cpu") -> dict[str, str]:
    """Say what serves each op on a device, as {"linear": "native/avx512", "rope": "reference", ...}."""
    import kvrun_kernels.ops  # noqa: F401  (the ops register themselves)

    def serving(kernel: Kernel) -> str:
        if device not in _triton_devices:
            return f"native/{kernel.level}" if kernel.run and device == "cpu" else "reference"
        return f"{kernel.elsewhere}/interpreter" if kernel.elsewhere == "triton" and device == "cpu" else kernel.elsewhere

    return {name: serving(kernel) for name, kernel in sorted(_kernels.items())}


def first_steps(device: str = "cpu") -> tuple[tuple[int, int], ...]:
    """Steps after which no op sets up anything on first use, as (tokens, tokens before them): where Triton compiles, one for each tile.

    Tiles grow with the rows, of experts with their share of them, and contexts are cut into stretches once they are long.
    """
    if device not in _triton_devices or os.environ.get("TRITON_INTERPRET") == "1":
        return ((16, 0), (1, 0))
    return (*((1 << n, 0) for n in range(12)), (1, 4096), (16, 4096))


def set_num_threads(count: int) -> None:
    """Share every later call among `count` threads, the caller being one of them."""
    if count < 1:
        raise ValueError(f"{count} threads asked, at least 1 is needed")
    if _library is not None:
        _library.kvrun_set_num_threads(count)
    else:
        torch.set_num_threads(count)


def get_num_threads() -> int:
    """How many threads share a call; at first, the processors this process may run on."""
    return _library.kvrun_get_num_threads() if _library is not None else torch.get_num_threads()


def on_cpu(*tensors: torch.Tensor | None) -> bool:
    """Whether native code can read these: on the CPU, of a known dtype, last dimension contiguous."""
    return all(t is None or (t.is_cpu and t.dtype in DTYPES and t.stride(-1) == 1) for t in tensors)


def on_gpu(t: torch.Tensor) -> bool:
    """Whether a tensor is where Triton serves: on a GPU, or anywhere under `use("triton")`."""
    return t.device.type in _triton_devices


def _triton_reads(t: torch.Tensor) -> bool:
    return on_gpu(t) and t.dtype in DTYPES and (t.dim() == 0 or t.stride(-1) == 1)


def _load() -> ctypes.CDLL | None:
    if _forced or not LIBRARY.exists():
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        # A library of another processor family or C library must not keep the server down.
        print(f"kvrun_kernels: {error}; the slower reference ops serve instead; rebuild with kernels/build.py", file=sys.stderr)
        return None
    library.kvrun_can_run.argtypes, library.kvrun_can_run.restype = [ctypes.c_char_p], ctypes.c_int
    library.kvrun_prefers.argtypes, library.kvrun_prefers.restype = [ctypes.c_char_p], ctypes.c_int
    library.kvrun_set_num_threads.argtypes, library.kvrun_set_num_threads.restype = [ctypes.c_int], None
    library.kvrun_get_num_threads.argtypes, library.kvrun_get_num_threads.restype = [], ctypes.c_int
    return library


def _best(library: ctypes.CDLL) -> str:
    """The level that is fastest here, which a processor's mere ability does not decide."""
    return next(level for level in LEVELS if library.kvrun_prefers(level.encode()))


_kernels: dict[str, Kernel] = {}
_chosen: str | None = None
_has_triton = importlib.util.find_spec("triton") is not None
_triton_devices: frozenset[str] = frozenset()
_forced = os.environ.get("KVRUN_KERNELS") == "reference"
_library = _load()
use("reference" if _forced else "native" if _library is None else os.environ.get("KVRUN_ISA", "native"))
