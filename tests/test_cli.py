"""The command line: exit statuses, messages, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest

import daekit
from daekit.cli import main
from daekit.errors import UserError
from daekit.recipe import Recipe, load_recipe, load_recipe_text
from tests.helpers.recipes import BASE, RECIPES

DISK_FULL = "daekit: error: the disk is full ({}). Free some space; the same command goes on.\n"
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "numpy", "matplotlib")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE, encoding="utf-8")
    return path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Stands in for `daekit.runtime.run`: keeps the recipes that would be run."""
    kept: list[Recipe] = []
    module = types.ModuleType("daekit.runtime.run")
    module.run_recipe = lambda recipe, *_: kept.append(recipe)  # type: ignore[attr-defined]
    module.calibration = lambda: "calibration: 1 GFLOP/s"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "daekit.runtime.run", module)
    return kept


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    "statement",
    [
        "import daekit, daekit.cli, daekit.recipe",
        f"from daekit.cli import main; main(['check', {str(RECIPES[0])!r}])",
        "from daekit.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["import", "check", "help"],
)
def test_nothing_heavy_is_imported(statement: str) -> None:
    done = python("-c", f"{statement}\nimport sys; print('HEAVY', [name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stderr


@pytest.mark.parametrize("arguments", ["--help", "--version"])
def test_module_is_the_command(arguments: str) -> None:
    done = python("-m", "daekit", arguments)
    assert done.returncode == 0
    assert "daekit" in done.stdout
    if arguments == "--version":
        assert done.stdout == f"daekit {daekit.__version__}\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-m", "daekit", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 0


def test_check_prints_the_same_each_time(recipe_file: Path) -> None:
    """Also in another process, where sets are walked in another order: so two resolved recipes can be compared."""
    said = {python("-m", "daekit", "check", str(recipe_file)).stdout for _ in range(3)}
    assert len(said) == 1 and "learning_rate" in said.pop()


def test_check_prints_the_resolved_recipe(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe_file), "seed=7", "stages.dae.lora.r=8"]) == 0
    printed = load_recipe_text(capsys.readouterr().out, "printed")
    assert printed == load_recipe(recipe_file, ["seed=7", "stages.dae.lora.r=8"])
    assert printed.seed == 7


def test_check_of_a_wrong_recipe(recipe_file: Path) -> None:
    done = python("-m", "daekit", "check", str(recipe_file), "sed=7")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean 'seed'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_runs_the_recipe(recipe_file: Path, runs: list[Recipe]) -> None:
    assert main(["train", str(recipe_file), "output_dir=elsewhere"]) == 0
    assert runs == [load_recipe(recipe_file, ["output_dir=elsewhere"])]


def test_train_checks_before_it_runs(recipe_file: Path, runs: list[Recipe]) -> None:
    assert main(["train", str(recipe_file), "seed=x"]) == 2
    assert runs == []


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (UserError("out of luck; try again"), 2, "daekit: error: out of luck; try again\n"),
        (KeyboardInterrupt(), 130, "stopped; the same command resumes\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, DISK_FULL.format("[Errno 28] No space left on device")),
        # safetensors and tokenizers say so in words only
        (Exception("No space left on device (os error 28)"), 2, DISK_FULL.format("No space left on device (os error 28)")),
    ],
)
def test_what_a_run_raises(
    recipe_file: Path,
    runs: list[Recipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    status: int,
    message: str,
) -> None:
    def fail(recipe: Recipe, *_: object) -> None:
        raise raised

    monkeypatch.setattr(sys.modules["daekit.runtime.run"], "run_recipe", fail)
    assert main(["train", str(recipe_file)]) == status
    assert capsys.readouterr().err == message


def test_an_error_of_another_rank_alone_is_not_lost(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert main(["check", str(recipe_file), "sed=7"]) == 2
    assert waited and capsys.readouterr().err.startswith("[rank 1] daekit: error")


def test_a_kernel_that_bitsandbytes_misses_is_no_news(
    recipe_file: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(recipe_file)]) == 0
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no module")
    logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


def test_a_defect_keeps_its_traceback(recipe_file: Path, runs: list[Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(recipe: Recipe, *_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["daekit.runtime.run"], "run_recipe", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", str(recipe_file)])


def test_quickstart_takes_a_folder_and_overrides(
    runs: list[Recipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    resources = tmp_path / "resources"
    resources.mkdir()
    (resources / "quickstart.yaml").write_text(BASE, encoding="utf-8")
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    folder = "a folder: with #signs"
    assert main(["quickstart", "--output-dir", folder, "seed=3"]) == 0
    (recipe,) = runs
    assert (recipe.output_dir, recipe.seed) == (folder, 3)
    assert "calibration: 1 GFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["trian", "x"], ["check"], ["check", "x", "--nothing"], ["schema", "suite", "x"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_overrides_are_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check"])
    assert capsys.readouterr().err.endswith("required: RECIPE\n")


def test_what_is_allowed_reaches_the_suites_of_a_run(
    recipe_file: Path, runs: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    monkeypatch.setattr(sys.modules["daekit.runtime.run"], "run_recipe", lambda *arguments: given.extend(arguments))
    assert main(["train", str(recipe_file), "--allow-key-env", "MINE", "--allow-http"]) == 0
    assert given[-1].key_variables == {"MINE"} and given[-1].http  # type: ignore[attr-defined]
