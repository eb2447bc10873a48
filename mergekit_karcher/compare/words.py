"""A comparison for people: what came of it in sentences, its table, and the config to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from mergekit_karcher.compare.candidates import Candidate
from mergekit_karcher.compare.noise import Difference
from mergekit_karcher.compare.result import Comparison, Entry, Score, difference
from mergekit_karcher.report.page import Table


def show(comparison: Comparison, console: Console) -> None:
    """Print the sentences and the table."""
    caption, head, rows = table(comparison)
    shown = RichTable(box=box.SIMPLE_HEAD, caption=caption)
    for place, title in enumerate(head):
        shown.add_column(escape(title), justify="right" if place else "left", overflow="fold")
    for entry, row in zip(_entries(comparison), rows, strict=True):
        style = "bold" if entry.kind == "merge" and entry.name == comparison.chosen else None
        shown.add_row(*map(escape, row), style=style)
    console.print(shown)
    for line in sentences(comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def table(comparison: Comparison) -> Table:
    """A row for each merge and model, the best merge first."""
    head, *rows = _rows(comparison)
    return Table(_caption(comparison), head, rows)


def markdown_table(comparison: Comparison) -> str:
    """The same as Markdown."""
    caption, head, rows = table(comparison)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for entry, row in zip(_entries(comparison), rows, strict=True):
        is_chosen = entry.kind == "merge" and entry.name == comparison.chosen
        lines.append(f"| {' | '.join(f'**{cell}**' if is_chosen else cell for cell in row)} |")
    return "\n".join([*lines, "", caption])


def markdown(comparison: Comparison, chart: str | None) -> str:
    """All of it as Markdown; chart: the file of the picture, if there is one."""
    lines = ["# Which merge?", "", *(f"{line}\n" for line in sentences(comparison))]
    lines += [markdown_table(comparison), ""]
    if chart is not None:
        lines += [f"![Differences to {comparison.reference}]({chart})", ""]
    packages = ", ".join(f"{name} {number}" for name, number in comparison.versions.items())
    lines += [f"Judged in {comparison.dtype} on {comparison.device}, by {packages}."]
    return "\n".join(lines) + "\n"


def sentences(comparison: Comparison) -> Iterator[str]:
    """What came of it, the most important first."""
    chosen, best = comparison.entry(comparison.chosen), comparison.entry(comparison.best)
    yield f"Take {chosen.name}: {_compared(comparison, chosen)}."
    if best is not chosen:
        sizes = {text.name: text.choosing for text in comparison.texts}
        worse = difference(chosen.choosing.costs, best.choosing.costs, sizes)
        yield (
            f"{best.name} was best on the windows to choose by, but not by more than noise "
            f"({_signed(comparison, worse)}), and {chosen.name} is simpler."
        )
    alone = min(comparison.models, key=lambda entry: entry.reporting.mean)
    if alone.reporting.mean <= chosen.reporting.mean:
        yield (
            f"{alone.name} alone is better than that "
            f"({_cell(comparison, alone.reporting.mean)}): a merge may not be worth it."
        )
    for text in _not_learned(comparison):
        yield (
            f"No model alone is better than the base on {text}: keep it if a merge must not forget "
            "such text; otherwise give text of the kind, and in the language, that the models "
            "were trained for."
        )
    for entry in comparison.merges:
        if entry.tuned:
            numbers = [f"{one.name} from {one.before:g} to {one.value:g}" for one in entry.tuned]
            tries = sum(one.evaluations for one in entry.tuned)
            yield (
                f"{entry.name}: {', '.join(numbers)}, tuned in {tries} tries on the windows to "
                "choose by."
            )
    counts = [f"{len(t.choosing)} and {len(t.reporting)} of {t.name}" for t in comparison.texts]
    yield (
        f"Chosen on other windows than those that the table reports: {', '.join(counts)}, of up to "
        f"{comparison.length} tokens."
    )
    whys = dict.fromkeys(left_out.why for left_out in comparison.left_out)
    for why in whys:
        names = "; ".join(one.name for one in comparison.left_out if one.why == why)
        yield f"Left out ({why.rstrip('.')}): {names}."


def _not_learned(comparison: Comparison) -> Iterator[str]:
    """Texts on which every model alone is at best as good as the base."""
    base = next((entry for entry in comparison.models if entry.kind == "base"), None)
    if base is None:
        return
    alone = [entry for entry in comparison.models if entry.kind == "model"]
    for text in comparison.texts:
        if all(one.reporting.rates[text.name] >= base.reporting.rates[text.name] for one in alone):
            yield text.name


def config_text(comparison: Comparison, candidate: Candidate) -> str:
    """The config to take, with what is known of it as comments."""
    comments = "".join(f"# {line}\n" for line in sentences(comparison))
    return f"{comments}{yaml.safe_dump(dict(candidate.config), sort_keys=False)}"


def _compared(comparison: Comparison, chosen: Entry) -> str:
    """The chosen merge beside the reference, on the reporting windows."""
    value = _cell(comparison, chosen.reporting.mean)
    unit = "bits per byte" if comparison.measure == "bits per byte" else "% of errors"
    if chosen.name == comparison.reference:
        return f"{value} {unit}, and nothing that was tried is better by more than noise"
    against = Difference(chosen.reporting.difference or 0.0, chosen.reporting.error or 0.0)
    return (
        f"{value} {unit} on average, {_signed(comparison, against)} against {comparison.reference}"
    )


def _entries(comparison: Comparison) -> list[Entry]:
    return [*comparison.merges, *comparison.models]


def _rows(comparison: Comparison) -> list[Sequence[str]]:
    """The heading, and a row for each merge and model."""
    texts = [text.name for text in comparison.texts]
    rows: list[Sequence[str]] = [["", *texts, "mean", "worst", f"to {comparison.reference}"]]
    for entry in _entries(comparison):
        name = entry.name if entry.kind == "merge" else f"{entry.name} ({_ALONE[entry.kind]})"
        rows.append([name, *_numbers(comparison, entry, entry.reporting)])
    return rows


_ALONE = {"base": "the base", "model": "alone"}


def _numbers(comparison: Comparison, entry: Entry, score: Score) -> Iterator[str]:
    for text in comparison.texts:
        yield _cell(comparison, score.rates[text.name])
    yield _cell(comparison, score.mean)
    yield _cell(comparison, score.worst)
    if entry.kind == "merge" and entry.name == comparison.reference:
        yield ""
    else:
        yield _signed(comparison, Difference(score.difference or 0.0, score.error or 0.0))


def _cell(comparison: Comparison, value: float) -> str:
    return f"{value:.3f}" if comparison.measure == "bits per byte" else f"{100 * value:.1f}"


def _signed(comparison: Comparison, value: Difference) -> str:
    if comparison.measure == "bits per byte":
        return f"{value.value:+.3f} ± {value.error:.3f}"
    return f"{100 * value.value:+.1f} ± {100 * value.error:.1f}"


def _caption(comparison: Comparison) -> str:
    unit = "Bits per byte" if comparison.measure == "bits per byte" else "Errors in per cent"
    return (
        f"{unit} on the windows to report by, less is better; the best on the windows to choose by "
        "come first. ± is one standard error over windows."
    )
