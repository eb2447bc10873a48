"""report.html as a person sees it: opened in a real Chromium."""

from __future__ import annotations

import math
import shutil
from html.parser import HTMLParser

import pytest
import yaml
from click.testing import CliRunner
from configs import config_for
from playwright.sync_api import sync_playwright

from mergekit_karcher.cli.main import main
from mergekit_karcher.report import store
from mergekit_karcher.report.apart import plain
from mergekit_karcher.report.html import write_html
from mergekit_karcher.report.page import Chart, Section, Table, write_page

CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def folder(close_models, tmp_path_factory):
    """The report on three models around a base, written by the command."""
    folder = tmp_path_factory.mktemp("html")
    base, *models = close_models
    config = folder / "config.yml"
    config.write_text(yaml.safe_dump(config_for(models, base=base, origin="base")))
    arguments = ["report", str(config), "--out", str(folder / "seen"), "--quiet"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    return folder / "seen"


@pytest.fixture(scope="module")
def browser():
    paths = [path for name in CHROMIUM if (path := shutil.which(name))]
    # Without one of these it is the browser that `playwright install` has put on the machine.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=paths[0] if paths else None)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Open a file; at the end nothing else was loaded, and nothing was complained of."""
    loaded, wrong = [], []

    def open_file(path, width=1100, **settings):
        page = browser.new_page(viewport={"width": width, "height": 800}, **settings)
        page.set_default_timeout(10_000)
        page.on("request", lambda request: loaded.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(path.as_uri())
        loaded.remove(path.as_uri())
        return page

    yield open_file
    for context in browser.contexts:
        context.close()
    assert loaded == []
    assert wrong == []


def charts(page, section):
    """The charts under a heading."""
    return (
        page.locator("section")
        .filter(has=page.get_by_role("heading", name=section))
        .locator(".chart")
    )


def shown_over(chart, row, column, shape):
    """What a heat map of that shape shows when the mouse is over a cell."""
    chart.scroll_into_view_if_needed()
    box = chart.locator(".heatmaplayer image").bounding_box()
    x = box["x"] + box["width"] * (column + 0.5) / shape[1]
    y = box["y"] + box["height"] * (row + 0.5) / shape[0]
    chart.page.mouse.move(x, y)
    label = chart.locator(".hoverlayer .hovertext text.nums")
    label.wait_for()
    return label.text_content()


def test_the_file_names_nothing_that_a_browser_loads(folder):
    named = []

    class Loads(HTMLParser):
        def handle_starttag(self, tag, attrs):
            named.extend((tag, name, value) for name, value in attrs if name in ("src", "href"))

        def handle_data(self, data):
            if self.cdata_elem == "style" and ("url(" in data or "@import" in data):
                named.append(("style", data))

    text = (folder / "report.html").read_text(encoding="utf-8")
    Loads().feed(text)
    assert named == []
    assert "default-src 'none'" in text


def test_all_of_a_report_is_drawn(folder, opened):
    page, report = opened(folder / "report.html"), store.read(folder)
    for title in (
        "Angle between two models, on average, by layer and module",
        "Angle between every two models, on average",
        "Length that plain averaging loses, by layer and module",
    ):
        assert charts(page, title).locator(".heatmaplayer image").count() == 2
    assert page.locator(".chart svg.main-svg").count() >= 6
    words = page.locator("body").inner_text()
    assert report.verdict in words
    assert "1 tune1, 2 tune2, 3 tune3, 4 base (base)" in words
    rows = page.get_by_role("table").first.locator("tbody tr")
    assert rows.count() == len(report.kinds) + 1
    for chart in page.locator(".chart").all():
        assert chart.locator(".xtitle").text_content() in ("layer", "model, by its number")
        assert chart.locator(".ytitle").text_content() in ("kind of module", "model")
        assert chart.locator(".cbtitle").text_content() in ("degrees", "% of the length")


def test_under_the_mouse_there_is_the_tensor_its_layer_and_its_angle(folder, opened):
    page, report = opened(folder / "report.html"), store.read(folder)
    chart = charts(page, "Angle between two models, on average, by layer").first
    kinds = [kind.kind for kind in report.kinds]
    shape = len(kinds), 4
    tensors = {tensor.name: tensor for tensor in report.tensors}
    angles = {
        name: plain(math.degrees(sum(tensor.view("zero").pairs(3)) / 3))
        for name, tensor in tensors.items()
    }
    up = "model.layers.1.mlp.up_proj.weight"
    shown = shown_over(chart, kinds.index("up"), 2, shape)
    assert shown == f"{up}up, layer 1{angles[up]} degrees"
    shown = shown_over(chart, kinds.index("norms"), 3, shape)
    for name in ("input_layernorm", "post_attention_layernorm"):
        name = f"model.layers.2.{name}.weight"
        assert f"{name}: {angles[name]} degrees" in shown
    shown = shown_over(chart, kinds.index("head"), 0, shape)
    assert shown == f"lm_head.weighthead, outside the layers{angles['lm_head.weight']} degrees"


def test_the_page_is_as_light_or_dark_as_the_system_until_the_button_is_pressed(folder, opened):
    page = opened(folder / "report.html", color_scheme="dark")

    def wait_until_all_is(paper):
        page.wait_for_function(
            """(paper) => {
                const plots = document.querySelectorAll(".chart .main-svg:first-child");
                return plots.length === 6 && [document.body, ...plots].every(
                    (element) => getComputedStyle(element).backgroundColor === paper);
            }""",
            arg=paper,
        )

    dark, light = "rgb(17, 17, 17)", "rgb(255, 255, 255)"
    wait_until_all_is(dark)
    page.emulate_media(color_scheme="light")
    wait_until_all_is(light)
    page.get_by_role("button", name="Light or dark").click()
    wait_until_all_is(dark)
    page.emulate_media(color_scheme="dark")
    page.emulate_media(color_scheme="light")
    wait_until_all_is(dark)


def test_on_a_narrow_screen_only_charts_and_tables_are_moved_sideways(folder, opened):
    page = opened(folder / "report.html", width=360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for figure in page.locator("figure").all():
        figure.evaluate("(element) => element.scrollTo(element.scrollWidth, 0)")
        cells = figure.locator(".heatmaplayer image").bounding_box()
        assert cells["width"] > 150
        assert cells["x"] + cells["width"] < 360


HOSTILE = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"


def test_names_with_html_are_text(folder, tmp_path, opened):
    report = store.read(folder)
    names = [HOSTILE, "<b>bold</b>", "a&lt;b", "base"]
    models = [m.model_copy(update={"name": n}) for m, n in zip(report.models, names, strict=True)]
    name = f"model.layers.1.{HOSTILE}.up_proj.weight"
    tensors = [
        t.model_copy(update={"name": name}) if t.name.endswith("1.mlp.up_proj.weight") else t
        for t in report.tensors
    ]
    changed = report.model_copy(update={"models": models, "tensors": tensors})
    write_html(changed, tmp_path / "report.html")
    page = opened(tmp_path / "report.html")
    assert f"1 {HOSTILE}, 2 <b>bold</b>, 3 a&lt;b" in page.locator("body").inner_text()
    kinds = [kind.kind for kind in report.kinds]
    chart = charts(page, "Angle between two models").first
    assert shown_over(chart, kinds.index("up"), 2, (len(kinds), 4)).startswith(name)
    chart = charts(page, "Angle between every two models").first
    assert shown_over(chart, 1, 2, (4, 4)).startswith("<b>bold</b>a&lt;b")
    labels = chart.locator(".ytick text").all_text_contents()
    assert {"b> (2)", "a&lt;b (3)"} <= set(labels)
    assert page.title() == "Geometry of this merge"
    assert page.locator("img, body b").count() == 0


def test_any_sentences_charts_and_tables_make_a_page(tmp_path, opened):
    from plotly.graph_objects import Figure, Scatter

    scores = Figure(Scatter(x=["<linear>", "karcher"], y=[1.5, 1.25]))
    table = Table("Bits & bytes", ["method", "bits"], [["linear", "1.5"], ["<karcher>", "1.25"]])
    sections = [
        Section("First", ["It is < 2.", "It is > 1."]),
        Section("Second", charts=[Chart("Bits <b>", scores)], tables=[table]),
    ]
    write_page(tmp_path / "page.html", "A & B", sections)
    page = opened(tmp_path / "page.html")
    assert page.title() == "A & B"
    assert page.locator("h2").all_inner_texts() == ["First", "Second"]
    assert page.locator("p").all_inner_texts() == ["It is < 2.", "It is > 1."]
    assert page.locator("caption, figcaption").all_inner_texts() == ["Bits <b>", "Bits & bytes"]
    assert page.locator(".scatterlayer .trace").count() == 1
    cells = page.locator("tbody tr").last.locator("th, td")
    assert cells.all_inner_texts() == ["<karcher>", "1.25"]
