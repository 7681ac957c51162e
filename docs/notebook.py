"""Makes docs/tour.ipynb from docs/tour.py, with its outputs: `python docs/notebook.py`.

For maintainers. It needs nbformat, nbclient and ipykernel, and takes some five minutes.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent


def cells(script):
    """The cells of a script in percent format: a list of ("markdown" or "code", source)."""
    found = []
    for part in script.split("# %%")[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if "markdown" in head else "code"
        if kind == "markdown":
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        found.append((kind, body.strip()))
    return found


def main():
    import nbclient
    import nbformat

    notebook = nbformat.v4.new_notebook()
    for kind, source in cells((HERE / "tour.py").read_text(encoding="utf-8")):
        new = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        notebook.cells.append(new(source))
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": HERE}}).execute()
    for i, cell in enumerate(notebook.cells):
        cell.id = str(i)  # not random, so that only what changes is seen as a change
        cell.metadata.clear()  # no times
    nbformat.write(notebook, HERE / "tour.ipynb")


if __name__ == "__main__":
    main()
