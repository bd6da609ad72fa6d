"""Builds the native CPU kernels of csrc/ into es2fast/_native*.so; the rest is in pyproject.toml.

The kernels need torch's headers and a C++ compiler at install time (`pip install
--no-build-isolation .`). Without them the install still succeeds, es2fast works on its torch
backend, and `es2fast env` says what is missing.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM64 = sys.platform == "linux" and platform.machine() == "aarch64"
# What torch itself compiles its kernels with, and the CPUs' bfloat16 products; registration.cpp and
# gemm_bf16.cpp choose among them at run time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
INSTRUCTION_SETS_X86 = {
    "kernels_avx2.cpp": AVX2,
    "kernels_avx512.cpp": AVX512,
    "gemm_bf16_avx512.cpp": AVX512_BF16,
    "gemm_bf16_amx.cpp": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
INSTRUCTION_SETS_ARM64 = {"gemm_bf16_arm64.cpp": ["-march=armv8.2-a+bf16"]}
INSTRUCTION_SETS = INSTRUCTION_SETS_X86 if X86 else INSTRUCTION_SETS_ARM64 if ARM64 else {}
MACROS = [("ES2FAST_X86", "1")] if X86 else [("ES2FAST_ARM64", "1")] if ARM64 else []


def native_extension() -> list[Extension]:
    """The extension, or nothing where torch cannot be imported or compilation is unsupported."""
    try:
        import torch
        from torch.utils.cpp_extension import include_paths
    except ImportError:
        print("es2fast: no torch here at build time, so no native CPU kernels", file=sys.stderr)
        return []
    if os.name == "nt":
        print("es2fast: no native CPU kernels on Windows", file=sys.stderr)
        return []
    library = Path(torch.__file__).parent / "lib"
    sources = ["registration.cpp", "gemm.cpp", "gemm_bf16.cpp", "linear_kl.cpp", "moments.cpp"]
    sources += ["separation.cpp", "kernels_default.cpp", *INSTRUCTION_SETS]
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    flags += [
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
        "-Wno-psabi",
    ]
    # torch brings its own OpenMP runtime: a second one would mean a second pool of threads.
    bundled = sorted(library.glob("libgomp*.so*"))
    openmp = [str(bundled[0])] if bundled else ["-fopenmp"] if sys.platform == "linux" else []
    if openmp:
        flags.append("-fopenmp")
    extra = os.environ.get("ES2FAST_CXXFLAGS", "").split()  # make sanitize
    abi = int(torch.compiled_with_cxx11_abi())
    return [
        Extension(
            "es2fast._native",
            [str(CSRC / name) for name in sources],
            include_dirs=include_paths(),
            library_dirs=[str(library)],
            libraries=["torch", "torch_cpu", "c10"],
            define_macros=[("_GLIBCXX_USE_CXX11_ABI", str(abi)), *MACROS],
            extra_compile_args=[*flags, *extra],
            extra_link_args=[*openmp, *extra],
            depends=[str(path) for path in sorted(CSRC.glob("*")) if path.suffix != ".cpp"],
            language="c++",
            optional=True,
        )
    ]


class BuildNative(build_ext):
    """Compiles each file for its own instruction set."""

    def build_extension(self, ext):
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, ext_name, cc_args, extra_postargs, pp_opts):
            flags = [*extra_postargs, *INSTRUCTION_SETS.get(Path(src).name, ())]
            compile_one(obj, src, ext_name, cc_args, flags, pp_opts)

        self.compiler._compile = compile_with_flags
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one


setup(ext_modules=native_extension(), cmdclass={"build_ext": BuildNative})
