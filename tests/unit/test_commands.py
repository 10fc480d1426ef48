"""The command megatron-lite and the presets that an installation brings."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_lite import commands
from megatron_lite.arguments import parse_args
from megatron_lite.arguments.presets import preset_names
from megatron_lite.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "evaluate" and not (REPOSITORY / "tools" / "evaluate.py").exists(),
            reason="tools/evaluate.py is not there",
        ),
    )
    for name in commands.COMMANDS
]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_a_main(name: str) -> None:
    """Mutation: a module that is not there."""
    module = importlib.import_module(commands.COMMANDS[name][0])
    assert callable(module.main)


def test_a_command_gets_its_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And --help names it as it was called."""
    monkeypatch.setattr(sys, "argv", ["megatron-lite"])
    with pytest.raises(SystemExit) as ended:
        commands.main(["plan", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: megatron-lite plan ")


def test_without_a_command_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in commands.COMMANDS)
    assert commands.main(["pretrian"]) == 2
    assert "pretrian is not a command; the closest is pretrain." in capsys.readouterr().err


def test_a_preset_is_found_by_name_and_a_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: look for presets first."""
    monkeypatch.chdir(tmp_path)
    words = ["--config", "quickstart", "--mock-data"]
    assert parse_args(words).transformer.hidden_size == 256
    Path("quickstart").mkdir()  # such as the folder of a run
    assert parse_args(words).transformer.hidden_size == 256
    Path("quickstart").rmdir()
    text = (REPOSITORY / "configs" / "quickstart.yaml").read_text()
    Path("quickstart").write_text(text.replace("hidden_size: 256", "hidden_size: 64"))
    assert parse_args(words).transformer.hidden_size == 64


def test_a_name_that_is_no_preset_tells_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"--config lama3_8b: .*name an existing YAML file or one .*, llama3_8b, "):
        parse_args(["--config", "lama3_8b"])


def test_a_wheel_brings_commands_and_presets(tmp_path: Path) -> None:
    """Used from another folder, without the repository. Mutation: no package-data in pyproject.toml."""
    source = tmp_path / "source"
    for name in ("megatron_lite", "tools", "configs"):
        shutil.copytree(
            REPOSITORY / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pretrain_gpt.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    entry_points = next((tmp_path / "installed").glob("*.dist-info/entry_points.txt")).read_text()
    assert "megatron-lite = megatron_lite.commands:main" in entry_points
    presets = (tmp_path / "installed" / "megatron_lite" / "presets").glob("*.yaml")
    assert sorted(path.stem for path in presets) == preset_names()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lite", "pretrain", "--config", "no_such_preset"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"or one of the presets: {', '.join(preset_names())}." in done.stderr
