"""pytest tests/test_layers.py: imports point down only, as the layers say; names are kept."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Highest first. A file may import from lower layers and its own folder, never from its neighbours.
LAYERS = [
    ["cli"],
    ["quant.commands"],
    ["quant.progress", "quant.inspection", "quant.evaluation_text", "quant.roofline"],
    ["quant.pipeline", "quant.evaluate", "quant.bench", "quant.export"]
    + ["quant.convert", "quant.publishing"],
    ["quant.layer_loop", "quant.bit_choice"],
    ["quant.sensitivity", "quant.room"],
    ["quant.resume", "quant.follower", "quant.run_options", "quant.model_card", "quant.plan"]
    + ["quant.report_page", "quant.loader"],
    ["quant.peak_memory"],
    ["quant.linear", "quant.report", "quant.verification", "quant.contenders"]
    + ["quant.runtimes", "quant.group_solver", "quant.layer_inputs", "quant.workload"]
    + ["quant.slopes", "quant.own_windows", "quant.run_state", "quant.rounded"]
    + ["quant.rotated", "quant.equalized"],
    ["quant.solvers", "quant.formats", "quant.kernels"],
    ["quant.sources", "quant.layer_reader", "quant.fingerprint", "quant.partial", "quant.machine"]
    + ["quant.added_tokens", "quant.code_counts"],
    [
        "quant.grid",
        "quant.packing",
        "quant.runtime_rules",
        "quant.checkpoint",
        "quant.checkpoint_writer",
    ]
    + ["quant.output", "quant.geometry", "quant.stream_writer"],
    ["quant.config", "quant.llama", "quant.distributed", "calib", "quant.durable", "quant.units"],
    ["quant.watch", "quant.native", "quant.background"],
]


def unit_of(module: str) -> tuple[int, str] | None:
    """(layer, unit) of a module of ours."""
    for layer, units in enumerate(LAYERS):
        for unit in units:
            if module == unit or module.startswith(unit + "."):
                return layer, unit
    return None


def imports_of(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def forbidden(module: str, imported: str) -> bool:
    mine, theirs = unit_of(module), unit_of(imported)
    if mine is None or theirs is None or mine[1] == theirs[1]:
        return False
    if mine[1] in ("calib", "quant.llama", "quant.config", "quant.native"):
        return theirs[1] != "quant.native"  # compiled code is as deep as torch
    return theirs[0] <= mine[0]


def sources() -> list[tuple[str, Path]]:
    files = [ROOT / "cli.py", *ROOT.glob("quant/**/*.py"), *ROOT.glob("calib/**/*.py")]
    names = [
        (".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), f)
        for f in files
    ]
    return [
        (name, file)
        for name, file in names
        if not name.startswith("quant.bundled") and name != "quant"
    ]


def test_imports_point_down() -> None:
    edges = [
        (name, imported)
        for name, file in sources()
        for imported in imports_of(file)
        if forbidden(name, imported)
    ]
    assert not edges


def test_every_module_has_a_layer() -> None:
    assert [name for name, _ in sources() if unit_of(name) is None] == []


def test_a_wrong_edge_is_seen() -> None:
    assert forbidden("quant.grid", "quant.pipeline.quantize_checkpoint")
    assert forbidden("calib.hessian", "quant.grid.Grid")
    assert forbidden("quant.loader", "quant.pipeline.walk")
    assert not forbidden("quant.pipeline", "calib.capture.walk")


def test_calib_imports_torch_compiled_code_and_the_standard_library_only() -> None:
    allowed = {"torch", "calib", "datasets", "pyarrow", "__future__"}
    import sys

    for name, file in sources():
        if name.startswith("calib"):
            names = [i for i in imports_of(file) if not i.startswith("quant.native")]
            tops = {imported.split(".")[0] for imported in names}
            assert tops <= allowed | set(sys.stdlib_module_names), name


def test_a_submodule_does_not_shadow_the_function_of_its_name() -> None:
    child = "import quant.evaluate; from quant import evaluate; evaluate.__code__"
    subprocess.run([sys.executable, "-c", child], check=True, cwd=ROOT)
