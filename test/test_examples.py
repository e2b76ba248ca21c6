"""The examples in docs/examples/ and the command lines in the pages do what they say, as far as can be seen without
Docker and Kubernetes: the commands of this package in them are run, in directories that stand for images.
"""

from __future__ import annotations

import functools
import http.server
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from kit.environment import python_path
from kit.plans import real_plan, write_plan
from kit.toolchain import toolchain
from packaging.requirements import Requirement
from sglang_warmstart.base.switches import SWITCHES
from sglang_warmstart.bundle import archive
from sglang_warmstart.bundle.signature import PublicKey
from sglang_warmstart.cli import app
from sglang_warmstart.cli.plan_model import names_model
from sglang_warmstart.deepgemm import digest
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.marker import Markers
from sglang_warmstart.deepgemm.plan import Plan

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
OURS = "sglang-warmstart"

# A Dockerfile, read and run


@dataclass
class Stage:
    """A stage of a Dockerfile.

    Args:
        name: after AS.
        base: another stage, or an image.
        steps: instructions and what they are given, in order.
    """

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        """What is given to an instruction."""
        return [text for word, text in self.steps if word == instruction]


def stages() -> dict[str, Stage]:
    """The stages of the Dockerfile, by name."""
    lines = [line for line in (EXAMPLES / "Dockerfile").read_text("utf-8").splitlines() if not line.startswith("#")]
    found: dict[str, Stage] = {}
    for line in filter(None, "\n".join(lines).replace("\\\n", " ").splitlines()):
        word, text = line.split(maxsplit=1)
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", text).groups()  # type: ignore[union-attr]
            stage = found[name] = Stage(name, base)
        else:
            stage.steps.append((word, text))
    return found


def commands(run: str) -> list[str]:
    """The commands of a RUN, without its own options."""
    return re.split(r"\s*&&\s*", re.sub(r"^(--\S+\s+)+", "", run.strip()))


def of_program(stage: Stage, program: str) -> list[list[str]]:
    """The command lines of a program in a stage, as words."""
    lines = [shlex.split(command) for run in stage.all("RUN") for command in commands(run)]
    # Settings may stand before it.
    lines = [line[next(n for n, word in enumerate(line) if not re.match(r"\w+=", word)) :] for line in lines]
    return [line for line in lines if line[0] == program]


class Build:
    """A build of the Dockerfile. What its stages have in their file systems is below a directory for each image.

    Only this package's own commands are run; pip's and apt's are not.

    Args:
        directory: of all of it; a new one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.context = directory / "context"
        self.context.mkdir()
        self.stages = stages()
        self.ran: list[str] = []

    def root(self, stage: str) -> Path:
        """The file system of a stage: that of the image which it is made from. No step here undoes what another did."""
        found = self.stages[stage]
        return self.root(found.base) if found.base in self.stages else self.directory / "images" / stage

    def inside(self, stage: str, text: str) -> str:
        """A text with absolute paths of an image, with the paths that they have here."""
        return re.sub(r"(?<![\w./:])/(?=\w)", f"{self.root(stage)}/", text)

    def run(self) -> None:
        """Run all stages."""
        for stage in self.stages.values():
            self.root(stage.name).mkdir(parents=True, exist_ok=True)
            for word, text in stage.steps:
                getattr(self, f"_{word.lower()}")(stage, text)

    def environment(self, stage: Stage) -> dict[str, str]:
        """That of a command in a stage. The server's image has a CUDA and a DeepGEMM of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "CUDA", "DG_"))}
        found = {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(self.directory)}
        if stage.base == "server":
            found["CUDA_HOME"] = str(toolchain().cuda_home)
            found["PYTHONPATH"] = python_path(Path(self.inside("server", server_deep_gemm())).parent)
        return found | dict(self.inside(stage.name, text).split("=", 1) for text in stage.all("ENV"))

    def _env(self, stage: Stage, text: str) -> None:
        assert re.fullmatch(r"\w+=\S+", text)

    def _workdir(self, stage: Stage, text: str) -> None:
        self.cwd = Path(self.inside(stage.name, text))
        self.cwd.mkdir(parents=True)

    def _copy(self, stage: Stage, text: str) -> None:
        *sources, target = text.split()
        source_root = self.context
        if sources[0].startswith("--from="):
            source_root = self.root(sources.pop(0).removeprefix("--from="))
        into = Path(self.inside(stage.name, target)) if target != "/" else self.root(stage.name)
        for source in sources:
            path = source_root / source.lstrip("/")
            if path.is_dir():
                shutil.copytree(path, into, symlinks=True, dirs_exist_ok=True)
            else:
                assert target.endswith("/")
                into.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, into)

    def _run(self, stage: Stage, text: str) -> None:
        for command in commands(text):
            if command.startswith(f"{OURS} "):
                self.ran.append(command)
                done = subprocess.run(
                    ["sh", "-c", self.inside(stage.name, command)],
                    cwd=self.cwd,
                    env=self.environment(stage),
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
            else:
                assert re.match(r"(\w+=\S+ )*(pip install|apt-get|rm) ", command), command


def server_deep_gemm() -> str:
    """Where DeepGEMM is in the server's image, by kubernetes.yaml."""
    arguments = pod()["initContainers"][0]["args"]
    return str(arguments[arguments.index("--deep-gemm") + 1])


def key_pair(directory: Path) -> tuple[Path, Path]:
    """A private and a public key, as the page says that they are made."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    private, public = directory / "bundle.key", directory / "bundle.pub"
    page = (ROOT / "docs" / "bundles.md").read_text("utf-8")
    lines = re.findall(r"^ {4}(openssl .*)$", page, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        subprocess.run(shlex.split(line, comments=True), cwd=directory, check=True, capture_output=True)
    return private, public


@pytest.fixture(scope="module")
def plan() -> Plan:
    """It was recorded where DeepGEMM is in another place than in any of the images."""
    return real_plan()


@pytest.fixture(scope="module")
def build(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The Dockerfile has been built: two kernels, by the real compiler."""
    made = Build(tmp_path_factory.mktemp("build"))
    for name in ("python", "patches"):
        shutil.copytree(ROOT / name, made.context / name, symlinks=True)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, made.context)
    write_plan(made.context / "plan.json", plan)
    private, _ = key_pair(made.context)
    # What pip and Docker would have put there.
    in_compile = made.root("compile")
    (in_compile / "run" / "secrets").mkdir(parents=True)
    shutil.copy(private, in_compile / "run" / "secrets" / "bundle-key")
    (in_compile / "toolchain").symlink_to(toolchain().root)
    deep_gemm = Path(made.inside("server", server_deep_gemm()))
    deep_gemm.parent.mkdir(parents=True)
    deep_gemm.symlink_to(toolchain().deep_gemm)
    made.run()
    return made


@pytest.fixture(scope="module")
def bundle(build: Build) -> Path:
    """What a build of the stage `bundle` puts out."""
    (path,) = build.root("bundle").iterdir()
    return path


def see_kernels(plan: Plan, cache: Path, deep_gemm: Path) -> None:
    """See that a server whose DeepGEMM is in a directory finds its kernels, and its marker."""
    kernels = KernelCache(cache)
    for name in plan.kernels:
        assert kernels.has(plan.directory_of(name, deep_gemm / "include"))
    (launch,) = plan.launches
    marker = Markers(kernels, plan.identity_of(launch, deep_gemm, plan.compiler)).load(launch.launch)
    assert marker is not None and len(marker.targets) == len(launch.targets)


# The Dockerfile


@pytest.mark.long
def test_the_dockerfile_compiles_a_signed_bundle(build: Build, bundle: Path, plan: Plan) -> None:
    with bundle.open("rb") as stream:
        manifest = archive.read(stream, is_signed_by=PublicKey.load(build.context / "bundle.pub"))
    assert manifest.plan == plan and manifest.cubins.keys() == plan.kernels.keys()
    assert [command.split()[1] for command in build.ran] == ["plan", "compile", "bundle", "bundle"]


def test_the_server_of_the_image_finds_its_kernels(build: Build, plan: Plan) -> None:
    (cache,) = [text for text in build.stages["warm"].all("ENV") if text.startswith("SGLANG_DG_CACHE_DIR=")]
    root = Path(build.inside("warm", cache.partition("=")[2]))
    see_kernels(plan, root, Path(build.inside("server", server_deep_gemm())))


# What a server with the switches does at launch.
_AT_LAUNCH = """
import os, sys
from sglang_warmstart.bundle import at_launch
from sglang_warmstart.base.switches import BUNDLE, BUNDLE_KEY
from sglang_warmstart.sglang.caches import deep_gemm_cache
cache = deep_gemm_cache(os.environ)
sys.exit(at_launch.run(os.environ[BUNDLE.name], os.environ[BUNDLE_KEY.name], cache, os.environ))
"""


def test_what_the_switches_of_the_image_name_is_restored_at_launch(build: Build, plan: Plan, tmp_path: Path) -> None:
    environment = {**build.environment(build.stages["restoring"]), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _AT_LAUNCH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    see_kernels(plan, tmp_path / ".cache" / "deep_gemm", Path(build.inside("server", server_deep_gemm())))


def test_the_toolchain_is_what_the_plan_asks_for(build: Build) -> None:
    (line,) = of_program(build.stages["compile"], "pip")
    assert line[1] == "install" and "--no-deps" in line
    assert line[line.index("--target") + 1] == "/toolchain"
    printed = Path(build.inside("compile", "/build"), line[line.index("-r") + 1]).read_text().split()
    pinned = {
        name: version
        for name, _, version in (
            text.partition("==")
            for text in (ROOT / "test" / "requirements-toolchain.txt").read_text().splitlines()
            if not text.startswith("#")
        )
    }
    asked = {each.name: each for each in map(Requirement, printed)}
    # The others are NVRTC's.
    assert pinned.keys() - asked.keys() == {"nvidia-cuda-nvrtc", "cuda-bindings", "cuda-pathfinder"}
    for name, requirement in asked.items():
        assert requirement.specifier.contains(pinned[name]), name
    assert any("g++" in line and "install" in line for line in of_program(build.stages["compile"], "apt-get"))


def test_the_key_is_a_secret_of_the_step_that_signs(build: Build) -> None:
    (run,) = [text for text in build.stages["compile"].all("RUN") if "--sign" in text]
    (secret,) = re.findall(r"--mount=type=secret,id=(\S+)", run)
    words = shlex.split(run)
    assert words[words.index("--sign") + 1] == f"/run/secrets/{secret}"


@pytest.mark.parametrize("stage", ["tools", "server"])
def test_the_package_is_installed_from_what_is_copied_with_the_extras_that_are_used(
    build: Build, stage: str, tmp_path: Path
) -> None:
    (line,) = of_program(build.stages[stage], "pip")
    source, extras = re.fullmatch(r"(/src)\[(.*)\]", line[-1]).groups()  # type: ignore[union-attr]
    known = importlib.metadata.metadata(OURS).get_all("Provides-Extra") or []
    assert {"sign", "http"} <= set(extras.split(",")) <= set(known)
    # A copy: pip builds where the source is.
    shutil.copytree(build.inside(stage, source), tmp_path / "src", symlinks=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*install, "--no-compile", "--target", tmp_path / "site", tmp_path / "src"], check=True, capture_output=True
    )
    assert (tmp_path / "site" / "bin" / OURS).is_file()
    assert list(tmp_path.glob("site/sglang_warmstart/cli/patches_data/sglang-*/*.patch"))


def test_the_images_tag_is_of_the_release_and_the_cuda_of_the_plan(plan: Plan) -> None:
    found = re.fullmatch(r"lmsysorg/sglang:v([\d.]+)-cu(\d+)", stages()["server"].base)
    assert found is not None
    assert (ROOT / "patches" / f"sglang-{found[1]}").is_dir()
    assert f"NVCC{found[2][:-1]}.{found[2][-1]}" == digest.signature_of(plan.compiler)


# kubernetes.yaml


def pod(*, with_switches: bool = False) -> dict[str, Any]:
    """The pod of the example.

    Args:
        with_switches: without the signs of comments before the switches that are the other way.
    """
    text = (EXAMPLES / "kubernetes.yaml").read_text("utf-8")
    if with_switches:
        text, count = re.subn(r"(?m)^( *)#- ", r"\1- ", text)
        assert count
    spec: dict[str, Any] = yaml.safe_load(text)["spec"]["template"]["spec"]
    return spec


def mounts(container: Mapping[str, Any]) -> dict[str, str]:
    """The volumes of a container: where each is."""
    return {each["name"]: each["mountPath"] for each in container["volumeMounts"]}


def variables(container: Mapping[str, Any]) -> dict[str, str]:
    """The environment of a container."""
    return {each["name"]: each["value"] for each in container["env"]}


@dataclass(frozen=True)
class Volumes:
    """The volumes of a pod, each a directory below this one."""

    directory: Path

    def inside(self, container: Mapping[str, Any], path: str) -> Path:
        """A path that a container has on a volume, where it is here."""
        for volume, place in mounts(container).items():
            if path.startswith(f"{place}/"):
                return self.directory / volume / path.removeprefix(f"{place}/")
        raise AssertionError(f"{path} is on no volume of {container['name']}")


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """A web server with the files of a directory."""
    handler = functools.partial(_Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_the_volumes_are_there_and_both_containers_have_the_cache() -> None:
    spec = pod()
    (init,), (server,) = spec["initContainers"], spec["containers"]
    there = {volume["name"] for volume in spec["volumes"]}
    for container in (init, server):
        assert mounts(container).keys() <= there
    assert mounts(init)["kernels"] == mounts(server)["kernels"]
    cache = init["args"][init["args"].index("--cache") + 1]
    assert cache == variables(server)["SGLANG_DG_CACHE_DIR"]
    assert cache.startswith(mounts(init)["kernels"])
    writable = {each["name"]: not each.get("readOnly", False) for each in server["volumeMounts"]}
    assert writable["kernels"] and not writable["bundle-key"]


def test_the_init_container_fills_the_cache_of_the_server(
    build: Build, bundle: Path, plan: Plan, tmp_path: Path
) -> None:
    spec = pod()
    (init,), (server,) = spec["initContainers"], spec["containers"]
    volumes = Volumes(tmp_path / "volumes")
    (volumes.directory / "kernels").mkdir(parents=True)
    (volumes.directory / "bundle-key").mkdir()
    shutil.copy(build.context / "bundle.pub", volumes.directory / "bundle-key")
    (url,) = [word for word in init["args"] if "://" in word]
    (tmp_path / "store").mkdir()
    shutil.copy(bundle, tmp_path / "store" / Path(url).name)

    def here(word: str, store: str) -> str:
        if word == url:
            return f"{store}/{Path(url).name}"
        # The path of the server's DeepGEMM is on no volume: it is not looked for in this container.
        on_volume = any(word.startswith(f"{place}/") for place in mounts(init).values())
        return str(volumes.inside(init, word)) if on_volume else word

    def restore() -> subprocess.CompletedProcess[str]:
        with served(tmp_path / "store") as store:
            return subprocess.run(
                [here(word, store) for word in (*init["command"], *init["args"])],
                env=build.environment(build.stages["tools"]),
                capture_output=True,
                text=True,
            )

    done = restore()
    assert done.returncode == 0, done.stderr
    cache = volumes.inside(server, variables(server)["SGLANG_DG_CACHE_DIR"])
    see_kernels(plan, cache, Path(server_deep_gemm()))
    # The pod is started again, and its volume is still there.
    again = restore()
    assert again.returncode == 0 and f"0 kernels restored ({len(plan.kernels)} were there)" in again.stdout
    # Somebody else's key.
    key_pair(volumes.directory / "bundle-key")
    refused = restore()
    assert refused.returncode == 2 and "signature" in refused.stderr


def test_the_switches_that_are_the_other_way_name_the_same_bundle_and_key() -> None:
    spec = pod(with_switches=True)
    (init,), (server,) = spec["initContainers"], spec["containers"]
    given = variables(server)
    assert given["SGLANG_WARMSTART_BUNDLE"] in init["args"]
    assert given["SGLANG_WARMSTART_BUNDLE_KEY"] in init["args"]
    Volumes(Path()).inside(server, given["SGLANG_WARMSTART_BUNDLE_KEY"])
    assert {name for name in given if name.startswith("SGLANG_WARMSTART")} <= {switch.name for switch in SWITCHES}


# The pages


def test_the_numbers_in_the_pages_are_those_of_the_committed_results() -> None:
    results = {name: json.loads((ROOT / f"test/gpu/results/{name}.json").read_text()) for name in NUMBERS}
    assert results["record"]["kernels"] == results["compile"]["compiled"] == 39 and results["record"]["targets"] == [8]
    assert not results["record"]["left_out"] and results["record"]["compiler_runs"] == 1
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in results["bundle"]["runs"]:
        runs.setdefault(run["state"], []).append(run)
    seconds = {state: sorted(run["ready_s"] for run in each) for state, each in runs.items()}
    told = {state: f"{statistics.median(each):.1f}" for state, each in seconds.items()}
    guide, feature = (
        " ".join((ROOT / page).read_text("utf-8").split())
        for page in ("docs/bundles.md", "docs/features/bundle-restore.md")
    )
    for state in ("bundle", "cold", "warm"):
        assert f"after {told[state]} s ({seconds[state][0]:.1f} to {seconds[state][-1]:.1f})" in feature
    for state in ("all cold", "all restored"):
        assert len(seconds[state]) == 1 and f"after {told[state]} s" in feature
    restored = [run for state in ("all restored", "bundle") for run in runs[state]]
    assert all(run["compiler_runs"] == 0 and run["bundle_said"] for run in restored)
    assert len({tuple(run["tokens"]) for each in runs.values() for run in each}) == 1
    assert f"in {results['compile']['seconds']:.0f} s" in guide
    assert f"{results['record']['seconds']} s" in guide


def command_lines(page: Path) -> list[str]:
    """The lines of code blocks and the code in a text that are commands of this package."""
    text = page.read_text("utf-8")
    blocks = "\n".join(re.findall(r"^ {4}(.*)$", text, re.MULTILINE)).replace("\\\n", " ")
    # In a text only what has an option: the others name a command.
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    lines = [*blocks.splitlines(), *(span for span in spans if " -" in span)]
    return [line for line in lines if re.match(rf"(\w+=\S+ )*{OURS} ", line)]


NUMBERS = ("record", "compile", "bundle")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
LINES = [pytest.param(line, id=f"{page.stem}: {line}") for page in PAGES for line in command_lines(page)]


def parse(line: str) -> None:
    """Parse a command line as the program would. Nothing is run.

    Raises:
        Exception: typer's, if there is no such command or option, or something is missing.
    """
    words = shlex.split(line, comments=True)
    words = words[words.index(OURS) + 1 :]
    # Several commands in a line.
    words = words[: next((n for n, word in enumerate(words) if word in (";", "&&", "|", ">")), None)]
    command: Any = typer.main.get_command(app)
    name = OURS
    while hasattr(command, "commands"):
        if name == "plan" and words[0] not in command.commands:
            words.insert(0, "model" if names_model(words) else "make")  # which is what `plan` alone does
        name = words.pop(0)
        command = command.commands[name]
    command.make_context(name, words)


def test_the_pages_have_command_lines() -> None:
    assert {page.stem for page in PAGES if command_lines(page)} >= {"README", "bundles"}


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_of_the_pages_can_be_parsed(line: str) -> None:
    parse(line)


@pytest.mark.parametrize(
    "line", ["sglang-warmstart compile plan.json --out b", "sglang-warmstart bundle open b", "sglang-warmstart compile"]
)
def test_a_command_line_that_cannot_be_parsed_is_seen(line: str) -> None:
    with pytest.raises(Exception, match=r"No such option|open|Missing"):
        parse(line)
