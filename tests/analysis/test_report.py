"""The report: one self-contained page that says what the analysis says, and its figures as PNG."""

import re
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import batches, inputs, tiny_model
from torch import nn
from tuning_cases import planted

import sq_cpu
from sq_cpu import Analysis, LayerPlan, Scheme, SmoothPlan, SqCpuError
from sq_cpu.analysis import figures, plots
from sq_cpu.analysis.report import Trial, pareto_front, report, scheme_text
from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.evaluated import EvaluatedConfiguration

_VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
_LOADING = {"script", "link", "iframe", "object", "embed", "base", "img", "audio", "video"}


class Page(HTMLParser):
    """Elements and text of a page; refuses what a browser would have to repair."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.cells: list[str] = []
        self.values: list[float] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), tag
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")
        if tag == "data":
            self.values.append(float(dict(attrs)["value"] or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "svg" in self.open:
            return
        self.text += data
        if {"th", "td"} & set(self.open):
            self.cells[-1] += data

    def ids(self) -> list[str]:
        return [str(a["id"]) for _, a in self.elements if "id" in a]


def analysis(
    scheme: str = "O3", change: Callable[[SmoothPlan], SmoothPlan] = lambda plan: plan
) -> Analysis:
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(3))
    plan = change(SmoothPlan.uniform(model, calibration, 0.8, ignore=("lm_head",)))
    return sq_cpu.analyze(model, calibration, plan, scheme=scheme)


def few(found: Analysis) -> Analysis:
    """Return an analysis of a layer or two: a report of it is quick."""
    return replace(found, groups=found.groups[:1])


def tuned(plan: SmoothPlan) -> SmoothPlan:
    """Make a plan in which every section has something to say."""
    groups = [
        replace(
            group,
            alpha=0.5 + 0.05 * index,
            clip=0.8,
            curve=tuple((0.1 * step, 1.0 + (step - 5) ** 2) for step in range(11)),
        )
        for index, group in enumerate(plan.groups)
    ]
    groups[1] = replace(groups[1], fold=False, note="model.layers.0.x is <odd>")
    kept = LayerPlan(name="model.layers.1.mlp.down_proj", in_float=True, note="0.3 % for 0.1 ms")
    return replace(plan, groups=tuple(groups), layers=(kept,))


TRIALS: list[Trial | dict[str, Any]] = [
    {"number": 0, "metric": 30.0, "loss_percent": 2.0, "milliseconds": 10.0, "float_layers": 0},
    {"number": 1, "metric": 29.6, "loss_percent": 0.5, "milliseconds": 12.0, "float_layers": ["a"]},
    {"number": 2, "metric": 29.9, "loss_percent": 1.5, "milliseconds": 13.0, "state": "complete"},
    {"number": 3, "metric": None, "state": "failed", "settings": {"rule": "<b>"}},
    Trial(number=4, metric=29.5, loss_percent=0.4, milliseconds=float("nan"), settings="alpha 1"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Analysis, Path]:
    found = analysis(change=tuned)
    path = tmp_path_factory.mktemp("report") / "all.html"
    assert report(path, found, name="a <b>&amp; $x$", trials=TRIALS) == path
    return found, path


def sections(page: Page) -> set[str]:
    return {str(a["aria-labelledby"]) for tag, a in page.elements if tag == "section"}


def test_the_page_is_self_contained(whole: tuple[Analysis, Path]) -> None:
    text = whole[1].read_text(encoding="utf-8")
    page = Page(text)
    assert not _LOADING & {tag for tag, _ in page.elements}
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", text.replace("<!DOCTYPE html>", ""))
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), value
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#")


def test_ids_are_unique_and_every_reference_has_its_target(whole: tuple[Analysis, Path]) -> None:
    text = whole[1].read_text(encoding="utf-8")
    page = Page(text)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]*)\)", text)
    references += [str(a["href"])[1:] for _, a in page.elements if str(a.get("href"))[0] == "#"]
    references += [str(a["aria-labelledby"]) for _, a in page.elements if "aria-labelledby" in a]
    assert references
    assert set(references) <= set(ids)


def test_light_and_dark(whole: tuple[Analysis, Path]) -> None:
    text = whole[1].read_text(encoding="utf-8")
    light, _, dark = text.partition("@media (prefers-color-scheme: dark)")
    for name, (of_light, of_dark) in figures.THEME.items():
        assert f"--{name}: {of_light};" in light
        assert f"--{name}: {of_dark};" in dark
    # Nothing that is drawn has a colour of its own that could vanish in one of them.
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert re.findall(r"(?:fill|stroke): (?!none|var)[^;\"]*", drawn) == []


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("mode", [0, 1])
def test_contrast(whole: tuple[Analysis, Path], mode: int) -> None:
    text = whole[1].read_text(encoding="utf-8")
    for background in ("page", "card"):
        behind = luminance(re.findall(rf"--{background}: (#\w+);", text)[mode])
        for name in ("ink", "muted", "before", "after"):
            pair = sorted((behind, luminance(figures.THEME[name][mode])))
            # WCAG 2, AA: 4.5 for text (links are "after"), 3 for what is drawn.
            needed = 3 if name == "before" else 4.5
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= needed, (name, background)


def test_every_picture_and_table_is_described(whole: tuple[Analysis, Path]) -> None:
    page = Page(whole[1].read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.elements]
    described = [a for tag, a in page.elements if tag == "div" and a.get("role") == "img"]
    assert len(described) == tags.count("figure") > 20
    assert all(len(str(a["aria-label"])) > 20 for a in described)
    assert all(a["scope"] in ("col", "row") for tag, a in page.elements if tag == "th")
    scrolling = [a for _, a in page.elements if a.get("class") == "scroll"]
    assert len(scrolling) == tags.count("table") == 4
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)
    assert ("html", {"lang": "en"}) in page.elements


def test_numbers_are_those_of_the_analysis(whole: tuple[Analysis, Path]) -> None:
    found, path = whole
    page = Page(path.read_text(encoding="utf-8"))
    expected: list[float] = [30.0, 2.0, 10.0, 29.6, 0.5, 12.0]  # the front first
    expected += [29.9, 1.5, 13.0, 29.5, 0.4]
    by_name = {one.name: one for one in found.linears}
    kept = by_name["model.layers.1.mlp.down_proj"]
    expected += [kept.error_naive, kept.error]
    for group in found.groups:
        expected += [0.0 if group.alpha is None else group.alpha, group.clip]
        expected += [group.severity, group.severity_smoothed, group.error_naive, group.error]
    for one in found.linears:
        expected += [one.error_naive, one.error, one.clipped]
        expected += [one.rows_clipped, one.rows_underflowed]
    shown = [value for value in page.values if not np.isnan(value)]
    assert shown == expected
    for name in (*by_name, *(group.name for group in found.groups), *found.kept):
        assert name in page.cells
    assert f"{100 * kept.error:.3g}\N{NO-BREAK SPACE}%" in page.cells
    # The summary: without the group whose only linear stays in float.
    facts = re.findall(r"<dt>(.*?)</dt><dd><strong>(.*?)</strong>", path.read_text())
    severities = (
        max(getattr(g, k) for g in found.groups) for k in ("severity", "severity_smoothed")
    )
    expected_facts = {
        "linears in int8": "13",
        "groups smoothed": "7 of 8",
        "alpha": "0.5 to 0.8",
        "largest outlier severity": "{:.3g} \N{RIGHTWARDS ARROW} {:.3g}".format(*severities),
    }
    for label, pick in (("output error, median", statistics.median), ("output error, worst", max)):
        int8 = [one for one in found.linears if not one.in_float]
        naive, planned = (100 * pick(getattr(x, k) for x in int8) for k in ("error_naive", "error"))
        expected_facts[label] = (
            f"{naive:.3g}\N{NO-BREAK SPACE}% \N{RIGHTWARDS ARROW} {planned:.3g}\N{NO-BREAK SPACE}%"
        )
    assert dict(facts) == expected_facts


def test_names_are_escaped(whole: tuple[Analysis, Path]) -> None:
    text = whole[1].read_text(encoding="utf-8")
    assert "<title>Quantization report: a &lt;b&gt;&amp;amp; $x$</title>" in text
    page = Page(text)
    assert "a <b>&amp; $x$" in page.text
    assert "1 group: model.layers.0.x is <odd>" in " ".join(page.text.split()).replace(".N.", ".0.")
    assert "rule <b>" in page.cells
    assert not {"b", "odd"} & {tag for tag, _ in page.elements}


def test_hostile_layer_names(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module('a<b>"$\\frac{#1b1f24}', nn.Linear(8, 8))
            self.add_module('id="x" --></svg><script>alert(1)</script>', nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for child in self.children():
                x = child(x)
            return x

    model = Odd()
    calibration = sq_cpu.calibrate(model, [torch.randn(9, 8)], ignore=())
    uniform = SmoothPlan.uniform(model, calibration)
    plan = replace(uniform, groups=(replace(uniform.groups[0], alpha=0.1), uniform.groups[1]))
    found = sq_cpu.analyze(model, calibration, plan, scheme=Scheme(ignore=()))
    page = Page(report(tmp_path / "odd.html", found).read_text(encoding="utf-8"))
    assert not _LOADING & {tag for tag, _ in page.elements}
    assert set(model._modules) <= set(page.cells)
    assert len(page.ids()) == len(set(page.ids()))
    assert all(path.parent == tmp_path / "odd_files" for path in tmp_path.rglob("*.png"))


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    path = report(tmp_path / "few.html", few(analysis("O1")))
    page = Page(path.read_text(encoding="utf-8"))
    assert sections(page) == {"summary", "channels", "worst", "errors", "float", "tables"}
    links = {str(a["href"])[1:] for tag, a in page.elements if tag == "a"}
    assert links == sections(page) - {"summary"}
    assert "Quantization report" in page.text
    assert not {"static clip", "note", "error if naive int8"} & set(page.cells)


def test_sections_with_data_are_there(whole: tuple[Analysis, Path]) -> None:
    page = Page(whole[1].read_text(encoding="utf-8"))
    more = {"alpha", "curves", "clips", "rows", "trials"}
    few = {"summary", "channels", "worst", "errors", "float", "tables"}
    assert sections(page) == few | more
    assert {"static clip", "note", "error if naive int8"} <= set(page.cells)


def test_nothing_left_in_float_and_no_front(tmp_path: Path) -> None:
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(3), ignore=())
    found = few(sq_cpu.analyze(model, calibration, scheme=Scheme(ignore=())))
    path = report(tmp_path / "r.html", found, trials=[{"number": 7, "state": "failed"}])
    page = Page(path.read_text(encoding="utf-8"))
    assert "float" not in sections(page)
    assert "No trial has both a loss and a latency." in page.text
    assert not list(tmp_path.rglob("*trials*"))


def test_pngs(whole: tuple[Analysis, Path]) -> None:
    files = sorted((whole[1].parent / "all_files").iterdir())
    page = Page(whole[1].read_text(encoding="utf-8"))
    assert len(files) == [tag for tag, _ in page.elements].count("figure")
    for path in files:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width == 740
        assert height > 150
        assert content[-8:-4] == b"IEND"


def test_the_same_input_gives_the_same_bytes(whole: tuple[Analysis, Path], tmp_path: Path) -> None:
    again = report(tmp_path / "all.html", whole[0], name="a <b>&amp; $x$", trials=TRIALS)
    assert again.read_bytes() == whole[1].read_bytes()
    for path in (tmp_path / "all_files").iterdir():
        assert path.read_bytes() == (whole[1].parent / "all_files" / path.name).read_bytes()


def test_pictures_of_an_earlier_report_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "png"
    found = few(analysis())
    path = report(tmp_path / "r.html", found, trials=TRIALS, png=folder)
    assert (folder / "sq_cpu-trials.png").exists()
    (folder / "own.png").write_bytes(b"mine")
    before = path.read_bytes()
    report(path, found, png=folder)
    assert path.read_bytes() != before
    assert not (folder / "sq_cpu-trials.png").exists()
    assert (folder / "own.png").read_bytes() == b"mine"
    assert not (tmp_path / "r_files").exists()


def test_what_fails_leaves_the_report_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    found = few(analysis())
    with pytest.raises(SqCpuError, match=r"not a trial: .*'loss'"):
        report(path, found, trials=[{"number": 1, "loss": 2}])
    (tmp_path / "file").write_text("")
    with pytest.raises(SqCpuError, match="cannot write to"):
        report(path, found, png=tmp_path / "file")
    assert path.read_text() == "old"
    with pytest.raises(SqCpuError, match="cannot write"):
        report(tmp_path / "nowhere" / "r.html", found, png=tmp_path / "png")


def test_evaluated_configurations_are_trials(tmp_path: Path) -> None:
    configuration = Configuration(activations="per_token")
    some = [
        EvaluatedConfiguration(
            configuration=configuration.changed([f"layer{k}" for k in range(count)], "float"),
            metric=metric,
            loss=loss,
            loss_percent=100 * loss,
            milliseconds=milliseconds,
            in_float=count,
            dynamic=7 - count,
            value=value,
            phase="search",
        )
        for count, metric, loss, milliseconds, value in (
            (0, 30.0, 0.02, 10.0, 1.5),
            (2, 29.6, 0.005, 12.0, 0.3),
        )
    ]
    failed = EvaluatedConfiguration(
        configuration=configuration, in_float=0, dynamic=7, value=2.0, error="NaN", phase="refine"
    )
    path = report(tmp_path / "r.html", few(analysis("O1")), trials=[*some, failed])
    page = Page(path.read_text(encoding="utf-8"))
    assert page.values[:6] == [30.0, 2.0, 10.0, 29.6, 0.5, 12.0]
    first = page.cells.index("complete")
    assert page.cells[first - 1] == "0"
    row = page.cells[page.cells.index("failed") - 1 :][:7]
    assert (row[0], row[2:6]) == ("2", ["", "", "", "0"])
    assert row[6].startswith("phase refine, activations per_token, ")
    assert row[6].endswith("per_token 7")


def test_pareto_front() -> None:
    trials = [Trial(**t) if isinstance(t, dict) else t for t in TRIALS]
    equal = Trial(number=9, loss_percent=2.0, milliseconds=10.0)
    assert [t.number for t in pareto_front([equal, *trials])] == [0, 1]
    assert pareto_front([Trial(number=1, loss_percent=1.0)]) == []


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(), "one activation scale per token"),
        (Scheme(reduce_range=True), "7-bit activations"),
        (Scheme(symmetric=False), "asymmetric"),
        (Scheme(weights="per_rows"), "per 64 output channels"),
        (Scheme(outlier_threshold=6.0), "reach 6 in float"),
        (Scheme(activations="static", static_range="percentile"), "percentile of 99.99 %"),
        (Scheme(activations="static", static_range="mse"), "static range by mse"),
    ],
)
def test_scheme_text(scheme: Scheme, words: str) -> None:
    assert words in scheme_text(scheme)


def test_models_of_many_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("whisper")
    calibration = sq_cpu.calibrate(model, inputs("whisper"), ignore=())
    found = sq_cpu.analyze(model, calibration, scheme=Scheme(ignore=()))
    monkeypatch.setattr(plots, "KINDS", 2)
    page = Page(report(tmp_path / "r.html", found).read_text(encoding="utf-8"))
    assert {one.name for one in found.linears} <= set(page.cells)
    groups, linears = ({layer.kind for layer in some} for some in (found.groups, found.linears))
    assert f"Of {len(groups)} kinds of group, the 2 with" in " ".join(page.text.split())
    assert f"Of {len(linears)} kinds of linear, the 2 with" in " ".join(page.text.split())
    names = {path.name for path in (tmp_path / "r_files").iterdir()}
    assert len({name for name in names if "activations" in name}) == 2
    assert len({name for name in names if "error" in name}) == 2


def test_heat_maps_keep_the_outliers() -> None:
    values = torch.ones(1000)
    values[[3, 998]] = torch.tensor([50.0, 70.0])
    image = plots._image([values, values / 2])
    assert image.shape == (2, 192)
    assert image.max() == 70
    assert sorted(image[0][image[0] > 1]) == [50, 70]
    assert plots._image([torch.arange(3.0), torch.arange(6.0)]).tolist() == [
        [0, 0, 1, 1, 2, 2],
        [0, 1, 2, 3, 4, 5],
    ]
    assert plots._image([torch.full((4,), float(row)) for row in range(300)])[-1].max() == 299


def test_matplotlib_is_loaded_late_and_left_alone() -> None:
    check = (
        "import sys, sq_cpu; assert 'matplotlib' not in sys.modules;"
        # Reading "backend" would itself import pyplot.
        "import matplotlib; of = matplotlib.rcParams; names = set(of) - {'backend'};"
        "before = {name: of[name] for name in names};"
        "from sq_cpu.analysis.figures import new_figure, picture_of\n"
        "with new_figure(2.0) as figure: picture_of(figure, 'x', 'x', 'x')\n"
        "assert {name: of[name] for name in names} == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
