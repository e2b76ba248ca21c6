"""``sglang-warmstart plan --model-path``: make the plan of a server from its model's configuration, without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sglang_warmstart.cli.ending import command, write_plan
from sglang_warmstart.cli.plan_make import LAUNCH, Wish, named_gpu, package_of, planned, version_here
from sglang_warmstart.deepgemm.plan import LeftOut, PlanError
from sglang_warmstart.sglang.model_targets.ask import ranks_of
from sglang_warmstart.sglang.model_targets.protocol import Ranks
from sglang_warmstart.sglang.model_targets.refusal import RefusalError


def names_model(arguments: Sequence[str]) -> bool:
    """Whether a command line is that of a server."""
    return any(argument.partition("=")[0] in ("--model-path", "--model") for argument in arguments)


@command
def of_model(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PLAN", help="The file to write (JSON).")],
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME[:SMS]", help="The GPU of the server, such as h200.")],
    nvcc: Annotated[
        str | None, typer.Option(help="The compiler that will be used. Default: the one found here.")
    ] = None,
    deep_gemm: Annotated[
        str | None, typer.Option(help="The directory of the package deep_gemm. Default: the one installed here.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Targets recorded at once. Default: the cores.")] = None,
) -> None:
    """Make a plan from a model: sglang-warmstart plan --model-path M --gpu h200 -o PLAN, and the server's arguments.

    Needs SGLang, the model's config.json and no weights. SGLang builds the model without data, and each layer is called
    alone. A server completes the plan on its first start. Exit status 0 when all layers are known, 1 when some are not,
    2 when there is no plan.
    """
    arguments = list(context.args)
    if not names_model(arguments):
        raise typer.BadParameter("name the model: --model-path M, and the arguments of the server")
    chosen, package = named_gpu(gpu), package_of(deep_gemm)
    version = version_here(nvcc, package)
    console = Console(stderr=True)
    try:
        with console.status("asking SGLang what the model calls") as status:

            def begun(step: str) -> None:
                status.update(step)
                if not console.is_terminal:
                    console.print(step, markup=False, highlight=False, soft_wrap=True)

            found = ranks_of(arguments, chosen, begun)
    except RefusalError as error:
        raise PlanError(str(error)) from error
    left_out = [LeftOut(each.module, each.reason) for ranks in found for each in ranks.not_found]
    if not any(ranks.targets for ranks in found):
        raise PlanError(_nothing(found, gpu))
    wishes = [Wish(chosen, {}, LAUNCH | _names(ranks), ranks.targets) for ranks in found]
    write_plan(output, planned(wishes, version, package, jobs, left_out))


def _names(ranks: Ranks) -> dict[str, str]:
    return {"ranks": " ".join(map(str, ranks.ranks)), "model": " ".join(ranks.models)}


def _nothing(found: Sequence[Ranks], gpu: str) -> str:
    unknown = [each for ranks in found for each in ranks.not_found]
    layers = sum(ranks.layers for ranks in found)
    models = " and ".join(dict.fromkeys(name for ranks in found for name in ranks.models))
    if unknown:
        return f"no target of {models} was found: {unknown[0].module}: {unknown[0].reason}"
    return f"none of the {layers} layers of {models} calls DeepGEMM with these arguments on {gpu}: nothing to plan"
