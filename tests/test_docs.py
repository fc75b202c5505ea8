"""The pages are true: their Python runs, their commands exist, their tables are complete, links lead on."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import typer.main

from longretriever import (
    EbrConfig,
    Market,
    MarketConfig,
    MindConfig,
    PginConfig,
    Store,
    TrainConfig,
    UlimConfig,
    index_model,
    ingest,
    train,
)
from longretriever.cli import app
from longretriever.market.feed import FeedConfig
from longretriever.model.config import VectorLearning
from longretriever.serve import wire
from longretriever.serve.app import create
from longretriever.serve.settings import Settings
from tests.serve.running import serving

ROOT = Path(__file__).parents[1]
SERVED = "http://127.0.0.1:8000"
"""Where a page says that a server is."""
PAGES = {
    str(page.relative_to(ROOT)): page.read_text() for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
}
GROUP = typer.main.get_command(app)
COMMANDS = {
    " ".join(filter(None, (name, inner))): command
    for name, group in GROUP.commands.items()  # type: ignore[attr-defined]
    for inner, command in getattr(group, "commands", {"": group}).items()
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def having(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


# -- Python


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """What a page may take as given: a log (`market/` and its files), a `store`, a `model` and its index."""
    path = tmp_path_factory.mktemp("prepared")
    Market(MarketConfig.of_size(5000, seed=2)).write(path / "market")
    files = {name: path / f"{name}.parquet" for name in ("events", "items", "users")}
    for name, file in files.items():
        shutil.copy(path / "market" / f"{name}.parquet", file)
    ingest(files["events"], path / "store", items=files["items"], users=files["users"])
    train(Store.open(path / "store"), path / "model", TrainConfig(dim=8, layers=1, epochs=1))
    index_model(path / "model")
    return path


@pytest.mark.parametrize("page", having("python"))
def test_the_python_of_a_page_runs(page, prepared, tmp_path, monkeypatch):
    """All blocks of a page, in their order, in one session."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {"__name__": "page"}
    asks = any(SERVED in block for block in blocks(page, "python"))
    with serving(prepared / "model", tmp_path) if asks else nullcontext() as server:
        for block in blocks(page, "python"):
            text = block.replace(SERVED, server.url) if server else block
            exec(compile(text, page, "exec"), session)


def test_the_page_about_the_market_says_everything(prepared):
    for field in dataclasses.fields(MarketConfig):
        assert f"`{field.name}`" in PAGES["docs/market.md"]
    for field in dataclasses.fields(FeedConfig):
        assert f"`{field.name}` {field.default}" in PAGES["docs/market.md"]


@pytest.mark.parametrize("script", [file.name for file in (ROOT / "examples").glob("*.py")])
def test_examples_run(script, tmp_path, monkeypatch, capsys):
    """Each has a `main(folder, events, seconds)`."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path / "work", events=3000, seconds=1)
    said = capsys.readouterr().out
    assert re.search(r"  1\. \w+ \d+ \(category \d+\)\n       \w+ \w+ \d+, \d+% alike", said)


# -- commands


def lines_of(page: str) -> list[str]:
    """What is typed in console blocks, joined where a line ends in a backslash; `$ ` tells it from output."""
    found = []
    for block in blocks(page, "console"):
        lines = block.replace("\\\n", " ").splitlines()
        typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found += typed or lines
    return found


def commands_of(page: str) -> list[str]:
    """`longretriever ...` of console blocks and in the text."""
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`(longretriever\s[^`]+)`", prose)]
    return [line for line in lines_of(page) if line.startswith("longretriever ")] + spans


def words_of(line: str) -> list[str]:
    """Without what the shell takes for itself."""
    words = shlex.split(line, comments=True)[1:]
    ends = [i for i, word in enumerate(words) if word in ("|", ">", "&&", ";", "2>")]
    return words[: ends[0]] if ends else words


def called(words: list[str]) -> tuple[str, list[str]]:
    """The name of the command, which may be of two words, and what follows; no name if there is none."""
    for n in (2, 1):
        if " ".join(words[:n]) in COMMANDS:
            return " ".join(words[:n]), words[n:]
    return "", words


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)])
def test_commands_and_options_exist(page):
    for line in commands_of(page):
        name, words = called(words_of(line))
        command, given = (COMMANDS[name], words) if name else (GROUP, words)
        assert command is not GROUP or words[0] == "COMMAND" or words[0].startswith("-"), f"{page}: {line}"
        known = {name for option in command.params for name in option.opts} | {"--help", "-h"}
        for word in given:
            assert not word.startswith("-") or word.split("=")[0] in known, f"{page}: {line}"


@pytest.mark.parametrize("page", having("console"))
def test_commands_in_console_blocks_can_be_given(page):
    """Their values are of the right type, and nothing that is required is missing."""
    for line in lines_of(page):
        if line.startswith("longretriever "):
            name, words = called(words_of(line))
            if name:
                COMMANDS[name].make_context(name, words)
        elif made := re.match(r"make (\w+)", line):
            assert re.search(rf"^{made[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_its_place_on_the_page(name):
    sections = re.split(r"^## ", PAGES["docs/cli.md"], flags=re.MULTILINE)
    (section,) = [s for s in sections if s.startswith(f"{name}\n")]
    assert f"$ longretriever {name} " in section, "an example"
    for option in COMMANDS[name].params:
        if option.param_type_name == "option" and option.name != "help":
            assert f"`{option.opts[0]}`" in section, f"{name} {option.opts[0]}"


def test_every_setting_of_training_and_its_default_is_on_the_page():
    for field in dataclasses.fields(TrainConfig):
        assert f"| `{field.name}` | `{said(field.default)}` |" in PAGES["docs/train.md"], field.name


@pytest.mark.parametrize("config", [PginConfig, EbrConfig, MindConfig, UlimConfig])
def test_every_setting_of_a_method_and_its_default_is_on_the_page(config):
    common = {field.name for field in dataclasses.fields(VectorLearning)}
    (section,) = re.findall(
        rf"field of `{config.__name__}`.*?(?=^## |\Z)", PAGES["docs/methods.md"], re.S | re.M
    )
    for field in dataclasses.fields(config):
        if field.name not in common:
            assert f"| `{field.name}` | `{said(field.default)}` |" in section, field.name


def said(default: object) -> str:
    return f"{type(default).__name__}()" if dataclasses.is_dataclass(default) else repr(default)


# -- links


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(str(found.resolve().relative_to(ROOT))), f"{page}: {target}"


# -- the wire


def test_every_field_and_path_of_the_service_is_on_its_page():
    page = PAGES["docs/serve.md"]
    for field in wire.RetrieveAsked.model_fields:
        assert f"`{field}`" in page or f"`{field}." in page, field
    for answer in (wire.Answer, wire.CandidateFound, wire.ContextAsked):
        for name in answer.__struct_fields__:
            assert f"`{name}`" in page, name
    for path in create(Settings("model")).openapi()["paths"]:
        assert re.sub(r"{\w+}", "{id}", path) in page, path
    for metric in ("requests", "refused", "fallbacks", "events", "reloads"):
        assert f"longretriever_{metric}_total" in page
