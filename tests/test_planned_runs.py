"""Merges as values: planned side by side, and refused where mergekit is not the one we know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from configs import config_for
from conftest import llama, weights_of
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from processes import run
from safetensors.torch import save_file
from test_merges import assert_stopped

from mergekit_karcher import KarcherError, karcher_mean
from mergekit_karcher.host import compat
from mergekit_karcher.host.tasks import MergeTensor


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two float32 models."""
    folder = tmp_path_factory.mktemp("planned")
    return [llama(folder / name, seed, dtype=torch.float32) for seed, name in enumerate("ab")]


def planned(config, out):
    """The tasks of a merge, as `mergekit.merge.run_merge` plans them."""
    options = MergeOptions(quiet=True)
    parsed = MergeConfiguration.model_validate(config)
    LoaderCache().setup(options)
    model_config = parsed.referenced_models()[0].config()
    architecture = get_architecture_info(parsed, options)
    planner = MergePlanner(parsed, architecture, options, out_model_config=model_config)
    return planner.plan_to_disk(str(out))


def test_two_merges_planned_before_either_runs_keep_their_results_apart(
    models, tmp_path, monkeypatch
):
    all_weights = {"first": [1.0, 3.0], "second": [5.0, 1.0]}
    plans = {}
    for name, weights in all_weights.items():
        monkeypatch.setenv("MERGEKIT_KARCHER_REPORT", str(tmp_path / f"{name}-report"))
        plans[name] = planned(config_for(models, weights), tmp_path / name)
    tensor = "model.layers.1.mlp.up_proj.weight"
    inputs = [weights_of(model)[tensor] for model in models]
    runs = {}
    for name, tasks in plans.items():
        for _ in Executor(tasks).run(quiet=True):
            pass
        (runs[name],) = {
            task.tensor_task.run
            for task in tasks
            if isinstance(getattr(task, "tensor_task", None), MergeTensor)
        }
        merged, mean = karcher_mean(inputs, all_weights[name])
        assert torch.equal(weights_of(tmp_path / name)[tensor], merged)
        report = json.loads((tmp_path / f"{name}-report" / "report.json").read_text())
        (found,) = [part for part in report["tensors"] if part["name"] == tensor]
        assert found["coefficients"] == pytest.approx(mean.coefficients.tolist(), rel=1e-12)
    summaries = {name: next(run.lines()) for name, run in runs.items()}
    assert summaries["first"].startswith("karcher first: 30 tensors merged")
    assert summaries["second"].startswith("karcher second: 30 tensors merged")


def test_a_metric_that_changes_is_read_anew(models, merge, tmp_path):
    generator = torch.Generator().manual_seed(3)
    inputs = [weights_of(model) for model in models]
    metrics = [tmp_path / f"g{index}" for index in range(2)]
    for metric in metrics:
        metric.mkdir()
    tensor = "model.layers.1.mlp.up_proj.weight"
    found = []
    for power in (1, 30):
        for metric in metrics:
            values = {
                n: torch.rand(t.shape, generator=generator) ** power for n, t in inputs[0].items()
            }
            save_file(values, metric / "model.safetensors")
        config = config_for(models, metrics=[str(m) for m in metrics], merge_method="fisher")
        found.append(merge(config, name=f"power{power}").weights[tensor])
        exact = [weights_of(metric)[tensor].double() for metric in metrics]
        exact = [m + 1e-6 * m.mean() for m in exact]
        expected = sum(m * i[tensor].double() for m, i in zip(exact, inputs, strict=True))
        torch.testing.assert_close(found[-1].double(), expected / sum(exact), rtol=1e-6, atol=1e-9)
    assert not torch.equal(*found)


def test_a_planning_method_that_we_do_not_know_cannot_merge_a_whole_model(
    models, merge, monkeypatch
):
    """What is merged tensor by tensor is the same either way."""
    expected = merge(config_for(models, [1, 2]), name="expected").weights
    monkeypatch.setattr(MergePlanner, "plan_to_disk", compat.original(MergePlanner.plan_to_disk))
    found = merge(config_for(models, [1, 2]), name="plain").weights
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for granularity in ("model", [{"filter": "mlp", "value": "row"}, {"value": "model"}]):
        outcome = merge(config_for(models, granularity=granularity), name="whole")
        assert_stopped(outcome, "needs the whole plan of a merge", "take granularity: tensor")
    metrics = ["identity", "identity"]
    outcome = merge(config_for(models, metrics=metrics), name="metric")
    assert_stopped(outcome, "call mergekit_karcher.karcher_mean with tensors and metrics")


MOVED = """
import mergekit.plan, mergekit.merge_methods.registry as registry
{move}
import mergekit_karcher
for _ in range(2):
    try: mergekit_karcher.register()
    except mergekit_karcher.KarcherError as error: print(error)
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main
import mergekit.merge_methods
for name in ("karcher", "karcher_mean", "fisher", "linear"):
    try: print(name, bool(registry.get(name).spec.parameters))
    except Exception as error: print(error)
    try: mergekit.merge_methods.get(name).validate_inputs([1])
    except Exception as error: print(error)
"""

MOVES = {
    "a planning method": (
        "mergekit.plan.MergePlanner.plan_everything = mergekit.plan.MergePlanner.plan_to_disk\n"
        "del mergekit.plan.MergePlanner.plan_to_disk",
        "mergekit has no mergekit.plan.MergePlanner.plan_to_disk any more",
    ),
    "a task": (
        "import mergekit.io.tasks as tasks\ndel tasks.LoadTensor._resolve_name",
        "mergekit has no mergekit.io.tasks.LoadTensor._resolve_name any more",
    ),
    "the registry": (
        "table = registry._METHODS\ndel registry._METHODS\nregistry.get = lambda name: table[name]",
        "mergekit has no mergekit.merge_methods.registry._METHODS any more",
    ),
}


@pytest.mark.parametrize("case", MOVES)
def test_a_mergekit_whose_parts_have_moved_is_refused(case):
    move, words = MOVES[case]
    lines = run(MOVED.format(move=move), TORCH_DEVICE_BACKEND_AUTOLOAD="0").splitlines()
    assert len(lines) == 2 + 4 * 2 - 1
    for line in lines[:2]:
        assert line.startswith("merge_method: karcher cannot run")
        assert words in line
    for line, name in zip(lines[3:9:2], ("karcher", "karcher_mean", "fisher"), strict=True):
        assert line.startswith(f"merge_method: {name} cannot run")
        assert words in line
    assert lines[-1] == "linear True"


def test_the_check_of_what_we_use_of_mergekit_passes_and_can_fail(monkeypatch):
    compat.check(*compat._REQUIRED)
    monkeypatch.setitem(compat._REQUIRED, "mergekit.options", ["MergeOptions.nothing", "nobody"])
    with pytest.raises(
        KarcherError, match=r"no mergekit\.options\.MergeOptions\.nothing, .*nobody"
    ):
        compat.check("mergekit.plan", "mergekit.options")


def test_a_program_that_merges_and_fails_leaves_the_next_merge_alone(models, tmp_path, capsys):
    """Nothing of a merge that stopped is in the run of the next."""
    broken = {name: torch.full_like(t, torch.nan) for name, t in weights_of(models[1]).items()}
    folder = Path(tmp_path / "broken")
    folder.mkdir()
    for file in Path(models[1]).iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
    options = MergeOptions(quiet=True)
    first = MergeConfiguration.model_validate(config_for([models[0], str(folder)]))
    with pytest.raises(KarcherError, match="is not finite"):
        run_merge(first, str(tmp_path / "stopped"), options)
    config = config_for(models)
    second = MergeConfiguration.model_validate(config)
    run_merge(second, str(tmp_path / "whole"), options, config_source=yaml.safe_dump(config))
    tensor = "model.norm.weight"
    expected, _ = karcher_mean([weights_of(model)[tensor] for model in models])
    assert torch.equal(weights_of(tmp_path / "whole")[tensor], expected)
