"""What becomes of a comparison: its page, and the card of the merge that it chose."""

from __future__ import annotations

from html import escape

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from configs import config_for
from conftest import assert_error

from mergekit_karcher.cli.main import main
from mergekit_karcher.compare.html import _figure
from mergekit_karcher.compare.result import read
from mergekit_karcher.compare.words import sentences


@pytest.fixture(scope="module")
def compared(close_models, tmp_path_factory):
    """The folder of a comparison of two configs on two texts."""
    folder = tmp_path_factory.mktemp("compared")
    base, *models = close_models
    configs = {
        "plain": config_for(models, merge_method="linear", weights=[1, 1, 1]),
        "changes": config_for(models, base=base, origin="base"),
    }
    words = ["compare"]
    for name, config in configs.items():
        (folder / f"{name}.yml").write_text(yaml.safe_dump(config))
        words.append(str(folder / f"{name}.yml"))
    for seed, name in enumerate(("prose", "<b>code")):
        numbers = np.random.default_rng(seed).integers(60, size=600)
        (folder / f"{seed}.txt").write_text(" ".join(f"w{number}" for number in numbers))
        words += ["--data", f"{name}={folder / str(seed)}.txt"]
    words += ["--out", str(folder / "out"), "--windows", "2", "--length", "16", "--quiet"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return folder / "out"


def test_the_page_says_all_and_shows_every_value(compared):
    """Of plotly's figure, as the page holds it; that pages are drawn test_report_html.py shows."""
    comparison = read(compared)
    page = (compared / "compare.html").read_text()
    assert "<b>code" not in page
    for sentence in sentences(comparison):
        assert escape(sentence) in page
    figure = _figure(comparison)
    assert len(figure.data) == len(comparison.texts) + 1
    for trace, text in zip(figure.data, comparison.texts, strict=False):
        assert escape(text.name) in trace.hovertemplate
        for name, value in zip(trace.y, trace.customdata, strict=True):
            assert value == comparison.entry(name).reporting.rates[text.name]


def test_a_card_says_what_was_compared_with_which_result(compared, close_models, merge, cli):
    config = yaml.safe_load((compared / "best.yml").read_text())
    out = merge(config).out
    assert cli("report", "--out", out / "geometry", config=config).exit_code == 0
    result = CliRunner().invoke(main, ["card", str(out), "--comparison", str(compared)])
    assert result.exit_code == 0, result.output
    card = (out / "README.md").read_text()
    comparison = read(compared)
    for sentence in sentences(comparison):
        assert f"- {sentence}" in card
    for entry in comparison.entries:
        assert f"{entry.reporting.mean:.3f}" in card
    assert str(compared) not in card


def test_a_card_takes_no_comparison_of_other_merges(compared, close_models, merge, cli):
    base, *models = close_models
    config = config_for(models, base=base, origin="base", magnitude="geometric")
    out = merge(config).out
    assert cli("report", "--out", out / "geometry", config=config).exit_code == 0
    result = CliRunner().invoke(main, ["card", str(out), "--comparison", str(compared)])
    assert_error(result, "No merge of the comparison in")


def test_a_text_that_no_model_is_better_at_than_the_base_is_named(compared):
    comparison = read(compared)
    one, other = comparison.models[-2:]
    base = one.model_copy(update={"kind": "base", "name": "start"})

    def said(gains):
        """On the second text a model gains that over the base."""
        rates = dict(base.reporting.rates)
        rates["<b>code"] -= gains
        reporting = base.reporting.model_copy(update={"rates": rates})
        model = other.model_copy(update={"kind": "model", "reporting": reporting})
        entries = [*comparison.merges, base, model]
        lines = sentences(comparison.model_copy(update={"entries": entries}))
        return [line for line in lines if line.startswith("No model alone is better")]

    assert [line.partition(":")[0].partition(" on ")[2] for line in said(0.1)] == ["prose"]
    assert len(said(-0.1)) == 2
    assert not any(line.startswith("No model alone") for line in sentences(comparison))
