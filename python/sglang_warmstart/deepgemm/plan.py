"""Plans: the DeepGEMM kernels that a server needs, as sources and flags that any machine can compile.

In DeepGEMM 0.1.x, the name of a kernel is a hash of its flags, among other things. One flag is the path of DeepGEMM's
headers. A plan has a placeholder for that path. Where a bundle is unpacked, the names are computed anew for the path
there. In DeepGEMM 0.2.x a kernel has the same name everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from sglang_warmstart.base.errors import QuotingError
from sglang_warmstart.deepgemm.cache import KernelCache
from sglang_warmstart.deepgemm.dialects import Dialect, UnknownJitError, named
from sglang_warmstart.deepgemm.flags import unknown_option
from sglang_warmstart.deepgemm.identity import Identity
from sglang_warmstart.deepgemm.marker import FurtherKernel, Launch, TargetKernels
from sglang_warmstart.deepgemm.record.stand_in import RecordedKernel
from sglang_warmstart.deepgemm.target import KernelUse, Target

FORMAT = 1
INCLUDE = "{include}"
# How the kernels of a plan were recorded.
ON_GPU, NO_GPU = "on a GPU", "without a GPU"
_NAME_LIMIT = 255  # bytes, as file systems have it


class PlanError(QuotingError):
    """What is wrong with a plan, in one line."""


class PlannedKernel(msgspec.Struct, frozen=True):
    """What the compiler is given for a kernel.

    Args:
        flags: which of the plan's lines of flags.
        source: CUDA source.
    """

    flags: int
    source: str


class LeftOut(msgspec.Struct, frozen=True, order=True):
    """A target that is not in the plan, and why."""

    target: str
    reason: str


class PlannedLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank of a server needs.

    Args:
        gpu, num_sms, capability, settings: as of :class:`Identity`.
        launch: what the rank was started with, as far as it decides which targets there are.
        targets: with the plan's names of their kernels, and without flags: the kernels have them.
        further: the plan's names of kernels that belong to no target.
        searched: see :class:`.marker.Marker`.
    """

    gpu: str
    num_sms: int
    capability: tuple[int, int]
    settings: dict[str, str]
    launch: Launch
    targets: tuple[TargetKernels, ...]
    further: tuple[str, ...] = ()
    searched: bool = True


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Kernels for DeepGEMM, and the ranks that need them.

    Args:
        format: of this file.
        deep_gemm: version of the distribution that brought it, such as ``sgl-deep-gemm 0.1.0``; empty if unknown.
        build, headers: hashes of its build, and of its headers alone (see :mod:`.identity`).
        compiler: what it prints for ``--version``.
        kind: nvcc or nvrtc.
        launches: who needs which.
        left_out: targets that could not be recorded.
        flags: lines of flags, with ``{include}`` for the directory of DeepGEMM's headers.
        kernels: by name: DeepGEMM's for it, if that placeholder were the path.
        jit: the name of that DeepGEMM's dialect.
        made: how it was recorded.
    """

    format: int = FORMAT
    deep_gemm: str
    build: str
    headers: str
    compiler: str
    kind: str
    launches: tuple[PlannedLaunch, ...]
    left_out: tuple[LeftOut, ...] = ()
    flags: tuple[str, ...]
    kernels: dict[str, PlannedKernel]
    jit: str = "0.1"
    made: str = ON_GPU

    @property
    def dialect(self) -> Dialect:
        """That of its DeepGEMM."""
        return named(self.jit)

    def cache_in(self, root: Path) -> KernelCache:
        """The cache that its kernels belong into: NVRTC's are kept apart from nvcc's.

        Args:
            root: the value of ``DG_JIT_CACHE_DIR``.
        """
        return KernelCache.of(root, self.dialect, below="nvrtc" if self.kind == "nvrtc" else "")

    def flags_of(self, name: str, include: Path) -> str:
        """The flags of a kernel where DeepGEMM's headers are in ``include``."""
        return self.flags[self.kernels[name].flags].replace(INCLUDE, str(include))

    def directory_of(self, name: str, include: Path) -> str:
        """DeepGEMM's name for a kernel there."""
        flags, source = self.flags_of(name, include), self.kernels[name].source
        return self.dialect.directory_of(name, self.compiler, flags, source)

    def identity_of(self, launch: PlannedLaunch, deep_gemm: Path, compiler: str) -> Identity:
        """What a rank compiles with where DeepGEMM is in ``deep_gemm`` and the compiler says ``compiler`` of itself."""
        return Identity(
            gpu=launch.gpu,
            num_sms=launch.num_sms,
            capability=launch.capability,
            deep_gemm=self.build,
            installed_in=str(deep_gemm),
            compiler=compiler,
            kind=self.kind,
            settings=launch.settings,
            jit=self.jit,
        )

    def directories(self, include: Path) -> dict[str, str]:
        """DeepGEMM's names there, by the plan's."""
        return {name: self.directory_of(name, include) for name in self.kernels}

    def targets_of(self, launch: PlannedLaunch, include: Path, directories: Mapping[str, str]) -> list[TargetKernels]:
        """The targets of a launch with DeepGEMM's names for their kernels there, and the flags.

        Args:
            directories: by :meth:`directories`.
        """
        return [
            TargetKernels(
                each.target,
                tuple(sorted(KernelUse(use.m, directories[use.directory]) for use in each.kernels)),
                tuple(sorted({self.flags_of(use.directory, include) for use in each.kernels})),
            )
            for each in launch.targets
        ]

    def further_of(self, launch: PlannedLaunch, include: Path, directories: Mapping[str, str]) -> list[FurtherKernel]:
        """The same of the kernels that belong to no target."""
        return [FurtherKernel(directories[name], self.flags_of(name, include)) for name in launch.further]


class Planner:
    """Makes a plan of one build of DeepGEMM and one compiler.

    Args:
        identity: of the ranks; of its GPU and settings each launch has its own.
        deep_gemm: version of the distribution that brought it.
        headers: hash of its headers.
        made: how the kernels were recorded.
    """

    def __init__(self, identity: Identity, deep_gemm: str, headers: str, made: str = ON_GPU) -> None:
        self._identity, self._deep_gemm, self._headers, self._made = identity, deep_gemm, headers, made
        self._include = str(Path(identity.installed_in, "include"))
        self._dialect = named(identity.jit)
        self._flags: list[str] = []
        self._kernels: dict[str, PlannedKernel] = {}
        self._launches: list[PlannedLaunch] = []
        self._left_out: list[LeftOut] = []

    def add(
        self,
        identity: Identity,
        launch: Launch,
        targets: Iterable[tuple[Target, list[RecordedKernel]]],
        further: Iterable[RecordedKernel] = (),
        searched: bool = True,
    ) -> None:
        """Add a launch, the kernels of its targets, and those that belong to no target.

        Args:
            searched: see :class:`.marker.Marker`.
        """
        planned = [
            TargetKernels(target, tuple(sorted(KernelUse(kernel.m, self._name(kernel)) for kernel in kernels)))
            for target, kernels in targets
        ]
        self._launches.append(
            PlannedLaunch(
                gpu=identity.gpu,
                num_sms=identity.num_sms,
                capability=identity.capability,
                settings=identity.settings,
                launch=launch,
                targets=tuple(sorted(planned, key=lambda each: each.target)),
                further=tuple(sorted({self._name(kernel) for kernel in further})),
                searched=searched,
            )
        )

    def leave_out(self, target: str, reason: str) -> None:
        """Say why a target is not in it."""
        self._left_out.append(LeftOut(target, reason))

    def plan(self) -> Plan:
        """The plan of all that was added."""
        return Plan(
            deep_gemm=self._deep_gemm,
            build=self._identity.deep_gemm,
            headers=self._headers,
            compiler=self._identity.compiler,
            kind=self._identity.kind,
            launches=tuple(self._launches),
            left_out=tuple(sorted(set(self._left_out))),
            flags=tuple(self._flags),
            kernels=dict(sorted(self._kernels.items())),
            jit=self._identity.jit,
            made=self._made,
        )

    def _name(self, kernel: RecordedKernel) -> str:
        return _put(kernel, self._include, self._dialect, self._identity.compiler, self._flags, self._kernels)


def _put(
    kernel: RecordedKernel,
    include: str,
    dialect: Dialect,
    compiler: str,
    lines: list[str],
    kernels: dict[str, PlannedKernel],
) -> str:
    """Put a kernel into a plan's lines of flags and kernels. Returns the plan's name for it."""
    flags = kernel.flags.replace(include, INCLUDE)
    if flags not in lines:
        lines.append(flags)
    name = dialect.directory_of(kernel.directory, compiler, flags, kernel.source)
    kernels[name] = PlannedKernel(lines.index(flags), kernel.source)
    return name


def with_further(plan: Plan, further: Iterable[RecordedKernel], include: Path) -> Plan:
    """A plan whose launches all have further kernels, too.

    Args:
        include: where DeepGEMM's headers are.
    """
    flags, kernels = list(plan.flags), dict(plan.kernels)
    names = {_put(each, str(include), plan.dialect, plan.compiler, flags, kernels) for each in further}
    return msgspec.structs.replace(
        plan,
        flags=tuple(flags),
        kernels=dict(sorted(kernels.items())),
        launches=tuple(
            msgspec.structs.replace(each, further=tuple(sorted({*each.further, *names}))) for each in plan.launches
        ),
    )


def merged(plans: Mapping[str, Plan]) -> Plan:
    """One plan of several, by where each is from.

    Raises:
        PlanError: they are of different compilers or builds of DeepGEMM.
    """
    (first_name, first), *others = plans.items()
    flags = list(first.flags)
    kernels = dict(first.kernels)
    launches = {_key(each): each for each in first.launches}
    left_out = set(first.left_out)
    made = first.made
    for name, plan in others:
        for what in ("build", "compiler", "kind", "jit"):
            mine, its = getattr(first, what), getattr(plan, what)
            if mine != its:
                raise PlanError(
                    f"{first_name} and {name} are not of the same {what}: {_brief(mine)} and {_brief(its)}: "
                    "compile them one by one"
                )
        flags += [line for line in plan.flags if line not in flags]
        for kernel, planned in plan.kernels.items():
            kernels.setdefault(kernel, PlannedKernel(flags.index(plan.flags[planned.flags]), planned.source))
        for each in plan.launches:
            known = launches.get(_key(each))
            launches[_key(each)] = each if known is None else _united(known, each)
        left_out |= set(plan.left_out)
        made = made if made == plan.made else f"{ON_GPU}, and {NO_GPU}"
    there = {str(each.target) for launch in launches.values() for each in launch.targets}
    left_out = {each for each in left_out if each.target not in there}
    return msgspec.structs.replace(
        first,
        made=made,
        flags=tuple(flags),
        kernels=dict(sorted(kernels.items())),
        launches=tuple(launches.values()),
        left_out=tuple(sorted(left_out)),
    )


class Head(msgspec.Struct):
    """The field of a file that is read before all others: it says how to read them."""

    format: int


def encode(plan: Plan) -> bytes:
    """The plan as it is kept: JSON that a person can read, a line per value."""
    return msgspec.json.format(msgspec.json.encode(plan, order="deterministic"), indent=1) + b"\n"


def decode(data: bytes) -> Plan:
    """A plan that holds together.

    Raises:
        PlanError: it is none, or does not.
    """
    try:
        head = msgspec.json.decode(data, type=Head)
        if head.format != FORMAT:
            raise PlanError(f"a plan of format {head.format}, this version reads format {FORMAT}")
        plan = msgspec.json.decode(data, type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"not a plan: {error}") from error
    check(plan)
    return plan


def check(plan: Plan) -> None:
    """See whether a plan holds together: its names are those of its sources and flags, and none is missing.

    Raises:
        PlanError: it does not.
    """
    try:
        problem = plan.dialect.check_compiler(plan.compiler)
    except UnknownJitError as error:
        raise PlanError(str(error)) from error
    if problem:
        raise PlanError(problem)
    for line in plan.flags:
        if (option := unknown_option(line, INCLUDE)) is not None:
            raise PlanError(f"{option!r} is no option that DeepGEMM gives to its compiler: do not compile this plan")
    for name, kernel in plan.kernels.items():
        if len(name) > _NAME_LIMIT:
            raise PlanError(f"{name[:_NAME_LIMIT]}...: too long for the name of a directory")
        if not 0 <= kernel.flags < len(plan.flags):
            raise PlanError(f"{name}: there is no line {kernel.flags} of flags")
        try:
            expected = plan.directory_of(name, Path(INCLUDE))
        except ValueError as error:
            raise PlanError(str(error)) from error
        if expected != name:
            raise PlanError(f"{name}: its source or its flags are not those that it was named for")
    for launch in plan.launches:
        for each in launch.targets:
            for use in each.kernels:
                if use.directory not in plan.kernels:
                    raise PlanError(f"{each.target} needs {use.directory}, which is not in the plan")
        for name in launch.further:
            if name not in plan.kernels:
                raise PlanError(f"a further kernel, {name}, is not in the plan")


def _united(first: PlannedLaunch, second: PlannedLaunch) -> PlannedLaunch:
    targets = {each.target: each for each in (*first.targets, *second.targets)}
    return msgspec.structs.replace(
        first,
        targets=tuple(targets[target] for target in sorted(targets)),
        further=tuple(sorted({*first.further, *second.further})),
        searched=first.searched or second.searched,
    )


def _key(launch: PlannedLaunch) -> bytes:
    return msgspec.json.encode(
        msgspec.structs.replace(launch, targets=(), further=(), searched=True), order="deterministic"
    )


def _brief(value: str) -> str:
    return (value.strip().splitlines() or [""])[-1][:80]
