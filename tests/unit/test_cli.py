"""The command line as a whole: with the extras and without, its help, its errors (E3)."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import synapse_sticky
from synapse_sticky.cli import main
from synapse_sticky.cli.base import BASE
from synapse_sticky.cli.extra import EXTRA

pytestmark = pytest.mark.requirement("E3")

EXTRAS = ("click", "rich", "matplotlib", "plotext", "numpy")
BLOCKED = f"import sys\nfor name in {EXTRAS!r}: sys.modules[name] = None\n"
MAIN = "from synapse_sticky.cli import main\nsys.exit(main())\n"

SUMMARIES = {
    **{command.name: command.summary for command in BASE},
    **{extra.name: extra.summary for extra in EXTRA},
}


def without_extras(
    folder: Path, program: str, *arguments: str
) -> "subprocess.CompletedProcess[str]":
    """Runs a program in a Python in which no extra can be imported."""
    file = folder / "program.py"
    file.write_text(BLOCKED + program)
    command = [sys.executable, str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_module_can_be_imported_without_the_extras(tmp_path: Path) -> None:
    walked = pkgutil.walk_packages(synapse_sticky.__path__, "synapse_sticky.")
    modules = [module.name for module in walked if module.name != "synapse_sticky.__main__"]
    assert len(modules) > 100
    run = without_extras(tmp_path, "".join(f"import {name}\n" for name in modules))
    assert (run.returncode, run.stderr) == (0, "")


def test_an_import_of_an_extra_is_found(tmp_path: Path) -> None:
    for name in EXTRAS:
        assert "ModuleNotFoundError" in without_extras(tmp_path, f"import {name}").stderr


def test_base_commands_need_no_extras(tmp_path: Path) -> None:
    run = without_extras(tmp_path, MAIN, "check")
    assert (run.returncode, run.stderr) == (0, "")
    assert "joins        on" in run.stdout
    for command in BASE:
        run = without_extras(tmp_path, MAIN, command.name, "--help")
        assert run.returncode == 0
        said = " ".join(run.stdout.split())
        assert command.description in said
        assert command.examples[0] in said
    help_of_all = without_extras(tmp_path, MAIN, "--help").stdout
    assert all(name in help_of_all for name in SUMMARIES)
    run = without_extras(tmp_path, MAIN, "check", "--nonsense")
    assert (run.returncode, "--nonsense" in run.stderr) == (2, True)


def test_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    said = f"synapse-sticky {synapse_sticky.__version__}\n"
    assert capsys.readouterr().out == said
    assert without_extras(tmp_path, MAIN, "--version").stdout == said


def test_the_others_say_what_to_install(tmp_path: Path) -> None:
    for extra in EXTRA:
        for arguments in ([], ["--help"], ["-c", "file"]):
            run = without_extras(tmp_path, MAIN, extra.name, *arguments)
            assert (run.returncode, run.stdout) == (2, "")
            assert f"pip install 'synapse-sticky[{extra.extra}]'" in run.stderr
            assert "Traceback" not in run.stderr


def test_one_that_lacks_only_some(tmp_path: Path) -> None:
    program = f"import sys\nsys.modules['plotext'] = None\n{MAIN}"
    file = tmp_path / "program.py"
    file.write_text(program)
    command = [sys.executable, str(file), "simulate", "--rate", "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "simulate needs plotext, which" in run.stderr
    assert f"{sys.executable} -m pip install 'synapse-sticky[simulate]'" in run.stderr


def test_help_has_all_commands_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, summary in SUMMARIES.items():
        assert f"{name} " in said
        assert summary in said
    for name in SUMMARIES:
        assert main([name, "--help"]) == 0
        assert f"  synapse-sticky {name} " in capsys.readouterr().out


def test_both_have_the_same_base_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in BASE:
        assert main([command.name, "--help"]) == 0
        full = capsys.readouterr().out
        plain = without_extras(tmp_path, MAIN, command.name, "--help").stdout
        for option in command.options:
            for said in (full, plain):
                assert set(option.flags) <= set(said.replace(",", " ").split())
                assert option.help.split(";")[0].split()[0] in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chekc"], "No such command 'chekc'"),
        (["check", "--nonsense"], "No such option"),
        (["drain"], "Missing option '-c'"),
        (["simulate", "--rate", "fast"], "'fast' is not a valid float"),
        (["simulate", "--for", "1 minute"], "from 1s to 7d, as a number with a unit"),
        (["simulate", "--for", "60"], "as a number with a unit (5m)"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    def complete(**variables: str) -> str:
        program = "import sys\nfrom synapse_sticky.cli import main\nsys.exit(main())"
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (run.returncode, run.stderr) == (0, "")
        return run.stdout

    instruction = f"{shell}_complete"
    # fish gives the word itself, and not its number.
    words = {"COMP_WORDS": "synapse-sticky s", "COMP_CWORD": "s" if shell == "fish" else "1"}
    assert "simulate" in complete(_SYNAPSE_STICKY_COMPLETE=instruction, **words)
    assert "_SYNAPSE_STICKY_COMPLETE" in complete(_SYNAPSE_STICKY_COMPLETE=f"{shell}_source")
