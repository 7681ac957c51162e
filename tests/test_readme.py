"""The README cannot rot: what it names exists, what it shows is there, and its figures are those of the committed files."""
import csv
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
MODULES = ("scan", "mamba2_ref", "tesa", "lingen", "sample", "train_tiny")


def section(title):
    return README.split(f"### {title}\n", 1)[1].split("\n#", 1)[0]


def test_every_function_and_test_of_the_papers_table_exists():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section("From the paper to the line").splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 10
    for _, here, proof in rows:
        module = None
        for name in re.findall(r"`([\w.]+)`", here):
            module, *path = name.split(".") if name.split(".")[0] in MODULES else [module, *name.split(".")]
            thing = importlib.import_module(module)
            for part in path:
                assert hasattr(thing, part), f"{name} is not in {module}.py"
                thing = getattr(thing, part)
        for name in re.findall(r"`([\w./]+)`", proof):
            assert (ROOT / name).exists() if "/" in name else f"def {name}(" in TESTS, f"{name} does not exist"


def test_choices_name_switches_that_exist():
    text = section("Where the paper is silent")
    fields = importlib.import_module("lingen").LinGenConfig.__dataclass_fields__
    for line in [line for line in text.splitlines() if line.startswith("|")][2:]:
        for name in re.findall(r"`([\w.]+)`", line.strip("|").split("|")[-1]):
            parts = name.split(".")
            if parts[0] in MODULES:
                thing = importlib.import_module(parts[0])
                for part in parts[1:]:
                    thing = getattr(thing, part)
            elif len(parts) == 2:
                assert hasattr(getattr(importlib.import_module("lingen"), parts[0]), parts[1]), name
            else:
                assert name in fields or name in importlib.import_module("sample").LIMITS or any(hasattr(importlib.import_module(m), name) for m in MODULES) or f"self.{name} = " in (ROOT / "mamba2_ref.py").read_text(), name


def test_every_exercise_has_its_solution():
    numbers = re.findall(r"^\| (\d+) \|", section("Exercises"), re.M)
    solved = re.findall(r"^def test_(\d+)_", (ROOT / "tests" / "test_exercises.py").read_text(), re.M)
    assert numbers and sorted(numbers, key=int) == sorted(solved, key=int)


def test_pictures_and_files_are_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README) + re.findall(r"`((?:benchmarks|tests|assets)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("script", [script for script in ("sample.py", "train_tiny.py", *(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")))
                                    if re.search(rf"{script}[^\n`#]* --", README)])
def test_options_in_the_commands_exist(script):
    known = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for line in re.findall(rf"{script}[^\n`#]*", README):
        for option in re.findall(r"(?<= )--[a-z-]+", line):
            assert re.search(rf"{option}\b", known), option


def test_figures_of_the_tables_are_those_of_the_committed_files():
    """Each table that a script printed names its CSV in a comment; every number of the file's columns stands in it."""
    tables = re.findall(r"<!-- from ([\w/.]+) columns ([\w ,]+) -->\n((?:\|.*\n)+)", README)
    assert tables
    for path, columns, table in tables:
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()][2:]
        with open(ROOT / path, newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(lines), path
        for row, cells in zip(rows, lines):
            wanted = [row[name.strip()] for name in columns.split(",")]
            assert cells[: len(wanted)] == wanted, (path, wanted, cells)
