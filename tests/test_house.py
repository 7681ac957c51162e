"""The house rules: lessons are short and narrow, and imports go one way."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = dict(scan=105, mamba2_ref=430, tesa=150, lingen=280, sample=418, train_tiny=330)
TOTAL, README, TESTS, COLUMNS = 1708, 250, 3000, 100
LESSONS = list(LINES)  # in reading order
PAPER = LESSONS[:4]  # the lessons that are the paper
IMPORTS = dict(scan=[], mamba2_ref=[], tesa=[], lingen=LESSONS[:3], sample=PAPER)
IMPORTS |= dict(train_tiny=[*LESSONS[:5], "toy"], toy=["toy"])  # of this repository
OPTIONAL = ["mamba_ssm", "matplotlib", "triton"]  # found at run time, never required
TOP = [
    *(f"{name}.py" for name in LESSONS), "README.md", "LICENSE", "requirements.txt",
    "pyproject.toml", ".gitignore", ".ci", "assets", "benchmarks", "docs", "tests", "toy",
]  # fmt: skip


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def count(path):
    return len(read(path).splitlines())


def tracked():
    """The files that git tracks; without git, the Python files and the README."""
    if shutil.which("git"):
        git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        files = [Path(line) for line in git.stdout.splitlines() if (ROOT / line).exists()]
        if files:
            return files
    files = [path for pattern in ("*.py", "*.md", "*/*.py") for path in ROOT.glob(pattern)]
    return [path.relative_to(ROOT) for path in files]


def imports(tree):
    """(line number, top-level package) of each import below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "toy" if node.level else node.module.split(".")[0]


def test_lessons_keep_to_their_lines():
    lines = {name: count(f"{name}.py") for name in LESSONS}
    for name in LESSONS:
        assert lines[name] <= LINES[name], f"{name}.py has {lines[name]}, at most {LINES[name]}"
    assert sum(lines.values()) <= TOTAL, f"lessons have more than {TOTAL} lines: {lines}"


def test_readme_keeps_to_its_lines():
    assert count("README.md") <= README, f"README.md has {count('README.md')} lines"
    told = re.findall(r"\| `(\w+)\.py` \| (\d+) \|", read("README.md"))
    assert told == [(name, str(count(f"{name}.py"))) for name in LESSONS]


def test_tests_keep_to_their_lines():
    """The judge of kernels, its options, its broken kernels and its adapters do not count."""
    lines = {path.name: count(path) for path in ROOT.glob("tests/*.py")}
    total = sum(n for name, n in lines.items() if not re.search("kernel|peers|conftest", name))
    assert total <= TESTS, f"tests have {total} lines, at most {TESTS}: {lines}"


def test_no_line_is_wider_than_100_columns():
    files = [path for path in tracked() if path.suffix == ".py" and path.parts[0] != "benchmarks"]
    lines = [(f"{p}:{i}", line) for p in files for i, line in enumerate(read(p).split("\n"), 1)]
    wide = [f"{place} has {len(line)} columns" for place, line in lines if len(line) > COLUMNS]
    assert not wide, "\n".join([f"{len(wide)} lines are too wide:", *wide[:20]])
    assert f"line-length = {COLUMNS}\n" in read("pyproject.toml"), "ruff allows another width"


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_go_one_way_and_stand_at_the_top(name):
    ours = [*LESSONS, "toy", "benchmarks", "docs", "tests"]
    for path in ROOT.glob("toy/*.py" if name == "toy" else f"{name}.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, module in imports(tree):
            known = module not in ours or module in IMPORTS[name]
            assert known, f"{path.name}:{line} imports {module}; allowed: {IMPORTS[name]}"
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            for line, module in imports(function):
                assert module in OPTIONAL, f"{path.name}:{line} imports {module} in a function"


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_is_free_of_the_toy(name):
    for word in ("torus", "travel", "drift", "circle", "triangle"):
        assert word not in read(f"{name}.py").lower(), f"{name}.py says {word}"


@pytest.mark.parametrize("name", LESSONS)
def test_public_functions_and_classes_have_docstrings(name):
    for node in ast.parse(read(f"{name}.py")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
            told = node.name.startswith("_") or ast.get_docstring(node)
            assert told, f"{name}.py:{node.lineno} {node.name} has no docstring"


def test_the_top_level_holds_only_what_belongs_there():
    strangers = {path.parts[0] for path in tracked()} - set(TOP)
    assert not strangers, f"these do not belong at the top level: {sorted(strangers)}"
