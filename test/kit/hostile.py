"""Inputs that are not quite what they should be, each made from a seed, and the code that is to withstand them.

A *subject* reads one kind of input as the product does. It raises one of the errors that its documentation names, or
takes the input. What it says must be one printable line.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from sglang_warmstart.base import trust
from sglang_warmstart.base.switches import SWITCHES, left_out_by
from sglang_warmstart.base.trust import UntrustedError
from sglang_warmstart.bundle import archive, packing, toolchain
from sglang_warmstart.bundle import manifest as manifests
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.signature import PrivateKey, PublicKey
from sglang_warmstart.bundle.source import shown
from sglang_warmstart.bundle.toolchain import ToolchainError
from sglang_warmstart.cli.ending import read_plans
from sglang_warmstart.cli.show import show_plan
from sglang_warmstart.deepgemm import compiler as compilers
from sglang_warmstart.deepgemm import further
from sglang_warmstart.deepgemm import plan as plans
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.compiler import CompilerError
from sglang_warmstart.deepgemm.dialects import DIALECTS, FIRST_JIT
from sglang_warmstart.deepgemm.flags import unknown_option
from sglang_warmstart.deepgemm.identity import Gpu, Identity, build_hash
from sglang_warmstart.deepgemm.marker import FurtherKernel, MarkerError, Markers, TargetKernels
from sglang_warmstart.deepgemm.plan import INCLUDE, Plan, PlanError
from sglang_warmstart.deepgemm.target import KernelUse, Target
from sglang_warmstart.libraries.recipe import Recipe
from sglang_warmstart.libraries.table import LIBRARIES
from sglang_warmstart.node import protocol
from sglang_warmstart.node.protocol import ProtocolError
from sglang_warmstart.report.page import page_of
from sglang_warmstart.report.reading import NoEventsError, read_run
from sglang_warmstart.report.summary import as_json, summarise
from sglang_warmstart.report.text import show
from sglang_warmstart.report.trace import trace_of
from sglang_warmstart.sglang.caches import deep_gemm_cache
from sglang_warmstart.sglang.exact_warmup.immaterial import is_material
from sglang_warmstart.sglang.features import chosen_features

from kit.bundles import LAUNCH, bundle_of, compressed, cubin, recorded_plan, tar_of, tiny_plan
from kit.other_bytes import other_bytes as mutated
from kit.recorded import recording

WORDS = (
    "",
    " ",
    ".",
    "..",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "a\r\nwarmstart: all is well",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\u202eabc",
    "\u2028",
    "\ud800",
    "\udcff",
    "\U0001f600",
    "x" * 300,
    "x" * 5000,
    "$(touch ran)",
    "`touch ran`",
    "; touch ran",
    "| touch ran",
    "${IFS}",
    "%s%n",
    "-rf",
    "--help",
    "-ccbin=evil",
    "-I/tmp/`touch${IFS}ran`",
    "{include}",
    "file:///etc/passwd",
    "kernel.a.00000000000000000000000000000000",
    "kernel.../../a.00000000000000000000000000000000",
    "[bold]markup[/bold]",
    "</script><script>",
    "0",
    "-1",
    "1e400",
    "nan",
    "\u0661",
    "\u00b2",
    "1" * 5000,
    ":",
    "a:b:c",
    "~nobody/x",
)
NUMBERS = (0, -1, 1, 7, 255, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 64, 10**40, 0.5, -0.0, 1e308)
_JSON = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, '"\\ud800"', "tru", '{"a":1,"a":2}')
_DEEP = (100, 1000, 20_000)


_BYTES = (0, 1, 0x1B, 0x7F, 0x80, 0xC1, 0xFF, 0x22, 0x2F, 0x5C, 0x7D)
other_bytes = functools.partial(mutated, special=_BYTES)


def other_value(rng: random.Random, value: Any) -> Any:
    """A value of JSON or MessagePack with something in it changed."""
    places = list(_places(value))
    holder, key = rng.choice(places) if places else ([value], 0)
    old = holder[key]
    new: Any = rng.choice([rng.choice(WORDS), rng.choice(NUMBERS), None, True, [], {}, old, [old], {"a": old}])
    if isinstance(old, str) and rng.random() < 0.6:
        word = rng.choice(WORDS)
        new = rng.choice((word, old + word, word + old, f"../{old}", old.upper(), old[: len(old) // 2]))
    elif isinstance(old, int | float) and rng.random() < 0.6:
        new = rng.choice((*NUMBERS, old + 1, -old))
    match rng.randrange(6):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(WORDS)] = holder.pop(key)
        case 2 if isinstance(holder, list):
            holder.append(old)
        case _:
            holder[key] = new
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def other_json(rng: random.Random, value: Any) -> bytes:
    """The text of a changed value, which need not be JSON."""
    for _ in range(rng.randint(1, 3)):
        value = other_value(rng, value)
    # Numbers that are none are written as Python does: NaN, Infinity.
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.15:
        deep = rng.choice(_DEEP)
        bomb = rng.choice(
            (*_JSON, "[" * deep, '{"a":' * deep, "[" * deep + "]" * deep, '{"a":' * deep + "0" + "}" * deep)
        )
        values = [match.span() for match in re.finditer(r'(?<=: )("[^"]*"|-?\d+|null|true|\[\]|\{\})', text)]
        start, end = rng.choice(values) if values else (0, 0)
        text = text[:start] + bomb + text[end:]
    if rng.random() < 0.1:
        text = re.sub(r'("\w+": )', r"\1null, \1", text, count=rng.randint(1, 3))
    return text.encode(errors="surrogatepass")


def other_text(rng: random.Random, value: Callable[[], Any]) -> bytes:
    """A JSON file, changed in its bytes or in what it says."""
    if rng.random() < 0.3:
        return other_bytes(rng, json.dumps(value()).encode())
    return other_json(rng, value())


class Subject(ABC):
    """One kind of input.

    Args:
        directory: of its files; nothing is written outside of it.
    """

    # What it may raise.
    errors: tuple[type[Exception], ...]

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def input_of(self, rng: random.Random) -> Any:
        """An input."""

    @abstractmethod
    def feed(self, given: Any) -> None:
        """Read it, as the product does.

        Raises:
            Exception: one of ``errors``.
        """

    def try_one(self, seed: int) -> str:
        """Read the input of a seed. Returns what was said of it; nothing if it was taken.

        Raises:
            AssertionError: what was said is not one printable line.
            Exception: it crashed.
        """
        given = self.input_of(random.Random(seed))
        try:
            self.feed(given)
        except self.errors as error:
            said = str(error)
            assert said.isprintable(), f"not a printable line: {said!r}"
            assert len(said) < 2000, f"a line of {len(said)} characters"
            return said or type(error).__name__
        return ""


def _kernel(number: int) -> str:
    return f"kernel.k{number}.{number:032x}"


class MarkerFile(Subject):
    """A marker in a cache, as a service and as `plan export` read it."""

    errors = (MarkerError, PlanError)

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        package = directory / "deep_gemm"
        (package / "include" / "deep_gemm").mkdir(parents=True)
        self._identity = Identity(
            gpu="NVIDIA H200",
            num_sms=132,
            capability=(9, 0),
            deep_gemm=build_hash(package),
            installed_in=str(package),
            compiler=recording().compiler,
            kind="nvcc",
            settings={},
        )
        self._cache = KernelCache(directory / "cache")
        self._markers = Markers(self._cache, self._identity)
        self._target = Target(kernel_type="GEMM_NT_F8F8BF16", n=512, k=7168, num_groups=1, num_sms=132, m_max=64)
        flags = f"-O3 -I{package}/include"
        signature, sources = self._identity.compiler, [f"// {number}" for number in range(3)]
        names = [FIRST_JIT.directory_of(_kernel(number), signature, flags, sources[number]) for number in range(3)]
        for name, source in zip(names, sources, strict=True):
            self._cache.publish(name, source, cubin(source.encode()))
        uses = tuple(KernelUse(m, name) for m, name in enumerate(names[:2], 1))
        self._markers.add(LAUNCH, [TargetKernels(self._target, uses, (flags,))], [FurtherKernel(names[2], flags)])
        self._path = self._markers.path(LAUNCH)
        self._good = self._path.read_bytes()
        self._kept = directory / "kept"
        shutil.copytree(self._cache.root, self._kept)
        self._count = 0

    def input_of(self, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            # Of the right identity: so it is read to its end.
            value = json.loads(self._good)
            identity = value.pop("identity")
            changed = other_json(rng, value).rstrip()
            return b'{"identity": ' + json.dumps(identity).encode() + b", " + changed[1:]
        return other_text(rng, functools.partial(json.loads, self._good))

    def feed(self, given: bytes) -> None:
        if not (self._markers.cache.root / "cache").is_dir() or len(list((self._cache.root / "cache").iterdir())) < 3:
            shutil.rmtree(self._cache.root)
            shutil.copytree(self._kept, self._cache.root)
        for path in self._path.parent.glob("*.set-aside"):
            path.unlink()
        self._path.write_bytes(given)
        for each in self._markers.all():
            str([str(target.target) for target in each.targets])
        self._markers.find(self._target)
        try:
            exported = packing.export(self._cache.root)
        except PlanError:
            pass
        else:
            # What is exported is a plan that others take.
            plans.decode(plans.encode(exported.plan))
        self._markers.load(LAUNCH)


class PlanFile(Subject):
    """A plan, as the commands read it, show it and name its packages."""

    errors = (PlanError, ToolchainError)

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._path, self._good = directory / "plan.json", directory / "good.json"
        self._texts = [plans.encode(each) for each in (tiny_plan(), recorded_plan())]
        self._good.write_bytes(self._texts[0])

    def input_of(self, rng: random.Random) -> bytes:
        text = self._texts[rng.random() < 0.05]
        if rng.random() < 0.4:
            # Its kernels have the names of what they are now: so it is read to its end.
            value = other_value(rng, json.loads(text))
            return _with_its_names(value)
        return other_text(rng, functools.partial(json.loads, text))

    def feed(self, given: bytes) -> None:
        self._path.write_bytes(given)
        plan = read_plans([self._path])
        for line in plan.flags:
            assert unknown_option(line, INCLUDE) is None
        said = io.StringIO()
        show_plan(plan, Console(file=said, width=100))
        assert said.getvalue().replace("\n", "").isprintable(), said.getvalue()
        for launch in plan.launches:
            plan.targets_of(launch, Path("/opt/include"), plan.directories(Path("/opt/include")))
            _ = plan.identity_of(launch, Path("/opt/deep_gemm"), plan.compiler).digest
        assert plans.decode(plans.encode(plan)) == plan
        for line in toolchain.requirements_of(plan):
            assert re.fullmatch(r"[\w.-]+==[\w.+!*-]+", line), line
        read_plans([self._path, self._good])


def _with_its_names(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")
    try:
        plan = msgspec.json.decode(text, type=Plan)
        names = {name: plan.directory_of(name, Path(INCLUDE)) for name in plan.kernels}
    except Exception:
        return text
    for name, other in names.items():
        text = text.replace(name.encode(), other.encode())
    return text


class EventFiles(Subject):
    """The events of a run, in each form of the report."""

    errors = (NoEventsError,)
    _PROCESS: Mapping[str, Any] = {
        "role": "main",
        "pid": 7,
        "host": "gpu-node-7",
        "boot": "a-boot",
        "started": 43200.0,
        "epoch": 1789000000.0,
        "labels": {"tp_rank": "0"},
    }
    _EVENT: Mapping[str, Any] = {
        "kind": "compile",
        "name": "sm90_fp8_gemm_1d2d.00000000",
        "at": 43201.5,
        "seconds": 2.5,
        "phase": "startup",
        "library": "deep-gemm",
        "lane": "worker 1",
        "shape": "8x8",
        "target": "fp8_gemm_nt n=2112 k=7168",
        "kernels": 1,
        "cached": False,
        "error": "none",
        "remedy": "none",
    }

    def input_of(self, rng: random.Random) -> dict[str, bytes]:
        found = {}
        for number in range(rng.randint(1, 3)):
            kinds = ("step", "discover", "record", "compile", "load", "restore", "ready", "jit")
            events = [
                {**self._EVENT, "kind": rng.choice(kinds), "at": 43200.0 + each} for each in range(rng.randint(0, 4))
            ]
            process = {**self._PROCESS, "role": rng.choice(("main", "rank", "service", "x")), "pid": number}
            if rng.random() < 0.3:
                process["boot"] = "another"
            lines = [json.dumps(process).encode(), *(json.dumps(each).encode() for each in events)]
            at = rng.randrange(len(lines))
            lines[at] = other_json(rng, json.loads(lines[at]))
            data = b"\n".join(lines) + b"\n"
            name = f"{rng.choice(('main', 'rank', 'service'))}-{number}{rng.choice(('', '.1', '.x', '.²'))}.jsonl"
            found[name] = other_bytes(rng, data) if rng.random() < 0.3 else data
        return found

    def feed(self, given: dict[str, bytes]) -> None:
        run = self.directory / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for name, data in given.items():
            (run / name).write_bytes(data)
        summaries = [summarise(read_run(run))]
        said = io.StringIO()
        show(summaries, Console(file=said, width=120))
        assert said.getvalue().replace("\n", "").isprintable(), said.getvalue()
        page = page_of(summaries)
        assert page.count("</script>") == 2
        json.dumps(as_json(summaries[0]), allow_nan=False)
        json.dumps(trace_of([each.run for each in summaries]), allow_nan=False)


class Messages(Subject):
    """Frames of the protocol between ranks and the service."""

    errors = (ProtocolError,)

    def input_of(self, rng: random.Random) -> bytes:
        frame = protocol.encode(rng.choice(messages()))
        if rng.random() < 0.3:
            return other_bytes(rng, frame)
        value = msgspec.msgpack.decode(frame[protocol.LENGTH.size :])
        for _ in range(rng.randint(1, 3)):
            value = other_value(rng, value)
        if rng.random() < 0.05:
            deep = rng.choice(_DEEP)
            return bytes(4) + rng.choice(
                (b"\x91" * deep, b"\x81\xa1a" * deep, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff")
            )
        try:
            body = msgspec.msgpack.encode(value)
        except (OverflowError, UnicodeEncodeError):
            body = other_bytes(rng, frame)
        return protocol.LENGTH.pack(len(body)) + body

    def feed(self, given: bytes) -> None:
        if len(given) < protocol.LENGTH.size:
            return
        protocol.length_of(given[: protocol.LENGTH.size])
        message = protocol.decode(given[protocol.LENGTH.size :])
        assert protocol.decode(protocol.encode(message)[protocol.LENGTH.size :]) == message


@functools.cache
def messages() -> tuple[protocol.Message, ...]:
    """One of each kind."""
    target = Target(kernel_type="GEMM_NT_F8F8BF16", n=512, k=7168, num_groups=1, num_sms=132, m_max=64)
    gpu = Gpu("NVIDIA H200", 132, (9, 0), 0)
    hello = protocol.Hello("/nonexistent/cache", {"CUDA_HOME": "/nonexistent"}, "/nonexistent/deep_gemm", gpu, LAUNCH)
    warmed = protocol.Warmed(target, (KernelUse(1, _kernel(1)),))
    form = {"directory": "m", "file": "m/build.ninja", "text": "", "sources": {"m/a.cc": ""}, "lock": "m/lock"}
    recipe = Recipe("flashinfer", "norm", form, "m/*.so", 33.0)
    return (
        hello,
        protocol.Welcome(("a note",), "a problem", True),
        protocol.Restore(),
        protocol.CannotDescribe("a target", "a reason"),
        protocol.Announce((target,), 1 << 30),
        protocol.Warm((target,), 1 << 30, 0.1),
        protocol.Answer((warmed,), 1, ("a note",), True),
        protocol.Build(recipe),
        protocol.Compiled(recipe),
        protocol.BuildPlanned("/nonexistent/plan.json", {"SGLANG_WARMSTART_EVENTS": "/nonexistent"}),
        protocol.AwaitBuilds(0.1),
        protocol.Built(1, ("a reason",), 2),
    )


class Variables(Subject):
    """The environment: every switch, and every variable that says where something is."""

    errors = ()
    _NAMES = (
        *(switch.name for switch in SWITCHES),
        *("DG_JIT_CACHE_DIR", "DJ_JIT_CACHE_DIR", "DG_JIT_NVCC_COMPILER", "DJ_JIT_NVCC_COMPILER", "DG_JIT_DEBUG"),
        *("SGLANG_DG_CACHE_DIR", "SGLANG_CACHE_DIR", "SGLANG_JIT_CACHE_DIR", "SGLANG_CUTE_AOT_CACHE_DIR"),
        *("TRITON_CACHE_DIR", "TILELANG_CACHE_DIR", "TVM_FFI_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"),
        *("FLASHINFER_WORKSPACE_BASE", "XDG_CACHE_HOME", "HOME", "CUDA_HOME", "CUDA_PATH", "PATH", "CC"),
    )

    def input_of(self, rng: random.Random) -> dict[str, str]:
        # What a process can be given: bytes without nul, and Python has those that are no UTF-8 as \udcXX.
        words = [word for word in WORDS if "\0" not in word and "\ud800" not in word]
        given = {}
        for name in rng.sample(self._NAMES, rng.randint(1, 8)):
            word = rng.choice(words)
            given[name] = rng.choice((word, f"{self.directory}/{word}", word * 2, f"1{word}", f"https://u:p@h/{word}"))
        return given

    def feed(self, given: dict[str, str]) -> None:
        complaints = [*(switch.read(given)[1] for switch in SWITCHES), chosen_features(given)[1]]
        for said in filter(None, complaints):
            assert said.isprintable(), said
        left_out_by(given)
        for name, word in given.items():
            is_material(name)
            shown(word)
        cache = deep_gemm_cache(given)
        for dialect in DIALECTS:
            dialect.settings(given)
            roots = dialect.roots(given.get("SGLANG_DG_CACHE_DIR") or str(cache))
            try:
                trust.check_caches(roots, given)
            except UntrustedError as error:
                assert str(error).isprintable(), str(error)
            found = KernelCache.of(roots[0], dialect)
            with contextlib.suppress(OSError):  # a name that is too long for a file system: whoever asks, says so
                found.has("a")
                list(Markers(found, _identity(given, dialect.name)).all())
            further.names_in(found)
            try:
                compilers.find_path(given, dialect)
            except CompilerError as error:
                assert str(error).isprintable(), str(error)
        for library in LIBRARIES.values():
            library.root(given)


def _identity(settings: dict[str, str], jit: str) -> Identity:
    # A rank whose settings are no UTF-8 cannot tell the service: it says so, and SGLang warms up in its own way.
    own = {name: value for name, value in settings.items() if name.startswith(("DG_", "DJ_")) and value.isprintable()}
    return Identity("gpu", 132, (9, 0), "build", "/opt/deep_gemm", "nvcc", "nvcc", own, jit)


class SignedBundle(Subject):
    """A bundle that a key must have signed: what is taken is what was signed."""

    errors = (BundleError,)

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        key = PrivateKey(bytes(range(32)))
        self._key = key.public_key
        self._bundle = bundle_of(tiny_plan(), [cubin(b"one"), cubin(b"two")])
        self._text = manifests.encode(self._bundle.manifest)
        self._signature = key.sign(self._text)
        self._pem = _pem(key)

    def input_of(self, rng: random.Random) -> tuple[bytes, bytes]:
        pem = other_bytes(rng, self._pem) if rng.random() < 0.1 else b""
        members = self._bundle.members(self._signature)
        at = rng.randrange(3)
        if at < 2:
            info, data = members[at]
            data = other_bytes(rng, data) if at or rng.random() < 0.5 else other_json(rng, json.loads(data))
            info.size = len(data)
            members[at] = (info, data)
            return compressed(tar_of(members)), pem
        tar = tar_of(members)
        return (compressed(other_bytes(rng, tar)) if rng.random() < 0.5 else other_bytes(rng, compressed(tar))), pem

    def feed(self, given: tuple[bytes, bytes]) -> None:
        archived, pem = given
        if pem:
            path = self.directory / "key.pem"
            path.write_bytes(pem)
            PublicKey.load(path)
        manifest = archive.read(io.BytesIO(archived), is_signed_by=self._key)
        assert manifest == self._bundle.manifest, "another manifest than the one that was signed"


def _pem(key: PrivateKey) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = Ed25519PrivateKey.from_private_bytes(key.raw).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


SUBJECTS: Mapping[str, type[Subject]] = {
    "marker": MarkerFile,
    "plan": PlanFile,
    "events": EventFiles,
    "messages": Messages,
    "environment": Variables,
    "signed bundle": SignedBundle,
}
