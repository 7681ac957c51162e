"""README and docs cannot rot: what they name exists, and their figures are those of the files."""

import importlib
import inspect
import json
import re
import runpy
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch

import lingen
import sample
import train_tiny
from docs import tables
from docs.notebook import cells
from toy import shapes

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {path: path.read_text(encoding="utf-8") for path in FILES}
README, ALL = PAGES[ROOT / "README.md"], "\n".join(PAGES.values())
TOUR, CHOICES = PAGES[ROOT / "docs/tour.md"], PAGES[ROOT / "docs/choices.md"]
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def find(name):
    """The thing that `module.thing` names in a lesson. AttributeError if there is none."""
    module, *path = name.split(".")
    thing = importlib.import_module(module)
    for part in path:
        thing = getattr(thing, part)
    return thing


def help_of(monkeypatch, capsys, script):
    name = script[:-3].replace("/", ".")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    return capsys.readouterr().out


def test_the_papers_table_names_functions_tests_and_what_the_toy_uses():
    table, called = rows(section(TOUR, "From the paper to the line")), set()
    run = train_tiny.Run(lingen.preset("tiny"), dict(steps=1, seed=0, rate=0), torch.device("cpu"))
    sys.setprofile(lambda frame, event, argument: called.add(frame.f_code))
    run.advance()
    sample.sample(run.average, torch.ones(1, 1).long(), (2, 24, 24), steps=1)
    sys.setprofile(None)
    assert len(table) >= 12
    for _, here, tested, used in table:
        for name in re.findall(r"`([\w.]+)`", here):
            thing = getattr(find(name), "forward", find(name))
            thing = inspect.getclosurevars(thing).nonlocals.get("form", thing)  # of a scan
            uses = used == "yes" or name in used or "--" in used  # an option uses it otherwise
            assert uses == (thing.__code__ in called), name
        for name in re.findall(r"`(\w+)`", tested):
            assert f"def {name}(" in TESTS, name


def test_switches_of_the_choices_exist(monkeypatch, capsys):
    options = help_of(monkeypatch, capsys, "sample.py")
    fields = lingen.LinGenConfig.__dataclass_fields__
    table = rows(section(CHOICES, "Where the paper is silent"))
    for row in table + rows(section(CHOICES, "What the toy needs")):
        for name in re.findall(r"`([^`]+)`", row[-1]):
            if name.startswith("--"):
                assert name in options, name
            elif "/" in name:
                assert (ROOT / name).exists(), name
            elif name not in fields:
                find(name)


def test_every_exercise_has_its_solution():
    numbers = [row[0] for row in rows(section(TOUR, "Exercises"))]
    solved = re.findall(r"def test_(\d+)_", (ROOT / "tests/test_exercises.py").read_text())
    assert numbers == solved and len(numbers) == 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, heading = target.partition("#")
        if path.startswith("http"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert heading in [title.lower().replace(" ", "-") for title in titles], heading
    for name in re.findall(r"`((?:benchmarks|tests|docs|assets|toy)/[\w./-]+)`", PAGES[page]):
        assert (ROOT / name).exists(), name


SCRIPTS = sorted(set(re.findall(r"python ((?:benchmarks/|docs/)?\w+\.py)", ALL)))


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "tests" not in script])
def test_options_in_the_commands_exist(monkeypatch, capsys, script):
    commands = re.findall(rf"{script}[^\n`#]*", ALL)
    options = {option for line in commands for option in re.findall(r" (--[a-z-]+)", line)}
    known = help_of(monkeypatch, capsys, script) if options else ""
    assert not {option for option in options if not re.search(rf"{option}\b", known)}


def test_options_of_the_kernel_judge_exist():
    known = (ROOT / "tests/conftest.py").read_text()
    for line in re.findall(r"test_kernel\.py[^\n`#]*", ALL):
        assert all(f'"{option}"' in known for option in re.findall(r" (--[a-z0-9-]+)", line)), line


def test_parts_are_swapped_as_told():
    swaps = re.findall(r"--set ([\w=.,()-]+)", ALL)
    swaps += re.findall(r'`"?(\w+=[^`\s"]+)"?`', section(README, "Swap a part, and train it"))
    assert len(swaps) >= 9
    for swap in swaps:
        if swap != "NAME=VALUE":
            lingen.LinGen(lingen.preset("tiny", **dict([train_tiny.setting(swap)])))


def test_captions_are_known_and_all_words_are_told():
    for caption in re.findall(r'"(a [a-z -]+)"', ALL):
        sample.encode([caption], shapes.WORDS)
    words = sum(shapes.WORDS.values(), [])
    assert set(words) <= set(re.findall(r"[a-z-]+", section(README, "Sample")) + ["a", "moving"])


def test_tables_are_those_of_the_committed_files():
    page = PAGES[ROOT / "docs/experiments.md"]
    assert len(tables.TABLE.findall(page)) >= 4
    assert tables.filled(page) == page, "run: python docs/tables.py"
    ratio = re.search(r"\| 512 \| 68 \| .* ([\d.]+) \|", page)[1]
    assert f"| {float(ratio):.1f} x" in README


def test_the_notebook_has_the_cells_of_its_script():
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    script = cells((ROOT / "docs" / "tour.py").read_text(encoding="utf-8"))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]] == script
    assert all(cell["outputs"] for cell in notebook["cells"][2:] if cell["cell_type"] == "code")


def test_the_script_of_the_notebook_runs(monkeypatch, tmp_path, capsys):
    shown = []
    module = types.SimpleNamespace(Image=lambda **given: given, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setenv("TOUR_STEPS", "2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(ROOT / "docs")
    runpy.run_path("tour.py")
    assert len(shown) == 8 and "% right of 2" in capsys.readouterr().out
