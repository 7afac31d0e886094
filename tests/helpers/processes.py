"""Real processes for tests: forked from this one, which has imported everything, so that one costs no ten seconds."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env


def start(action: Callable[[], int | None], output: Path | None = None, **environment: str) -> int:
    """Fork a process that runs ``action`` and exits with what it returns (1 with a traceback where it raises).

    Args:
        output: file for what it prints; by default nowhere for stdout, this process's own for stderr.

    Returns:
        The process's id.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ |= environment
        stream = (output or Path(os.devnull)).open("w", buffering=1)
        os.dup2(stream.fileno(), 1)
        sys.stdout = stream  # pytest has put objects of its own there
        if output is not None:
            os.dup2(stream.fileno(), 2)
            sys.stderr = stream
        AcceleratorState._reset_state(reset_partial_state=True)
        status = action() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(process: int) -> int:
    """The exit status of a started process (minus the signal's number if one killed it)."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def forked(action: Callable[[], int | None], output: Path | None = None) -> int:
    """Run ``action`` in a forked process and wait; the exit status as of ``status_of``."""
    return status_of(start(action, output))


def engine_environment(engine: str) -> dict[str, str]:
    """What ``accelerate launch`` tells its processes of an engine, by the configuration that ships."""
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / f"{engine}.yaml"
    words = ["--config_file", str(config), "--num_processes", "2", "--main_process_port", "0", "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    told = prepare_deepspeed_cmd_env(args)[1] if engine.startswith("zero") else prepare_multi_gpu_env(args)
    return {name: value for name, value in told.items() if name.startswith(("FSDP", "ACCELERATE"))}


def start_ranks(action: Callable[[], int | None], outputs: list[Path], **environment: str) -> list[int]:
    """Start one process per output file, which find each other as the ranks of one launch (gloo, on the CPU)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = str(len(outputs))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world} | environment
    return [start(action, output, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank, output in enumerate(outputs)]
