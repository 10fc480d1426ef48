"""Imports run one way: up the table of docs/architecture.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "megatron_lite"
# Links to scripts of the top level, which may import everything.
LINKS = {PACKAGE / "tools", PACKAGE / "presets", PACKAGE / "pretrain_gpt.py"}


def rows_of(document: str) -> dict[str, int]:
    """Return the number of its row for each module or package in the first column of the table under "Packages"."""
    section = document.partition("## Packages")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, flags=re.MULTILINE)
    return {name: row for row, cell in enumerate(cells) for name in re.findall(r"`([^`]+)`", cell)}


def row_of(path: Path, rows: dict[str, int]) -> int:
    """Return the row of a file: that of the file itself or of its innermost package in the table."""
    name = path.relative_to(PACKAGE).as_posix()
    if name in rows:
        return rows[name]
    packages = [f"{parent.as_posix()}/" for parent in Path(name).parents]
    found = [rows[package] for package in packages if package in rows]
    assert found, f"megatron_lite/{name} is in no row of docs/architecture.md: add it to the table"
    return found[0]


def sources() -> Iterator[Path]:
    """Return the package's files, except those linked from the top level and empty ones."""
    for path in sorted(PACKAGE.rglob("*.py")):
        empty = not path.read_text().strip()
        if not empty and LINKS.isdisjoint([path, *path.parents]) and path != PACKAGE / "__init__.py":
            yield path


def imported_files(source: str) -> Iterator[tuple[int, Path]]:
    """Return line and file of each import of the package in `source`, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *parts = name.split(".")
            if first != "megatron_lite":
                continue
            while parts:  # the name may be a function of a module, or of a package's __init__
                path = PACKAGE.joinpath(*parts)
                if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
                    yield (
                        node.lineno,
                        path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py",
                    )
                    break
                parts.pop()


def test_imports_run_one_way():
    """Mutation: `from megatron_lite.training.step import train_step` anywhere in transformer/ is named here."""
    rows = rows_of((REPOSITORY / "docs" / "architecture.md").read_text())
    assert len(rows) > 20
    upward, followed = [], 0
    for path in sources():
        row = row_of(path, rows)
        for line, target in imported_files(path.read_text()):
            followed += 1
            if row_of(target, rows) > row:
                upward.append(f"{path.relative_to(REPOSITORY)}:{line} imports {target.relative_to(REPOSITORY)}")
    assert followed > 500
    assert not upward, "imports against the order of docs/architecture.md:\n" + "\n".join(upward)


def test_the_table_names_what_exists():
    for name in rows_of((REPOSITORY / "docs" / "architecture.md").read_text()):
        assert (PACKAGE / name).exists(), name
