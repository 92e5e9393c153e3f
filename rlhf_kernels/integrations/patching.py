"""How functions of a host trainer are replaced by ours, and put back.

A function is replaced in the module that defines it and in every module of the host that holds it
by name; a module elsewhere that imported it by name before keeps the host's. Where a module is not
loaded yet, an import hook waits for it; so the order of ``patch`` and of the host's import does not
matter, and nothing of the host is imported for it.

What is replaced is checked first: the function has to have the signature that the replacement was
written for, and in a version of the host that was not tested it also has to give the values and
gradients that the replacement gives on a few small calls on the CPU. What does not pass is left
alone, and the report says why in words; errors behind it are logged at level DEBUG.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import logging
import math
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Calls = Callable[[], Iterator[tuple[Any, ...]]]  # of (args, kwargs) or (args, kwargs, leaves)
_log = logging.getLogger(__name__)


class LeftAlone(Exception):
    """Raised by ``make`` or ``put``: why a function is left alone, as a sentence of the report."""


@dataclass(frozen=True)
class Replacement:
    """One function of a host, and what takes its place.

    Attributes:
        path: "package.module:name"; the name may be one of a class, "Class.method".
        signature: ``str(inspect.signature(function))`` without annotations and quotes; of an
            autograd function, or its ``apply``, that of its ``forward``.
        make: called as make(original, strict); returns the function that takes its place.
        calls: (args, kwargs) of small calls on the CPU on which the two have to agree, also in the
            gradients of the tensors that require them, and of others in a third place.
        what: what is computed, for the report.
        also: other signatures that it serves, each with its calls.
        formula: what it computes, in plain PyTorch. For a function that takes no CPU tensors in
            the host, and whose replacement serves no others: where the host's raises on the calls,
            the replacement is compared with this.
    """

    path: str
    signature: str
    make: Callable[[Any, bool], Any]
    calls: Calls
    what: str
    also: Mapping[str, Calls] = field(default_factory=dict)
    formula: Callable[..., Any] | None = None

    @property
    def module(self) -> str:
        return self.path.partition(":")[0]

    @property
    def name(self) -> str:
        return self.path.partition(":")[2]


@dataclass(frozen=True)
class Addition:
    """Something that a host's own registry takes, put there when its module is loaded.

    Attributes:
        path: "package.module:name" of what is added, for the report.
        like: the function of the same module that computes the same.
        signature: of that one.
        make: called as make(that one, strict); returns what is added.
        calls: arguments on which the two have to agree.
        put: called as put(module, ours); returns the function that takes it out again.
        what: what is computed, for the report.
    """

    path: str
    like: str
    signature: str
    make: Callable[[Any, bool], Any]
    calls: Calls
    put: Callable[[types.ModuleType, Any], Callable[[], None]]
    what: str
    also: Mapping[str, Calls] = field(default_factory=dict)

    @property
    def module(self) -> str:
        return self.path.partition(":")[0]


@dataclass(frozen=True)
class _Swap:
    path: str
    original: Any
    ours: Any
    inherited: bool  # by the class that has ours now


@dataclass
class Entry:
    """A line of the report.

    Attributes:
        path: of the function.
        status: replaced | added (to a registry) | waiting (its module is not loaded yet) |
            left alone | overridden (by somebody else, since) | not patched.
        modules: where the replacement is, ``module.name``.
        reason: why it was left alone; for the others what is computed.
    """

    path: str
    status: str
    modules: list[str] = field(default_factory=list)
    reason: str = ""


class Report(list[Entry]):
    """Entries, with a table as their string."""

    def __init__(self, title: str, entries: Sequence[Entry]):
        super().__init__(entries)
        self.title = title

    def __str__(self) -> str:
        lines = [self.title]
        for entry in self:
            lines.append(
                f"  {entry.status:<12}{entry.path}" + f": {entry.reason}" * bool(entry.reason)
            )
            others = [name for name in entry.modules if name != entry.path.replace(":", ".")]
            lines += [f"{'':<14}also as {name}" for name in others]
        if any(entry.status == "left alone" for entry in self):
            lines.append("What is left alone the trainer computes itself, as without the patch.")
        return "\n".join(lines)


def signature_of(function: Any) -> str:
    """The signature without annotations: names, kinds and defaults."""
    if getattr(function, "__name__", None) == "apply":  # of an autograd function, as a function
        function = getattr(function, "__self__", function)
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        function = function.forward  # its own says nothing
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


class Host:
    """A trainer package whose functions can be replaced.

    Args:
        package: its import name, which is the distribution's as well.
        tested: versions that the replacements were tested with, as numbers: (1, 2) is every 1.2.x,
            and (1, 2, 3) that release alone. Pre-releases are none of them.
        replacements: what is replaced.
        left_alone: "module:name" -> why it is not replaced, for the report.
        additions: what is added to its registries.
    """

    def __init__(
        self,
        package: str,
        tested: Sequence[tuple[int, ...]],
        replacements: Sequence[Replacement],
        left_alone: dict[str, str],
        additions: Sequence[Addition] = (),
    ):
        self.package, self.tested = package, tuple(tested)
        self.replacements, self.left_alone = tuple(replacements), left_alone
        self.additions = tuple(additions)
        self._on = False
        self._strict = True
        self._blocks: set[object] = set()  # of ``with patched()``, where one of them patched
        self._swaps: list[_Swap] = []
        self._refused: dict[str, str] = {}
        self._added: dict[str, Callable[[], None]] = {}  # path -> what takes it out again

    # ---- what the modules of the adapters export ------------------------------------------------

    def patch(self, *, strict: bool = True) -> None:
        """Replace what can be replaced; to patch again does nothing more.

        Args:
            strict: give NaN where the host gives NaN; False: what our operators give there.

        Raises:
            ModuleNotFoundError: the host is not installed.
            RuntimeError: it is patched already, with the other ``strict``.
        """
        self._turn_on(strict, stacklevel=3)

    def unpatch(self) -> None:
        """Put everything back, but where somebody else has put something since; where nothing is
        patched nothing is done."""
        with _lock:
            for swap in reversed(self._swaps):
                self._put_back(swap)
            for take_out in self._added.values():
                take_out()
            self._swaps, self._added, self._blocks, self._on = [], {}, set(), False

    @contextlib.contextmanager
    def patched(self, *, strict: bool = True) -> Iterator[None]:
        """``patch`` for a ``with`` block; when the last of several is left, in whatever threads, it
        is as it was, patched or not."""
        block = object()
        self._turn_on(strict, stacklevel=4, block=block)
        try:
            yield
        finally:
            with _lock:
                if self._blocks == {block}:
                    self.unpatch()
                self._blocks.discard(block)

    def report(self) -> Report:
        """What was replaced, in which modules, and what was left alone and why."""
        version = self.version()
        with _lock:
            entries = [self._entry(item) for item in self._items if version is not None]
        entries += [Entry(path, "left alone", [], why) for path, why in self.left_alone.items()]
        return Report(f"{self.package} {version or 'is not installed'}", entries)

    def survey(self) -> Report:
        """The report of what ``patch`` would do: imports the host's modules, and leaves it as it
        was."""
        if self.version() is None:
            return Report(f"{self.package} is not installed", [])
        problems: dict[str, str] = {}
        with self.patched(strict=self._strict):
            for module in sorted(self._modules()):
                try:
                    importlib.import_module(module)
                except Exception as error:
                    _log.debug("%s", module, exc_info=True)
                    problems[module] = _why_no_import(module, error)
            report = self.report()
        for entry in report:
            module = entry.path.partition(":")[0]
            if entry.status == "waiting" and module in problems:
                entry.status, entry.reason = "left alone", problems[module]
        return report

    def check(self) -> str:
        """What ``survey`` finds, in a line. In a version that was tested, where ``patch`` compares
        nothing, each function that has a replacement is called beside it.

        Raises:
            RuntimeError: naming those that fail where the host's do not, or give something else.
        """
        with warnings.catch_warnings():  # of an unknown version
            warnings.simplefilter("ignore")
            report = self.survey()
        version = self.version()
        if version is None:
            return "not installed"
        items = self._items if self._known(version) else []
        with torch.compiler.set_stance("force_eager"):
            broken = [f"{item.path} {why}" for item in items if (why := self._broken(item))]
        if broken:
            raise RuntimeError("; ".join(broken))
        taken = sum(entry.status in ("replaced", "added") for entry in report)
        return f"{version}: {taken} of {len(self._items)} functions can be replaced"

    def version(self) -> str | None:
        """Of the installed host; None: it is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            spec = None
        with contextlib.suppress(ValueError):  # somebody's module without a spec
            spec = importlib.util.find_spec(self.package)
        in_a_folder = spec is not None and spec.origin is not None
        return "of an unknown version" if in_a_folder else None

    # ---- inside ---------------------------------------------------------------------------------

    def _turn_on(self, strict: bool, stacklevel: int, block: object = None) -> None:
        version = self.version()
        if version is None:
            raise ModuleNotFoundError(f"{self.package} is not installed", name=self.package)
        with _lock:
            if not self._on:
                if not self._known(version):
                    warnings.warn(
                        f"{self.package} {version} is not among the versions that rlhf_kernels was "
                        f"tested with ({self._names_of_tested()}): each function is replaced only "
                        "where both give the same on small calls",
                        RuntimeWarning,
                        stacklevel=stacklevel,
                    )
                self._on, self._strict, self._refused = True, strict, {}
                self._blocks = set() if block is None else {block}
                _Finder.install()
            elif strict != self._strict:
                raise RuntimeError(
                    f"strict: {self.package} is patched with strict={self._strict}; unpatch it "
                    "first"
                )
            elif block is not None and self._blocks:
                self._blocks.add(block)
        # Our hook sees what is imported from here on. What other threads are importing already is
        # waited for, without the lock, which the hook takes at the end of an import.
        for name in sorted(self._modules()):
            if _is_being_imported(sys.modules.get(name)):
                with contextlib.suppress(Exception):  # the other thread's to handle
                    importlib.import_module(name)
        with _lock:
            done = {swap.path for swap in self._swaps} | self._added.keys() | self._refused.keys()
            for name in sorted({item.module for item in self._items if item.path not in done}):
                module = sys.modules.get(name)
                if module is not None and not _is_being_imported(module):
                    self._loaded(module)

    def _known(self, version: str) -> bool:
        numbers = version.partition("+")[0].split(".")
        if not all(map(str.isdecimal, numbers)):
            return False
        return any(tuple(map(int, numbers[: len(known)])) == known for known in self.tested)

    def _names_of_tested(self) -> str:
        return ", ".join(".".join(map(str, known)) for known in self.tested)

    @property
    def _items(self) -> list[Replacement | Addition]:
        return [*self.replacements, *self.additions]

    def _modules(self) -> set[str]:
        return {item.module for item in self._items}

    def waits_for(self, module: str) -> bool:
        return self._on and module in self._modules()

    def _loaded(self, module: types.ModuleType) -> None:
        """Replace what a module defines, which has just been loaded."""
        with _lock:
            if not self._on:
                return
            for item in self._items:
                if item.module == module.__name__:
                    self._refused.pop(item.path, None)  # of what it was before a reload
                    try:
                        reason = self._take(item, module)
                    except LeftAlone as why:
                        reason = str(why)
                    except Exception:
                        _log.debug("%s", item.path, exc_info=True)
                        reason = f"an error kept ours from its place{_LOGGED}"
                    if reason:
                        self._refused[item.path] = reason

    def _take(self, item: Replacement | Addition, module: types.ModuleType) -> str | None:
        """Put ours in its place, or say why not."""
        name = item.like if isinstance(item, Addition) else item.name
        original = _find(module, name)
        version = self.version()
        installed = f"{self.package} {version}"
        if original is None:
            return _why_not_found(module, name, installed)
        if any(swap.path == item.path and swap.ours is original for swap in self._swaps):
            return None
        function = original.__func__ if isinstance(original, staticmethod) else original
        found = signature_of(function)
        calls = {item.signature: item.calls, **item.also}.get(found)
        if calls is None:
            return (
                f"in {installed} it takes the arguments {found}, in the versions that this library "
                f"was tested with {item.signature}"
            )
        ours = item.make(function, self._strict)
        known = version is None or self._known(version)
        formula = item.formula if isinstance(item, Replacement) else None
        if not known and (reason := _differ(calls, function, ours, formula)):
            return (
                f"{installed} is not among the versions that this library was tested with "
                f"({self._names_of_tested()}), and on small calls on the CPU {reason}"
            )
        if isinstance(item, Addition):
            self._added[item.path] = item.put(module, ours)
            return None
        if _named(function) is not original:  # a bound method: by its name pickle finds no function
            ours.__module__, ours.__qualname__ = module.__name__, name
        ours = staticmethod(ours) if isinstance(original, staticmethod) else ours
        owner, _, attribute = name.rpartition(".")
        inherited = bool(owner) and attribute not in vars(_find(module, owner))
        swap = _Swap(item.path, original, ours, inherited)
        places = self._places(swap, of="original")
        self._swaps.append(swap)
        try:
            for holder, held in places:
                setattr(holder, held, ours)
        except Exception:
            self._put_back(self._swaps.pop())
            raise
        return None

    def _broken(self, item: Replacement | Addition) -> str | None:
        """In what ours is wrong, on the calls that the host's function serves here."""
        module = sys.modules.get(item.module)
        original = _find(module, item.like if isinstance(item, Addition) else item.name)
        if original is None:
            return None
        function = original.__func__ if isinstance(original, staticmethod) else original
        calls = {item.signature: item.calls, **item.also}.get(signature_of(function))
        if calls is None:
            return None
        try:
            ours = item.make(function, self._strict)
        except Exception as error:
            return f"cannot be replaced: {error!r}"
        return _differ(functools.partial(_served, calls, function), function, ours)

    def _put_back(self, swap: _Swap) -> None:
        for holder, name in self._places(swap):
            if swap.inherited:
                delattr(holder, name)
            else:
                setattr(holder, name, swap.original)

    def _places(self, swap: _Swap, of: str = "ours") -> list[tuple[Any, str]]:
        """Where the host has ours, or the original: (module or class, attribute)."""
        value = getattr(swap, of)
        module, _, name = swap.path.partition(":")
        owner, _, attribute = name.rpartition(".")
        if not owner:
            return list(self._holders(value))
        holder = _find(sys.modules.get(module), owner)
        return [(holder, attribute)] if _find(holder, attribute) is value else []

    def _holders(self, value: Any) -> Iterator[tuple[types.ModuleType, str]]:
        for name, module in sys.modules.copy().items():
            inside = name == self.package or name.startswith(f"{self.package}.")
            if inside and isinstance(module, types.ModuleType):
                for attribute, held in vars(module).copy().items():
                    if held is value:
                        yield module, attribute

    def _entry(self, item: Replacement | Addition) -> Entry:
        path = item.path
        if path in self._refused:
            return Entry(path, "left alone", [], self._refused[path])
        if path in self._added:
            return Entry(path, "added", [path.replace(":", ".")], item.what)
        swaps = [swap for swap in self._swaps if swap.path == path]
        if not swaps:
            return Entry(path, "waiting" if self._on else "not patched", [], item.what)
        own = path.replace(":", ".")
        places = [
            own if isinstance(holder, type) else f"{holder.__name__}.{name}"
            for swap in swaps
            for holder, name in self._places(swap)
        ]
        if own not in places:
            return Entry(path, "overridden", places, "something else was put there since")
        return Entry(path, "replaced", places, item.what)


def _is_being_imported(module: types.ModuleType | None) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _find(module: Any, name: str) -> Any:
    """The attribute, or None; of a class as it stands in the class."""
    found = module
    for part in name.split("."):
        if found is None:
            return None
        found = inspect.getattr_static(found, part, None)
    return found


def _named(function: Any) -> Any:
    """What pickle finds under the function's name."""
    module, name = (getattr(function, x, "") for x in ("__module__", "__qualname__"))
    return _find(sys.modules.get(module), name)


_LOGGED = f"; Python's logging has it at level DEBUG, under {__name__}"


def _why_not_found(module: types.ModuleType, name: str, installed: str) -> str:
    owner, _, attribute = name.rpartition(".")
    holder = _find(module, owner) if owner else module
    if attribute not in getattr(holder, "__dict__", ()):
        return f"{installed} has no {name}"
    return (
        f"{installed} has None in its place on this machine: an optional package that it is made "
        "with is not installed"
    )


def _why_no_import(module: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{module} cannot be imported, as there is no {error.name}: install it"
    return f"{module} cannot be imported: python -c 'import {module}' shows why"


def _differ(
    calls: Calls, theirs: Any, ours: Any, formula: Callable[..., Any] | None = None
) -> str | None:
    """In what, on those calls; the random state of the caller stays what it was."""
    theirs, ours = getattr(theirs, "apply", theirs), getattr(ours, "apply", ours)
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        for args, kwargs, *leaves in calls():
            given = (args, kwargs, leaves[0] if leaves else [])
            try:
                expected = _with_gradients(theirs, *given)
            except Exception:
                _log.debug("the host's own function", exc_info=True)
                if formula is None:
                    return (
                        "its own function stops with an error (some run on GPUs only), so that "
                        f"there is nothing to compare ours with{_LOGGED}"
                    )
                expected = _with_gradients(formula, *given)
            try:
                got = _with_gradients(ours, *given)
            except Exception:
                _log.debug("ours", exc_info=True)
                return f"ours stops with an error{_LOGGED}"
            if not _agree(expected, got):
                return "the two give different numbers"
    return None


def _served(calls: Calls, theirs: Any) -> Iterator[tuple[Any, ...]]:
    """Those of the calls on which the host's does not fail, as it may without a GPU."""
    theirs = getattr(theirs, "apply", theirs)
    for args, kwargs, *leaves in calls():
        try:
            _with_gradients(theirs, args, kwargs, leaves[0] if leaves else [])
        except Exception:
            continue
        yield args, kwargs, *leaves


def _with_gradients(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: Sequence[Tensor]
) -> Any:
    """The results, whether one requires gradients, and those of their sum, in the arguments that
    require them and in ``leaves``."""
    leaves = list(leaves)

    def fresh(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.requires_grad:
            x = x.detach().clone().requires_grad_()
            leaves.append(x)
        return x.clone()  # which may be written to

    args = tuple(map(fresh, args))
    result = function(*args, **{name: fresh(x) for name, x in kwargs.items()})
    outputs = result if isinstance(result, (tuple, list)) else [result]
    sums = [x.sum().float() for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    if not sums or not leaves:
        return result, bool(sums)
    return result, True, torch.autograd.grad(torch.stack(sums).sum(), leaves, allow_unused=True)


# (relative, absolute): a host that computes in 16 bits rounds what cancels.
_TOLERANCES = {torch.bfloat16: (5e-2, 5e-2), torch.float16: (5e-3, 5e-3)}


def _agree(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if (
            not (isinstance(a, Tensor) and isinstance(b, Tensor))
            or a.dtype != b.dtype
            or a.shape != b.shape
        ):
            return False
        rtol, atol = _TOLERANCES.get(a.dtype, (1e-3, 1e-4))
        return torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_agree, a, b))
    if isinstance(a, dict):
        same = a.keys() == b.keys() and all(_agree(a[key], b[key]) for key in a)
        beside = getattr(a, "__dict__", {})  # as the host has set on a model's output
        return same and all(_agree(x, getattr(b, name, None)) for name, x in beside.items())
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4)
    return bool(a == b)


# ---- the import hook ---------------------------------------------------------------------------

_lock = threading.RLock()
_hosts: list[Host] = []


def _new_lock() -> None:
    """A child process must not wait for a thread that exists in the parent alone."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def add(host: Host) -> Host:
    """Let the import hook know of a host."""
    _hosts.append(host)
    return host


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader does, then replaces what it defines."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        for host in _hosts:
            if host.waits_for(module.__name__):
                host._loaded(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.asking = threading.local()  # .names: another finder may ask all of them, as this does

    def find_spec(
        self, name: str, path: Any = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not any(host.waits_for(name) for host in _hosts):
            return None
        names = vars(self.asking).setdefault("names", set())
        if name in names:
            return None
        names.add(name)
        try:
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                spec = find(name, path, target) if find and finder is not self else None
                if spec is not None:
                    if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                        spec.loader = _Loader(spec.loader)
                    return spec
        finally:
            names.remove(name)
        return None

    @classmethod
    def install(cls) -> None:
        if not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.insert(0, cls())
