"""Build the kernels for GPUs that are not here, and say how many registers each build takes.

    python -m tests.kernels.ahead [NAME ...]

One line of JSON for each build. Not under TRITON_INTERPRET, which leaves nothing to build.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90)
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Build:
    """A kernel as a run launches it."""

    kernel: str  # name in its module
    signature: dict[str, str]  # of the arguments that are no constants, as "*bf16" or "i32"
    constants: dict[str, object]
    warps: int = 4
    stages: int = 3
    aligned: tuple[str, ...] = field(default=())  # arguments divisible by 16, as pointers are
    capabilities: tuple[int, ...] = CAPABILITIES  # of the GPUs that it is for


@dataclass(frozen=True)
class Built:
    """What the assembler made of it."""

    module: str
    kernel: str
    constants: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def build(module: str, wanted: Build, capability: int) -> Built:
    """Compile one kernel of `bigsimclr.kernels` to machine code.

    Raises:
        triton.CompilationError: it does not compile.
    """
    function = getattr(importlib.import_module(f"bigsimclr.kernels.{module}"), wanted.kernel)
    kinds = wanted.signature | dict.fromkeys(wanted.constants, "constexpr")
    names = function.arg_names
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in wanted.signature.items()
        if kind.startswith("*") or name in wanted.aligned
    }
    source = ASTSource(
        function,
        signature={name: kinds[name] for name in names},
        constexprs=wanted.constants,
        attrs=attributes,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": wanted.warps, "num_stages": wanted.stages},
    )
    registers, spilled = _assembled(compiled.asm["ptx"], capability)
    return Built(
        module,
        wanted.kernel,
        ", ".join(f"{name}={value}" for name, value in wanted.constants.items()),
        capability,
        registers,
        spilled,
        compiled.metadata.shared,
    )


def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Return registers per thread and spilled bytes, stores and loads together."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        target = f"sm_{capability}" + ("a" if capability >= 90 else "")
        words = subprocess.run(
            [
                triton.knobs.nvidia.ptxas.path,
                "-v",
                f"--gpu-name={target}",
                str(file),
                "-o",
                str(file.with_suffix(".cubin")),
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stderr
    spills = [int(number) for found in _SPILLS.findall(words) for number in found]
    return max(int(number) for number in _REGISTERS.findall(words)), sum(spills)


def built(names: list[str]) -> Iterator[Built]:
    """Build every kernel of the modules named, for every GPU."""
    for name in names:
        for wanted in importlib.import_module(f"tests.kernels.builds.{name}").BUILDS:
            for capability in wanted.capabilities:
                yield build(name, wanted, capability)


if __name__ == "__main__":
    folder = Path(__file__).parent / "builds"
    everything = sorted(file.stem for file in folder.glob("[a-z]*.py"))
    for one in built(sys.argv[1:] or everything):
        print(json.dumps(asdict(one)), flush=True)
