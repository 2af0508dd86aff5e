"""The pages in docs/: their snippets run, their links resolve, their reference is complete."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from byte_models import byte_model, byte_tokenizer, save_float
from command_line import TEXT, run
from recipes import write_recipe
from sample_files import write_images, write_model, write_pairs, write_sound

import sq_cpu

sys.path.append(str(Path(__file__).parent / "serving"))
from servers import save_int8, serving

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
AT = "http://127.0.0.1:8000"
"""Where the pages say that a server is."""

_FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^\n]+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_SHOWN = {"text", "json"}
_XEON_RUN = "from sq_cpu_xeon_run import main; main()"
# What makes a command quick, where the page does not say it; the tiny model has 1024 positions.
_QUICK = {
    "--windows": ("4", {"quantize", "tune", "autotune", "eval"}),
    "--window": ("64", {"quantize", "tune", "autotune", "eval"}),
    "--text-windows": ("4", {"autotune"}),
    "--max-new-tokens": ("8", {"generate"}),
}


@dataclass(frozen=True)
class Block:
    """A snippet of a page: what the tests run of it."""

    page: str
    line: int
    language: str
    text: str
    why_not: str | None
    """Why it is not run."""


def blocks(page: Path) -> list[Block]:
    content = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(content):
        line = content.count("\n", 0, match.start("text")) + 1
        found.append(Block(page.name, line, match["language"], match["text"], match["why"]))
    return found


def make_int8(folder: Path) -> None:
    """Save a model in int8, static, with rows of a calibration."""
    model, tokenizer = byte_model(), byte_tokenizer()
    batches = sq_cpu.token_windows(tokenizer, TEXT, window=64, windows=4)
    sq_cpu.quantize(model, sq_cpu.calibrate(model, batches), scheme="O3")
    sq_cpu.save(model, folder / "OUT", tokenizer)


def make_plan(folder: Path) -> None:
    model = byte_model()
    batches = sq_cpu.token_windows(byte_tokenizer(), TEXT, window=64, windows=4)
    plan = sq_cpu.SmoothPlan.uniform(model, sq_cpu.calibrate(model, batches), alpha=0.5)
    plan.save(folder / "PLAN.json")


# What a page begins with, where it says so: <!-- given: OUT, PLAN.json -->
MAKERS: dict[str, Callable[[Path], object]] = {
    "OUT": make_int8,
    "PLAN.json": make_plan,
    **{
        each.upper(): lambda folder, name=name, each=each: write_model(name, folder / each.upper())
        for each, name in {
            "encoder": "bert",
            "reranker": "cross-encoder",
            "whisper": "whisper",
            "vit": "vit",
            "clip": "clip",
        }.items()
    },
    "pairs.tsv": lambda folder: write_pairs(folder / "pairs.tsv"),
    "recordings": lambda folder: write_sound(folder / "recordings"),
    "images": lambda folder: write_images(folder / "images"),
    "best_configure.json": lambda folder: write_recipe(
        folder / "best_configure.json", byte_model()
    ),
}


@dataclass
class Page:
    """Runs the snippets of one page in order: Python in one namespace, all in one folder."""

    folder: Path
    port: int | None
    names: dict[str, Any]

    def run(self, block: Block) -> None:
        if block.language == "python":
            # Lines count as in the page, so that a traceback leads there.
            code = "\n" * (block.line - 1) + self.here(block.text)
            exec(compile(code, str(DOCS / block.page), "exec"), self.names)
        else:
            for line in block.text.replace("\\\n", " ").splitlines():
                self.command(shlex.split(self.here(line), comments=True))

    def here(self, text: str) -> str:
        return text if self.port is None else text.replace(AT, f"http://127.0.0.1:{self.port}")

    def command(self, words: list[str]) -> None:
        match words:
            case []:
                pass
            case ["sq-cpu", command, *rest]:
                quick = [
                    word
                    for option, (value, commands) in _QUICK.items()
                    if command in commands and option not in rest
                    for word in (option, value)
                ]
                run(command, *rest, *quick)
            case ["xeon-run", *rest]:  # it would become the command: see what it would do
                command = [sys.executable, "-c", _XEON_RUN, "--dry-run", *rest]
                assert b"cores: " in subprocess.run(command, check=True, capture_output=True).stdout
            case ["curl", *_]:
                answer = subprocess.run(words, check=True, capture_output=True, text=True)
                assert answer.stdout
            case _:
                pytest.fail(f"nothing here runs {words[0]}: say why, <!-- not run: REASON -->")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what a linear takes here is measured once for all pages."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def page(
    request: pytest.FixtureRequest, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Page]:
    """A folder with a float model, a text, and what else the page asks for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    save_float(tmp_path / "MODEL")
    (tmp_path / "text.txt").write_text(TEXT)
    content = (DOCS / request.param).read_text(encoding="utf-8")
    given = re.search(r"^<!-- given: (.+) -->$", content, re.MULTILINE)
    port = None
    with ExitStack() as stack:
        for name in given[1].split(", ") if given else ():
            if name == "server":
                port = stack.enter_context(serving(save_int8(tmp_path / "OUT"))).port
            else:
                MAKERS[name](tmp_path)
        yield Page(tmp_path, port, {"__name__": "__main__"})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.filterwarnings("ignore:.*torchvision")
@pytest.mark.parametrize("page", [path.name for path in PAGES], indirect=True)
def test_snippets(page: Page, request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    for block in blocks(DOCS / request.node.callspec.params["page"]):
        if block.language in _SHOWN or block.why_not:
            continue
        assert block.language in ("python", "bash"), f"{block.page}:{block.line}"
        print(f"docs/{block.page}:{block.line}")  # shown where it fails
        page.run(block)


def test_few_snippets_are_not_run() -> None:
    every = [block for page in PAGES for block in blocks(page) if block.language not in _SHOWN]
    skipped = [block for block in every if block.why_not]
    assert len(every) > 40
    assert len(skipped) < len(every) / 5, skipped
    shown = sum(page.read_text(encoding="utf-8").count("\n```") for page in PAGES)
    assert shown == 2 * sum(len(blocks(page)) for page in PAGES)
    # A reason that stands elsewhere than before a snippet would be about nothing.
    reasons = sum(page.read_text(encoding="utf-8").count("<!-- not run") for page in PAGES)
    assert reasons == len(skipped)


def test_snippets_fit_the_page() -> None:
    """A window of 1280 pixels shows 76 columns beside the two lists of contents."""
    assert [
        f"{block.page}:{block.line}"
        for page in PAGES
        for block in blocks(page)
        if max(map(len, block.text.splitlines())) > 76
    ] == []


@pytest.mark.parametrize("name", ["python", "bash"])
def test_a_broken_snippet_fails(name: str, tmp_path: Path) -> None:
    text = {"python": "no_such_name\n", "bash": "sq-cpu info --no-such-option\n"}[name]
    page = Page(tmp_path, None, {})
    with pytest.raises((NameError, AssertionError)):
        page.run(Block("x.md", 1, name, text, None))


def _templates() -> Iterator[str]:
    """Each text of the sources, with … for what is put into it."""
    for path in (ROOT / "sq_cpu").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [
                str(part.value) if isinstance(part, ast.Constant) else "…"
                for part in parts
                if isinstance(part, ast.Constant | ast.FormattedValue)
            ]
            if texts:
                yield "".join(texts)


def test_errors_are_those_of_the_code() -> None:
    headings = re.findall(r"^### (.+)$", (DOCS / "errors.md").read_text("utf-8"), re.MULTILINE)
    templates = " \n ".join(_templates())
    assert len(headings) > 40
    assert [heading for heading in headings if heading not in templates] == []


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md"))
    assert sorted(re.findall(r"^::: sq_cpu\.(\w+)$", pages, re.MULTILINE)) == sorted(sq_cpu.__all__)


class _Links(HTMLParser):
    """What a page of the site refers to, and what can be referred to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value for key, value in attrs if value is not None}
        self.anchors.update(values[key] for key in ("id", "name") if key in values)
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        for key in ("src", "href"):
            if tag != "a" and key in values and values.get("rel") != "canonical":
                self.loaded.add(values[key])


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs (the extra docs) is not installed")
def test_the_site_builds_whole(tmp_path: Path) -> None:
    """It is strict, refers to nothing that is not there, and loads nothing from elsewhere."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {path: _Links(path) for path in site.rglob("*.html")}
    assert len(pages) >= len(PAGES)
    broken = []
    for path, page in pages.items():
        assert not [link for link in page.loaded if urlsplit(link).netloc], path
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchors = pages[target].anchors if target in pages else set()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_readme_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of the README, one after another."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(save_float(tmp_path / "float"), tmp_path / "path/to/model")
    linear = torch.nn.Linear(64, 64)
    quantized = sq_cpu.QuantLinear.from_float(linear, sq_cpu.Scheme.of("O1"))
    names: dict[str, Any] = {"linear": linear, "up": quantized, "down": quantized}
    names |= {"x": torch.randn(2, 64), "residual": torch.randn(2, 64)}
    page = Page(tmp_path, None, names)
    every = [block for block in blocks(ROOT / "README.md") if block.language == "python"]
    assert len(every) >= 3
    for block in every:
        names["model"] = byte_model()  # in float again
        page.run(block)
    assert names["y"].shape == (2, 64)
