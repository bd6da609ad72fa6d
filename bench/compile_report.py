"""Compile every Triton kernel ahead of time and print what it uses; needs no GPU.

    python bench/compile_report.py            # the configurations in use, sm_80, sm_90, sm_100
    python bench/compile_report.py --distinct # without float16 where it equals bfloat16
    python bench/compile_report.py --all      # candidates for tuning instead
    python bench/compile_report.py --sm 90 --json out.jsonl

A JSON row per case: kernel, dtype, direction, registers, spills (bytes), instructions_per_logit,
barriers_per_tile, and the fields of ``Report``. Instructions are counted in the SASS that
cuobjdump prints: every loop over tiles of logits runs its own instructions (those of loops within
it left out) once per tile in each thread, so a loop of n instructions is
n * threads / (logits per tile) per logit, and a kernel is the sum of its sweeps. What runs once
per row, the masked rest of a row included, is left out; a branch not taken counts. Barriers are
those of the same loops, summed. Of a tile-fused kernel the loop over columns counts, without its
GEMM; the separation's kernels see no logits and have null.

Columns: registers per thread, spilled bytes (stack frame and local memory as cuobjdump reports
them), shared memory per block, instructions per logit, and the tensor-core instruction of the
kernels with a dot. The exit
status is 1 when a configuration in use spills, exceeds the shared memory of its chip, or has a dot
without tensor cores. ``tests/bench/test_compile_report.py`` runs it with ``--distinct``.

Triton compiles another binary for arguments divisible by 16, so each kernel comes with a V that is
(128256) and one that is not ("odd-V"); strides always are, because the tile-fused kernel is not
launched on others. float16 kernels are bfloat16's with another type in loads, mma and stores: every
pair had the same registers and shared memory, except with a bias and an aligned V (up to 16
registers apart, for those loads are vectorized). ``--distinct`` compiles of float16 those and G's
row unit, which bfloat16 does not have; of soft-caps without a bias only bfloat16 with a gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90, 100)
TENSOR_CORE = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}  # in PTX
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block


@dataclass(frozen=True)
class Case:
    """One specialization of one kernel."""

    kernel: Any
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None
    has_dot: bool
    in_use: bool
    aligned: tuple[str, ...]  # arguments divisible by 16
    is_distinct: bool = True  # False: another case was found to cost the same

    def word(self, *choices: str) -> str | None:
        """Which of ``choices`` the label has as a word."""
        return next((word for word in self.label.split() if word in choices), None)

    @property
    def tile(self) -> int | None:
        """Logits in a tile; None: the kernel sees none."""
        c = self.constants
        if self.label.startswith("fused"):
            return c["BLOCK_M"] * c["BLOCK_N"]
        if self.label.startswith("separation"):
            return None
        return c["GROUPS"] * c["LANES"] * c["VEC"] if "LANES" in c else c["BLOCK"]


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case."""

    label: str
    capability: int
    in_use: bool
    kernel: str
    dtype: str | None
    direction: str | None
    registers: int
    spills: int  # bytes
    instructions_per_logit: float | None
    barriers_per_tile: int | None
    shared_bytes: int
    tensor_core: str
    problem: str


def _row_cases() -> Iterator[Case]:
    from es2fast.ops.linear_kl import triton as kernels
    from es2fast.ops.linear_kl.triton_light import LIGHT, LIGHT_REGISTERS, light_row_kernel

    pointers = ("zt_ptr", "zs_ptr", "scale_ptr", "loss_ptr", "unit_ptr")
    signature = dict.fromkeys(pointers, "*fp32")
    signature |= dict.fromkeys(("V", "pitch", "stride_g"), "i32")
    signature |= dict.fromkeys(("gain", "cap_in", "cap_out", "beta"), "fp32")
    heads = ("", " softcap", " bias+softcap", " bias+softcap odd-V", " bias+wide-softcap odd-V")
    modes = ("", " no-grad", " two-parts")
    options = itertools.product(kernels.DIRECTION, ("bf16", "fp16", "fp32"), heads, modes)
    for direction, dtype, head, mode in options:
        need_grad, light = mode != " no-grad", dtype != "fp32"
        if mode == " two-parts" and dtype != "bf16":
            continue  # only a bfloat16 G has two
        if "wide" in head and not light:
            continue  # one kernel for every soft-cap
        full, softcap = "bias" in head, ("softcap" in head) + ("wide" in head)
        # between the plain head and one with everything a sample is enough
        is_distinct = head != " softcap" or (dtype, mode) == ("bf16", "")
        is_distinct = is_distinct and (head, mode) != (" bias+softcap", " two-parts")
        constants: dict[str, Any] = dict(
            DIRECTION=kernels.DIRECTION[direction],
            SOFTCAP=softcap if light else bool(softcap),
            HAS_BT=full,
            HAS_BS=full and light,
            NEED_GRAD=need_grad,
            ROW_UNIT=need_grad and dtype == "fp16" and direction == "reverse",
        )
        names, places = ["g_ptr", "bt_ptr", "bs_ptr"], ["pitch", "stride_g"]
        if not light:
            kernel, config = kernels.row_kernel, kernels.ROW_CONFIG
            warps, registers = config.num_warps, config.max_registers
            constants |= dict(IS_DELTA=True, BLOCK=config.block, STAGES=config.stages)
        else:
            kernel, warps = light_row_kernel, LIGHT.num_warps
            registers = LIGHT_REGISTERS[softcap]
            constants |= dict(GROUPS=LIGHT.groups, LANES=32 * warps, VEC=LIGHT.vec)
            constants["TWO_PARTS"] = mode == " two-parts"
            names.append("low_ptr")
            places.append("stride_low")
        yield Case(
            kernel,
            f"row {direction} {dtype}{head}{mode}",
            signature | dict.fromkeys(names, f"*{dtype}") | dict.fromkeys(places, "i32"),
            constants,
            warps,
            3,
            registers,
            has_dot=False,
            in_use=True,
            aligned=(*places, *(() if "odd" in head else ("V",))),
            is_distinct=is_distinct and (_is_distinct(dtype, head) or bool(constants["ROW_UNIT"])),
        )


def _sharded_cases() -> Iterator[Case]:
    """The light row kernel in parts: G's float16 is as bfloat16 but for the row unit."""
    from es2fast.ops.linear_kl import triton_sharded as kernels
    from es2fast.ops.linear_kl.triton import DIRECTION
    from es2fast.ops.linear_kl.triton_light import LIGHT, LIGHT_REGISTERS

    parts: list[tuple[str, Any, dict[str, Any]]] = []
    for direction, number in DIRECTION.items():
        parts.append((f"statistics {direction}", kernels.statistics_kernel, dict(DIRECTION=number)))
        if direction == "jsd":
            parts.append(("values jsd", kernels.jsd_kernel, {}))
        for mode in ("", " no-grad", " two-parts"):
            if (direction, mode) != ("jsd", " no-grad"):
                constants = dict(
                    DIRECTION=number, NEED_GRAD=mode != " no-grad", TWO_PARTS=mode == " two-parts"
                )
                name = f"gradient {direction}{mode}"
                parts.append((name, kernels.gradient_kernel, constants | dict(ROW_UNIT=False)))
    heads = ("", " bias+softcap odd-V", " bias+wide-softcap odd-V")
    for (name, kernel, constants), head in itertools.product(parts, heads):
        softcap = ("softcap" in head) + ("wide" in head)
        constants = constants | dict(SOFTCAP=softcap, HAS_BT=bool(head), HAS_BS=bool(head))
        constants |= dict(GROUPS=LIGHT.groups, LANES=32 * LIGHT.num_warps, VEC=LIGHT.vec)
        signature = {n: "i32" for n in kernel.arg_names if n not in constants}
        signature |= {n: "*fp32" for n in signature if n.endswith("_ptr")}
        rounded = ("g_ptr", "low_ptr", "bt_ptr", "bs_ptr")
        signature |= {n: "*bf16" for n in rounded if n in signature}
        floats = ("gain", "cap_in", "cap_out", "beta")
        signature |= {n: "fp32" for n in floats if n in signature}
        places = tuple(n for n in ("pitch", "stride_g", "stride_low") if n in signature)
        yield Case(
            kernel, f"sharded {name} bf16{head}", signature, constants, LIGHT.num_warps, 3,
            LIGHT_REGISTERS[softcap], has_dot=False, in_use=True,
            aligned=(*places, *(() if head else ("V",))),
            is_distinct="wide" not in head and (bool(head) or name.split()[-1] in DIRECTION),
        )  # fmt: skip


def _is_distinct(dtype: str, features: str) -> bool:
    return dtype != "fp16" or ("bias" in features and "odd-V" not in features)


# "tail": H is no multiple of BLOCK_K. What is left out is weaker than what is in: less to load, or
# the same loads without masks.
FUSED_FEATURES = (
    "plain",
    "bias tail",
    "bias tail odd-V",
    "bias softcap tail",
    "bias softcap tail odd-V",
)


def _fused_cases(capability: int, candidates: bool) -> Iterator[Case]:
    from es2fast.ops.linear_kl import triton as kernels

    heads = itertools.product(("forward", "reverse"), ("bf16", "fp16"), ("shared", "two heads"))
    for (direction, dtype, head), features in itertools.product(heads, FUSED_FEATURES):
        used = kernels.fused_config(capability, "softcap" in features)
        if not candidates:
            yield _fused_case(used, direction, dtype, head, features, True)
        elif (direction, dtype) == ("forward", "bf16"):
            for config in _candidates():
                yield _fused_case(config, direction, dtype, head, features, config == used)


def _candidates() -> Iterator[Any]:
    from es2fast.ops.linear_kl import triton as kernels

    tiles = ((64, 128, 64), (128, 64, 32), (128, 64, 64), (128, 128, 32), (128, 128, 64))
    for tile, stages, parts in itertools.product(tiles, (3, 4), (1, 2, 4)):
        yield kernels.FusedConfig(*tile, 8, stages, parts)


def _fused_case(
    config: Any, direction: str, dtype: str, head: str, features: str, in_use: bool
) -> Case:
    from es2fast.ops.linear_kl import triton as kernels

    names = ("x_ptr", "w_ptr", "xt_ptr", "wt_ptr", "bt_ptr", "bs_ptr")
    signature = dict.fromkeys(names, f"*{dtype}") | {"stats_ptr": "*fp32"}
    strides = ("H", "HT", "stride_x", "stride_w", "stride_xt", "stride_wt", "cols_per_split")
    signature |= dict.fromkeys(("N", "V", *strides), "i32")
    signature |= dict.fromkeys(("gain", "cap_in", "cap_out"), "fp32")
    constants = dict(
        DIRECTION=kernels.DIRECTION[direction],
        SHARED=head == "shared",
        SOFTCAP="softcap" in features,
        HAS_BT="bias" in features,
        HAS_BS="bias" in features,
        EVEN_K="tail" not in features,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        PARTS=config.parts,
    )
    shape = f"{config.block_m}x{config.block_n}x{config.block_k}"
    shape += f" w{config.num_warps} s{config.num_stages} p{config.parts}"
    return Case(
        kernels.fused_kernel,
        f"fused {direction} {dtype} {head} {features} {shape}",
        signature,
        constants,
        config.num_warps,
        config.num_stages,
        config.max_registers,
        has_dot=True,
        in_use=in_use,
        aligned=strides if "odd-V" in features else ("N", "V", *strides),
        is_distinct=_is_distinct(dtype, features),
    )


def _moment_cases() -> Iterator[Case]:
    from es2fast.ops.moments import triton as kernels

    config = kernels.ROW_CONFIG
    signature = dict.fromkeys(("zs_ptr", "row_gain_ptr", "probs_ptr"), "*fp32")
    signature |= {"max_ptr": "*fp32", "sum_ptr": "*fp32", "ids_ptr": "*i32"}
    signature |= dict.fromkeys(("V", "pitch", "stride_g"), "i32")
    signature |= dict.fromkeys(("gain", "unit"), "fp32")
    options = itertools.product(("bf16", "fp16", "fp32"), (0, 16), ("", " bias", " bias odd-V"))
    for dtype, k, head in options:
        for need_grad in (True, False):
            name = f"moments {dtype} {k} anchors{head}"
            yield Case(
                kernels.moment_row_kernel,
                name if need_grad else f"{name} no-grad",
                signature | {"g_ptr": f"*{dtype}", "b_ptr": f"*{dtype}"},
                dict(
                    K=k,
                    BLOCK_K=max(1, k),
                    HAS_BIAS="bias" in head,
                    NEED_GRAD=need_grad,
                    BLOCK=config.block,
                    STAGES=config.stages,
                ),
                config.num_warps,
                3,
                config.max_registers,
                has_dot=False,
                in_use=True,
                aligned=("pitch", "stride_g", *(() if "odd" in head else ("V",))),
                is_distinct=_is_distinct(dtype, head),
            )


# --- separation -----------------------------------------------------------------------------------


def _separation_case(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    max_registers: int | None = None,
) -> Case:
    """Arguments not named in ``types`` or ``constants``: float32 pointers, else 32-bit integers."""
    signature = {}
    for argument in kernel.arg_names:
        if argument not in constants:
            is_pointer = argument.endswith("_ptr")
            signature[argument] = types.get(argument, "*fp32" if is_pointer else "i32")
    floats = {n: "fp32" for n in ("margin", "scale", "close") if n in signature}
    aligned = tuple(n for n in signature if n in ("H", "pitch") or n.startswith("stride_"))
    return Case(
        kernel, f"separation {name}", signature | floats, constants, warps, 3, max_registers,
        has_dot=False, in_use=True, aligned=aligned, is_distinct="fp16" not in name.split()[1:2],
    )  # fmt: skip


def _separation_cases() -> Iterator[Case]:
    from es2fast.ops.separation import triton as s

    for dtype, half in (("bf16", True), ("fp16", True), ("fp32", True), ("fp32", False)):
        name = f"{dtype}{' in fp16' if half else ''}"
        row, made = f"*{dtype}", "*fp16" if half else "*fp32"
        kinds = s.KIND if dtype in ("bf16", "fp32") else {"hinge": s.KIND["hinge"]}
        yield _separation_case(
            f"prepare {name}", s.prepare_kernel, {"x_ptr": row, "out_ptr": made},
            dict(HALF=half, BLOCK=s.PREPARE.block), s.PREPARE.num_warps,
        )  # fmt: skip
        yield _separation_case(
            f"finish {name}", s.finish_kernel, {"x_ptr": row},
            dict(ADD=True, BLOCK=s.FINISH.block), s.FINISH.num_warps,
        )  # fmt: skip
        for x, mask_only in ((row, True), (made, False)):
            yield _separation_case(
                f"column-sum {x[1:]} {name}", s.column_sum_kernel, {"x_ptr": x},
                dict(MASK_ONLY=mask_only, ROWS=s.SUM_ROWS, COLUMNS=s.SUM_COLUMNS, STEP=16), 4,
            )  # fmt: skip
        yield _separation_case(
            f"small-gradient {name}", s.small_gradient_kernel,
            {"own_ptr": row, "other_ptr": row},
            dict(ROWS=32, WIDTH=s.SMALL_WIDTH), 4,
        )  # fmt: skip
        for kind, number in kinds.items():
            yield from _separation_pair_cases(f"{kind} {name}", row, made, half, number)


def _separation_pair_cases(name: str, row: str, made: str, half: bool, kind: int) -> Iterator[Case]:
    from es2fast.ops.separation import triton as s

    rows = {"a_ptr": row, "b_ptr": row, "own_ptr": row, "other_ptr": row}
    flags = {"flag_ptr": "*i32"}
    for need_grad in (True, False):
        yield _separation_case(
            f"pairs {name}{'' if need_grad else ' no-grad'}", s.pair_kernel,
            rows | flags | {"q_ptr": made},
            dict(KIND=kind, HALF=half, NEED_GRAD=need_grad, BLOCK=s.PAIRS.block, WIDTH=s.WIDTH),
            s.PAIRS.num_warps, s.PAIRS.max_registers,
        )  # fmt: skip
    for by_column in (False, True):
        yield _separation_case(
            f"close {name}{' by column' if by_column else ''}", s.close_kernel, rows | flags,
            dict(KIND=kind, BY_COLUMN=by_column, BLOCK=s.CLOSE.block, WIDTH=s.WIDTH),
            s.CLOSE.num_warps,
        )  # fmt: skip
    yield _separation_case(
        f"small-pairs {name}", s.small_pairs_kernel, rows,
        dict(
            KIND=kind, NEED_GRAD=True, BLOCK_M=s.SMALL, WIDTH=s.SMALL_WIDTH, STAGES=s.SMALL_STAGES
        ), 4,
    )  # fmt: skip


def cases(capability: int, candidates: bool = False) -> list[Case]:
    """Every specialization in use at a capability (and, with ``candidates``, tuning ones)."""
    if candidates:
        return list(_fused_cases(capability, True))
    return [
        *_row_cases(),
        *_sharded_cases(),
        *_moment_cases(),
        *_fused_cases(capability, False),
        *_separation_cases(),
    ]


def compile_case(case: Case, capability: int) -> Report:
    """Compile one case for one capability and read its resource usage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in case.aligned]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=attrs)
    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    options |= {"enable_fp_fusion": True}  # as the launchers ask
    options |= {} if case.max_registers is None else {"maxnreg": case.max_registers}
    report = functools.partial(
        Report,
        label=case.label,
        capability=capability,
        in_use=case.in_use,
        kernel=case.kernel.fn.__name__,
        dtype=case.word("bf16", "fp16", "fp32"),
        direction=case.word("forward", "reverse", "jsd")
        or ("forward" if case.label.startswith("moments") else None),
    )
    try:
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # a configuration the compiler refuses is a result, not a crash
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return report(
            registers=0, spills=0, instructions_per_logit=None, barriers_per_tile=None,
            shared_bytes=0, tensor_core="", problem=text,
        )  # fmt: skip
    registers, spills = parse_resources(_cuobjdump(binary.asm["cubin"], "--dump-resource-usage"))
    per_logit, barriers = None, None
    if case.tile is not None:
        loops = parse_loops(_cuobjdump(binary.asm["cubin"], "--dump-sass"))
        if case.has_dot:
            loops = loops[:1]  # the outermost, over columns
        count = sum(loop.instructions for loop in loops)
        per_logit = round(count * 32 * case.num_warps / case.tile, 2)
        barriers = sum(loop.barriers for loop in loops)
    ptx = binary.asm["ptx"]
    core = TENSOR_CORE[capability] if TENSOR_CORE[capability] in ptx else ""
    shared = binary.metadata.shared
    problem = ""
    if spills:
        problem = f"spills {spills} bytes"
    elif shared > SHARED_LIMIT[capability]:
        problem = f"needs {shared} bytes of shared memory"
    elif case.has_dot and not core:
        problem = f"no {TENSOR_CORE[capability]} in its PTX"
    return report(
        registers=registers, spills=spills, instructions_per_logit=per_logit,
        barriers_per_tile=barriers, shared_bytes=shared, tensor_core=core, problem=problem,
    )  # fmt: skip


def _cuobjdump(cubin: bytes, option: str) -> str:
    """What the cuobjdump that Triton ships prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Loop:
    """Instructions and block-wide barriers of a loop, without those of loops within it."""

    instructions: int
    barriers: int


def parse_loops(sass: str) -> list[Loop]:
    """The loops of a kernel in cuobjdump's SASS, the largest spans first.

    A loop is what lies between a backward branch and its target; the branch to itself that ends
    every kernel is none, nor is the wait on a memory barrier (a few instructions of ``SYNCS``).
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)
    code = [(int(address, 16), text) for address, text in lines]
    spans = set()
    for address, text in code:
        found = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if found and (target := int(found[1], 16)) < address:
            body = [line for at, line in code if target <= at <= address]
            if not (len(body) < 16 and any("SYNCS" in line for line in body)):
                spans.add((target, address))
    loops = []
    for low, high in sorted(spans, key=lambda span: span[0] - span[1]):
        inner = [s for s in spans if s != (low, high) and low <= s[0] and s[1] <= high]
        own = [
            text
            for at, text in code
            if low <= at <= high and not any(a <= at <= b for a, b in inner)
        ]
        loops.append(Loop(len(own), sum("BAR.SYNC" in text for text in own)))
    return loops


def parse_resources(text: str) -> tuple[int, int]:
    """(registers per thread, stack + local bytes) from cuobjdump's ``--dump-resource-usage``."""
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--all", action="store_true", help="tuning candidates instead")
    parser.add_argument("--distinct", action="store_true", help="leave out float16 look-alikes")
    parser.add_argument("--sm", type=int, nargs="*", default=CAPABILITIES, choices=CAPABILITIES)
    parser.add_argument("--match", default="", help="only labels containing this")
    parser.add_argument("--json", type=Path, help="write one JSON row per case here")
    args = parser.parse_args()
    reports = []
    print(f"{'kernel':68} {'sm':>4} {'regs':>5} {'spill':>6} {'shared':>7} {'instr':>6}  core")
    for capability in args.sm:
        for case in cases(capability, args.all):
            if args.match not in case.label or (args.distinct and not case.is_distinct):
                continue
            r = compile_case(case, capability)
            reports.append(r)
            print(
                f"{r.label:68} {capability:>4} {r.registers:>5} {r.spills:>6} "
                f"{r.shared_bytes:>7} {r.instructions_per_logit or '':>6}  "
                f"{r.tensor_core} {r.problem}",
                flush=True,
            )
    if args.json:
        args.json.write_text("".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in reports))
    return int(any(r.problem and r.in_use for r in reports))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
