"""How the method gets into mergekit: in fresh processes, as users start them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml
from processes import run
from safetensors.torch import save_file

import mergekit_karcher

WHICH = "print(get('karcher').spec.pretty_name or 'built-in')"


OURS = f"Karcher Mean (mergekit-karcher {mergekit_karcher.__version__})"
BUILTIN = "Karcher Mean"

WAYS_IN = {
    "merge_methods": "from mergekit.merge_methods import get",
    "torch first": "import torch; from mergekit.merge_methods import get",
    "ours first": "import mergekit_karcher; from mergekit.merge_methods import get",
    "ours whole first": "from mergekit_karcher import karcher_mean, register, KarcherMean\n"
    "from mergekit.merge_methods import get",
    "plan": "import mergekit.plan; from mergekit.merge_methods import get",
    "yaml": "import mergekit.scripts.run_yaml; from mergekit.merge_methods import get",
    "the module itself": "import mergekit.merge_methods.karcher\n"
    "from mergekit.merge_methods import get",
    "registered": "import mergekit_karcher; mergekit_karcher.register()\n"
    "from mergekit.merge_methods import get",
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_karcher_is_ours_whatever_is_imported_first(way):
    assert run(f"{WAYS_IN[way]}\n{WHICH}") == OURS


def test_the_switch_keeps_the_builtin_and_an_explicit_register_wins():
    assert run(f"{WAYS_IN['merge_methods']}\n{WHICH}", MERGEKIT_KARCHER="0") == BUILTIN
    assert run(f"{WAYS_IN['registered']}\n{WHICH}", MERGEKIT_KARCHER="0") == OURS


LATE = """
import mergekit.merge_methods as methods
from mergekit.merge_methods import get
import mergekit.scripts.run_yaml, mergekit.scripts.merge_raw_pytorch
assert get("karcher").spec.pretty_name == "Karcher Mean"
import mergekit_karcher
mergekit_karcher.register()
mergekit_karcher.register()
print([get(name).spec.name for name in ("karcher", "karcher_mean")])
import mergekit.merge_methods.karcher as karcher, mergekit.merge_methods.registry as registry
assert karcher.karcher_merge_method is registry.karcher_merge_method is get("karcher")
import mergekit.plan
print(hasattr(mergekit.plan.MergePlanner.plan_to_disk, "_mergekit_karcher_replaces"))
print(hasattr(mergekit.scripts.merge_raw_pytorch.plan_flat_merge, "_mergekit_karcher_replaces"))
"""


def test_register_after_mergekit_was_imported():
    lines = run(LATE + WHICH, TORCH_DEVICE_BACKEND_AUTOLOAD="0").splitlines()
    assert lines == ["['karcher', 'karcher_mean']", "True", "True", OURS]


def test_without_autoload_the_builtin_stays():
    code = f"{WAYS_IN['merge_methods']}\n{WHICH}"
    assert run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == BUILTIN


def test_a_spawned_process_has_it_too(tmp_path):
    code = """
import multiprocessing
def which(_):
    from mergekit.merge_methods import get
    return get("karcher").spec.pretty_name
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(which, [0])[0])
"""
    script = tmp_path / "spawned.py"
    script.write_text(code)
    assert run(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')") == OURS


def test_the_module_as_a_command_has_it_too():
    code = """
import runpy, sys
sys.argv = ["run_yaml", "--help"]
try:
    runpy.run_module("mergekit.scripts.run_yaml", run_name="__main__")
except SystemExit:
    from mergekit.merge_methods import get
"""
    assert run(code + WHICH).splitlines()[-1] == OURS


def test_mergekits_modules_look_untouched():
    code = """
import inspect, importlib, sys
import mergekit.merge_methods.karcher as karcher, mergekit.merge_methods.registry as registry
import mergekit.plan
for module in (karcher, registry, mergekit.plan):
    assert type(module.__loader__).__module__ == "_frozen_importlib_external", module.__loader__
    assert module.__spec__.loader is module.__loader__
    assert inspect.getsource(module)
importlib.reload(registry)
from mergekit_karcher.host import import_hooks
import_hooks.install(); import_hooks.install()
assert sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path) == 1
print(registry.get("karcher").spec.pretty_name)
"""
    assert run(code) == OURS


SOURCES = """
import importlib.resources, importlib.util, torch
for name in ("mergekit.plan", "mergekit.options", "mergekit.merge_methods.karcher"):
    spec = importlib.util.find_spec(name)
    assert "Copyright" in spec.loader.get_source(name)
    assert spec.loader.get_code(name).co_filename == spec.origin
    assert spec.loader.get_resource_reader(name) is not None
import runpy
print(sorted(set(runpy.run_module("mergekit.scripts.merge_raw_pytorch")) & {"plan_flat_merge"}))
"""


def test_a_hooked_modules_loader_answers_whatever_it_is_asked():
    assert run(SOURCES) == "['plan_flat_merge']"


DECORATED = """
import functools
import mergekit.plan
planner = mergekit.plan.MergePlanner
theirs = planner.plan_to_disk
@functools.wraps(theirs)
def decorated(self, out_path):
    return theirs(self, out_path)
planner.plan_to_disk = decorated
import mergekit_karcher
from mergekit_karcher.host import compat
mergekit_karcher.register()
mergekit_karcher.register()
print(planner.plan_to_disk is not decorated, compat.original(planner.plan_to_disk) is decorated)
"""


def test_a_decorator_of_others_is_not_taken_for_ours():
    assert run(DECORATED, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "True True"


def test_importing_us_alone_imports_neither_torch_nor_mergekit():
    code = """
import sys, mergekit_karcher, mergekit_karcher.host.import_hooks
heavy = {"torch", "mergekit", "numpy", "click"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
import mergekit_karcher.sphere.solver
print("torch" in sys.modules)
import mergekit_karcher.means.karcher
print("mergekit" in sys.modules)
"""
    assert run(code).splitlines() == ["[]", "False", "False"]


def test_the_import_test_can_fail():
    """The check above sees an import when there is one."""
    code = "import sys, torch, mergekit_karcher; print('torch' in sys.modules)"
    assert run(code) == "True"


COMMAND = """
import sys
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name={name!r})
sys.argv = [{name!r}, {config!r}, {out!r}, *{options!r}]
sys.exit(script.load()())
"""


@pytest.mark.parametrize("name", ["mergekit-yaml", "mergekit-pytorch", "mergekit-multi"])
def test_installed_commands_check_names_and_sum_up(name, three_models, tmp_path):
    """As their console scripts do, one of which is what imports torch first."""
    models = three_models
    if name == "mergekit-pytorch":
        models = [str(tmp_path / f"{index}.safetensors") for index in range(2)]
        for path in models:
            save_file({"w": torch.rand(3)}, path)
    config = {"merge_method": "karcher", "models": [{"model": model} for model in models]}
    options = ["--no-copy-tokenizer"]
    if name == "mergekit-multi":
        options += ["-I", str(tmp_path / "stages"), "--out-path"]
    path, out = tmp_path / "c.yml", tmp_path / "out"

    def outcome():
        path.write_text(yaml.safe_dump(config))
        arguments = {"config": str(path), "out": str(out), "options": options}
        if name == "mergekit-multi":
            arguments = {
                "config": str(path),
                "out": options[0],
                "options": [*options[1:], str(out)],
            }
        code = COMMAND.format(name=name, **arguments)
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
        )

    good = outcome()
    assert good.returncode == 0, good.stderr
    assert "karcher out: " in good.stderr
    assert "could not take its place" not in good.stderr
    config["parameters"] = {"weigth": 2}
    bad = outcome()
    if name != "mergekit-multi":  # which skips stages that are there
        assert bad.returncode == 1
        assert bad.stderr.splitlines()[-1] == (
            "Error: Unknown parameter weigth of the config for karcher: did you mean weight?"
        )


def test_a_planner_imported_before_torch_is_watched_too():
    code = """
import mergekit.plan, mergekit.merge
print(hasattr(mergekit.plan.MergePlanner.plan_to_disk, "_mergekit_karcher_replaces"))
"""
    assert run(code) == "True"


def test_programs_without_torch_see_no_trace():
    code = "import sys; print([n for n in sys.modules if 'karcher' in n], len(sys.meta_path))"
    bare = [sys.executable, "-S", "-c", code]
    expected = subprocess.run(bare, capture_output=True, text=True, check=True).stdout.split()[0]
    assert run(code).split("]")[0] + "]" == expected == "[]"


def test_install_never_raises():
    """An exception in it would break `import torch` for every program."""
    code = """
import sys
from mergekit_karcher.host import import_hooks
class Broken(list):
    def insert(self, *_): raise RuntimeError("no")
    def __iter__(self): raise RuntimeError("no")
path, sys.meta_path = sys.meta_path, Broken()
import_hooks.install()
sys.meta_path = path
print("survived")
"""
    assert run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == "survived"


MISFIT = """
import importlib.metadata, logging
true = importlib.metadata.version
importlib.metadata.version = lambda name: "{version}" if name == "mergekit" else true(name)
{break_it}
from mergekit.merge_methods import get, merge_state_dicts
import torch
a, b = {{"w": torch.ones(2)}}, {{"w": torch.zeros(2)}}
print(merge_state_dicts([a, b], "linear", parameters={{"weight": 1}})["w"].tolist())
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main
import sys
for name in ("karcher", "karcher_mean"):
    open("{config}", "w").write("merge_method: " + name + "\\nmodels: [{{model: {model}}}]")
    result = CliRunner().invoke(main, ["{config}", "{out}"])
    print(result.exit_code, result.output.splitlines()[-1])
import mergekit_karcher
try: mergekit_karcher.register()
except mergekit_karcher.KarcherError as error: print(error)
"""


BREAK = """
import sys
class Moved:
    def find_spec(self, name, path=None, target=None):
        if name == "mergekit_karcher.host.methods":
            raise ImportError("cannot import name 'ParameterSpec'")
sys.meta_path.insert(0, Moved())
"""


@pytest.mark.parametrize(
    ("version", "break_it", "reason"),
    [
        ("0.1.4", "", "mergekit 0.1.4 (it was written for mergekit >= 0.1.5, < 0.2)"),
        ("0.2.0", "", "mergekit 0.2.0 (it was written for mergekit >= 0.1.5, < 0.2)"),
        ("1.0", "", "mergekit 1.0 (it was written for mergekit >= 0.1.5, < 0.2)"),
        ("0.1.9", BREAK, "mergekit 0.1.9 (ImportError: cannot import name 'ParameterSpec')"),
    ],
)
def test_a_mergekit_that_does_not_fit(version, break_it, reason, three_models, tmp_path):
    """Other methods work; a karcher config stops with one sentence, never with the built-in."""
    code = MISFIT.format(
        version=version,
        break_it=break_it,
        config=tmp_path / "c.yml",
        out=tmp_path / "out",
        model=three_models[0],
    )
    linear, first, second, late = run(code).splitlines()
    assert linear == "[0.5, 0.5]"
    for line, name in ((first, "karcher"), (second, "karcher_mean")):
        assert line.startswith(f"1 Error: merge_method: {name} cannot run: mergekit-karcher")
        assert reason in line
        assert "install a mergekit that fits" in line
    assert reason in late
    assert not (tmp_path / "out").exists()
