"""Puts the native library into the wheel, and says in the wheel's name which machines it is for."""

import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithLibrary(build_py):
    """The Python files, then the library beside them."""

    def run(self) -> None:
        # What an earlier version left there would be in the wheel too.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        spec = spec_from_file_location("build_native", HERE / "build.py")
        assert spec is not None and spec.loader is not None, "build.py lies beside this file"
        native = module_from_spec(spec)
        spec.loader.exec_module(native)
        if self.editable_mode:
            native.build()
            return
        target = Path(self.build_lib) / "kvrun_kernels" / native.LIBRARY.name
        # Built in its usual place first, so that the next build there has nothing to do.
        native.build()
        self.copy_file(str(native.LIBRARY), str(target))


class AnyPython(bdist_wheel):
    """The library is loaded by name and knows nothing of Python, so one wheel serves every version of it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithLibrary(Distribution):
    """A distribution that is not the same on every machine."""

    def has_ext_modules(self) -> bool:
        return True


(HERE / "build").mkdir(exist_ok=True)
setup(
    distclass=WithLibrary,
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": AnyPython},
    # `build/` holds the objects of build.py.
    options={"build": {"build_base": "build/wheel"}, "egg_info": {"egg_base": "build"}},
)
