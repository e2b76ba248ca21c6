"""A real SGLang HTTP server on CPU."""

import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from kit.environment import child_environment
from kit.ports import free_ports
from kit.process import ServerProcess
from kit.release import installed_release

Launch = Literal["module", "serve", "run"]  # "run": the module, by `sglang-warmstart run`


def _command(launch: Launch) -> list[str]:
    # SGLang and its dependencies warn about being on CPU; a log is read more easily without.
    python = [sys.executable, "-W", "ignore"]
    if launch == "module":
        return [*python, "-m", "sglang.launch_server"]
    if launch == "run":
        return [*python, "-c", "from sglang_warmstart.cli import main; main()", "run", "--", *_command("module")]
    return [*python, str(Path(sysconfig.get_path("scripts"), "sglang")), "serve"]


def cpu_server_args(model: Path, port: int, nccl_port: int) -> dict[str, object]:
    """Keywords of `ServerArgs` with which the release at hand serves on CPU."""
    return {
        "model_path": str(model),
        "load_format": "dummy",
        "device": "cpu",
        "skip_tokenizer_init": True,
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "mem_fraction_static": 0.3,
        "max_total_tokens": 4096,
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
        "host": "127.0.0.1",
        "port": port,
        "nccl_port": nccl_port,
        **installed_release().server_args,
    }


def as_options(server_args: Mapping[str, object]) -> list[str]:
    options: list[str] = []
    for name, value in server_args.items():
        options.append("--" + name.replace("_", "-"))
        if value is not True:
            options.append(str(value))
    return options


class Server(ServerProcess):
    """The server on CPU, with whatever arguments come on top.

    `environment` is laid over this process's own; None as a value removes a variable.
    """

    def __init__(
        self,
        model: Path,
        *arguments: str,
        launch: Launch = "module",
        environment: Mapping[str, str | None] | None = None,
        log_file: Path | None = None,
    ) -> None:
        port, nccl_port = free_ports(2)
        super().__init__(
            [*_command(launch), *as_options(cpu_server_args(model, port, nccl_port)), *arguments],
            port,
            child_environment({"PYTHONUNBUFFERED": "1", **(environment or {})}),
            log_file=log_file,
        )
