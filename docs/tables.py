"""Fills the tables of docs/experiments.md with the rows of benchmarks/results/.

    python docs/tables.py

A comment above a table names the file and its columns: <!-- cost.csv: pixels, seconds, ratio -->
"""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "experiments.md"
TABLE = re.compile(r"<!-- (\S+\.csv): (.+?) -->\n(\|.*\n\|.*\n)((?:\|.*\n)*)")


def fill(match):
    """One table: its comment and its two header lines stay, its rows come from the CSV."""
    file, columns, header, _ = match.groups()
    with open(ROOT / "benchmarks" / "results" / file, newline="") as rows:
        lines = []
        for row in csv.DictReader(rows):
            lines.append("| " + " | ".join(row[name] for name in columns.split(", ")) + " |\n")
    return f"<!-- {file}: {columns} -->\n{header}" + "".join(lines)


def filled(text):
    return TABLE.sub(fill, text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
