"""The house's one-way rule and what the core abstains from, read from the source with `ast`; no module is imported here."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS = ("flows", "tasks", "deepfloyd_core")
TREES = {
    path.relative_to(ROOT): ast.parse(path.read_text()) for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))
}  # fmt: skip
CORE = {path: tree for path, tree in TREES.items() if path.parts[0] == "deepfloyd_core"}
# What the flows and tasks import before a job starts may not load these: 4 to 10 s, and gigabytes in the parent process.
HEAVY = ("torch", "diffusers", "transformers", "peft", "prefect", "matplotlib")


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of the modules that a file imports, at any depth, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(tree: ast.Module) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def called(tree: ast.Module) -> set[str]:
    return {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_each_layer_has_modules_and_leans_on_the_one_below() -> None:
    assert {path.parts[0] for path in TREES} == set(LAYERS)
    assert any("tasks" in roots(tree) for path, tree in TREES.items() if path.parts[0] == "flows")
    assert any("deepfloyd_core" in roots(tree) for path, tree in TREES.items() if path.parts[0] == "tasks")


def test_no_module_imports_a_layer_above_its_own_or_the_tests() -> None:
    above = {layer: {*LAYERS[: LAYERS.index(layer)], "tests"} for layer in LAYERS}
    assert not {path: found for path, tree in TREES.items() if (found := roots(tree) & above[path.parts[0]])}


def test_the_core_knows_neither_prefect_nor_a_command_line() -> None:
    barred = {"prefect", "typer", "click", "rich", "fastapi"}
    assert not {path: found for path, tree in CORE.items() if (found := roots(tree) & barred)}


def test_only_the_command_line_has_an_argument_parser() -> None:
    users = {path for path, tree in TREES.items() if "typer" in roots(tree) and path.parts[0] != "deepfloyd_core"}
    assert users and {path.parent for path in users} == {Path("flows/commands")}


def test_the_core_never_prints() -> None:
    assert not [path for path, tree in CORE.items() if "print" in called(tree)]


def test_the_core_and_the_tasks_never_read_the_environment() -> None:
    barred = {"os.environ", "os.getenv", "os.putenv", "os.environb"}
    for path, tree in TREES.items():
        if path.parts[0] != "flows":
            used = {dotted(node) for node in ast.walk(tree)} | set(imported(tree))
            assert not used & barred, path


def test_the_core_keeps_no_global_state() -> None:
    assert not [path for path, tree in CORE.items() if any(isinstance(node, ast.Global) for node in ast.walk(tree))]


def test_the_core_catches_only_errors_that_it_names() -> None:
    for path, tree in CORE.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno} bare except"
                caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                assert not {dotted(kind) for kind in caught} & {"Exception", "BaseException"}, f"{path}:{node.lineno}"


def test_a_logger_is_named_after_its_module() -> None:
    named = {}
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.Assign) and dotted(getattr(node.value, "func", node)) == "logging.getLogger":
                named[path] = ast.unparse(node.value)
    ours = {path: call for path, call in named.items() if "make" not in path.parts}  # a workshop with a log of its own
    assert len(ours) > 10 and set(ours.values()) == {"logging.getLogger(__name__)"}


def test_nothing_reads_a_pickle_or_runs_text_as_code() -> None:
    pickles = {"pickle", "cPickle", "dill", "shelve", "marshal", "cloudpickle", "joblib"}
    barred = {"torch.load", "eval", "exec", "np.load", "numpy.load", "os.system"}
    for path, tree in TREES.items():
        assert not roots(tree) & pickles, path
        assert not called(tree) & barred, path


def test_datasets_holds_no_code_that_could_pass_for_hugging_faces_package() -> None:
    assert not list((ROOT / "datasets").rglob("*.py"))


def test_what_the_flows_import_before_a_job_loads_no_model_library() -> None:
    """Of the core, outside of functions."""
    edge = [tree for path, tree in TREES.items() if path.parts[0] != "deepfloyd_core"]
    modules = {node.module for tree in edge for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    core = sorted(name for name in modules if name.startswith("deepfloyd_core."))
    assert "deepfloyd_core.store.artifacts" in core
    code = f"import sys, {', '.join(core)}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# ---- joints -----------------------------------------------------------------------------------------------------------

UNTYPED = re.compile(r"\bdict\[str, Any\]")
# What others define: values of users' files, arguments and state of libraries, columns that follow from a table.
FOREIGN = {
    "deepfloyd_core.config.base.parse_spec",
    "deepfloyd_core.config.run_file.ParsedRunFile",
    "deepfloyd_core.measures.upscaling.Row",
    "deepfloyd_core.models.same_output.output_change",
    "deepfloyd_core.training.optimizers.optimizer_state",
    "deepfloyd_core.training.optimizers.restore_optimizer",
    "deepfloyd_core.types.Json",  # what is stored, compared and printed as a whole
}


def signature(node: ast.AST) -> str:
    """What a function takes and returns, or what fields a class has."""
    if isinstance(node, ast.FunctionDef):
        return f"{ast.unparse(node.args)} -> {ast.unparse(node.returns) if node.returns else ''}"
    if isinstance(node, ast.ClassDef):
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")]
        return "\n".join([*map(ast.unparse, fields), *map(signature, methods)])
    return ast.unparse(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ""


def definitions() -> dict[str, str]:
    """The signature of every function, class and constant at the top of a module, by its full name."""
    found = dict[str, str]()
    for path, tree in TREES.items():
        module = ".".join(path.with_suffix("").parts)
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            found |= {f"{module}.{name}": signature(node) for name in names}
    return found


def room(module: str) -> str:
    """The room of a module of the core; of others the layer."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "deepfloyd_core" else parts[0]


def test_no_untyped_dict_crosses_a_room() -> None:
    """Whatever one room takes from another says what it is; `Json` is for what is stored and compared as a whole."""
    known, crossing = definitions(), set[str]()
    for path, tree in TREES.items():
        here = room(".".join(path.with_suffix("").parts))
        for name in imported(tree):
            if name in known and room(name) != here and UNTYPED.search(known[name]):
                crossing.add(name)
    assert crossing == FOREIGN


def test_modules_and_functions_are_small() -> None:
    """Of tests only the functions: a file has all promises of a module, a function one."""
    assert not [path for path in TREES if len((ROOT / path).read_text().splitlines()) > 350]
    tests = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}
    functions = [
        (path, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for path, tree in [*TREES.items(), *tests.items()]
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    assert not [found for found in functions if found[2] > 50]
