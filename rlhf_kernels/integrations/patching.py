"""How functions of a host trainer are replaced by ours, and put back.

A function is replaced in the module that defines it and in every module of the host that holds it
by name. Where a module is not loaded yet, an import hook waits for it; so the order of ``patch``
and of the host's import does not matter, and nothing of the host is imported for it.

What is replaced is checked first: the function has to have the signature that the replacement was
written for, and in a version of the host that was not tested it also has to give what the
replacement gives on a few small calls. What does not pass is left alone, and the report says why.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import inspect
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Calls = Callable[[], Iterator[tuple[tuple[Any, ...], dict[str, Any]]]]


@dataclass(frozen=True)
class Replacement:
    """One function of a host, and what takes its place.

    Attributes:
        path: "package.module:name"; the name may be one of a class, "Class.method".
        signature: ``str(inspect.signature(function))`` without annotations and quotes; of an
            autograd function that of its ``forward``.
        make: called as make(original, strict); returns the function that takes its place.
        calls: arguments of small calls on the CPU on which the two have to agree.
        what: what is computed, for the report.
        also: other signatures that it serves.
    """

    path: str
    signature: str
    make: Callable[[Any, bool], Any]
    calls: Calls
    what: str
    also: tuple[str, ...] = ()

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
        add: called as add(module, strict); returns the function that takes it out again.
        what: what is computed, for the report.
    """

    path: str
    add: Callable[[types.ModuleType, bool], Callable[[], None]]
    what: str

    @property
    def module(self) -> str:
        return self.path.partition(":")[0]


@dataclass
class Entry:
    """A line of the report.

    Attributes:
        path: of the function.
        status: replaced | added (to a registry) | waiting (its module is not loaded yet) |
            left alone | not patched.
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
        return "\n".join(lines)


def signature_of(function: Any) -> str:
    """The signature without annotations: names, kinds and defaults."""
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        function = function.forward  # its own says nothing
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


class Host:
    """A trainer package whose functions can be replaced.

    Args:
        package: its import name, which is the distribution's as well.
        tested: versions (major, minor) that the replacements were tested with.
        replacements: what is replaced.
        left_alone: "module:name" -> why it is not replaced, for the report.
        additions: what is added to its registries.
    """

    def __init__(
        self,
        package: str,
        tested: Sequence[tuple[int, int]],
        replacements: Sequence[Replacement],
        left_alone: dict[str, str],
        additions: Sequence[Addition] = (),
    ):
        self.package, self.tested = package, tuple(tested)
        self.replacements, self.left_alone = tuple(replacements), left_alone
        self.additions = tuple(additions)
        self._on = False
        self._strict = True
        self._swaps: dict[str, tuple[Any, Any]] = {}  # path -> original, ours
        self._refused: dict[str, str] = {}
        self._added: dict[str, Callable[[], None]] = {}  # path -> what takes it out again

    # ---- what the modules of the adapters export ------------------------------------------------

    def patch(self, *, strict: bool = True) -> None:
        """Replace what can be replaced; to patch again does nothing.

        Args:
            strict: give NaN where the host gives NaN; False: what our operators give there.

        Raises:
            ModuleNotFoundError: the host is not installed.
            RuntimeError: it is patched already, with the other ``strict``.
        """
        version = self.version()
        if version is None:
            raise ModuleNotFoundError(f"{self.package} is not installed", name=self.package)
        with _lock:
            if self._on:
                if strict != self._strict:
                    raise RuntimeError(
                        f"strict: {self.package} is patched with strict={self._strict}; unpatch it "
                        "first"
                    )
                return
            self._on, self._strict, self._refused = True, strict, {}
            if not self._known(version):
                names = ", ".join(f"{major}.{minor}" for major, minor in self.tested)
                warnings.warn(
                    f"{self.package} {version} is not among the versions that rlhf_kernels was "
                    f"tested with ({names}): each function is replaced only where both give the "
                    "same on small calls",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _Finder.install()
            for module in self._modules() & sys.modules.keys():
                self._loaded(sys.modules[module])

    def unpatch(self) -> None:
        """Put everything back; where nothing is patched nothing is done."""
        with _lock:
            for path, (original, ours) in self._swaps.items():
                module, _, name = path.partition(":")
                owner, _, attribute = name.rpartition(".")
                if owner:
                    setattr(_find(sys.modules.get(module), owner), attribute, original)
                else:
                    for holder, held in list(self._holders(ours)):
                        setattr(holder, held, original)
            for take_out in self._added.values():
                take_out()
            self._swaps, self._added, self._on = {}, {}, False

    @contextlib.contextmanager
    def patched(self, *, strict: bool = True) -> Iterator[None]:
        """``patch`` for a ``with`` block; afterwards it is as it was, patched or not."""
        with _lock:
            was = self._on
            self.patch(strict=strict)
        try:
            yield
        finally:
            if not was:
                self.unpatch()

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
                    problems[module] = f"{module} cannot be imported: {error}"
            report = self.report()
        for entry in report:
            module = entry.path.partition(":")[0]
            if entry.status == "waiting" and module in problems:
                entry.status, entry.reason = "left alone", problems[module]
        return report

    def version(self) -> str | None:
        """Of the installed host; None: it is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    # ---- inside ---------------------------------------------------------------------------------

    def _known(self, version: str) -> bool:
        numbers = version.split(".")
        return ".".join(numbers[:2]) in {f"{major}.{minor}" for major, minor in self.tested}

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
            for replacement in self.replacements:
                if replacement.module == module.__name__ and replacement.path not in self._swaps:
                    self._replace(replacement, module)
            for addition in self.additions:
                if addition.module == module.__name__ and addition.path not in self._added:
                    try:
                        self._added[addition.path] = addition.add(module, self._strict)
                    except Exception as error:
                        self._refused[addition.path] = f"this version does not take it: {error!r}"

    def _replace(self, replacement: Replacement, module: types.ModuleType) -> None:
        original = _find(module, replacement.name)
        if original is None:
            self._refused[replacement.path] = f"this version has no {replacement.name}"
            return
        function = original.__func__ if isinstance(original, staticmethod) else original
        ours = replacement.make(function, self._strict)
        if reason := self._differs(replacement, function, ours):
            self._refused[replacement.path] = reason
            return
        ours = staticmethod(ours) if isinstance(original, staticmethod) else ours
        owner, _, attribute = replacement.name.rpartition(".")
        if owner:
            setattr(_find(module, owner), attribute, ours)
        else:
            for holder, held in list(self._holders(original)):
                setattr(holder, held, ours)
        self._swaps[replacement.path] = (original, ours)

    def _differs(self, replacement: Replacement, original: Any, ours: Any) -> str | None:
        """Why the one must not take the place of the other."""
        found = signature_of(original)
        if found not in (replacement.signature, *replacement.also):
            return f"expected the signature {replacement.signature}, got {found}"
        version = self.version()
        if version is None or self._known(version):
            return None
        theirs, ours = getattr(original, "apply", original), getattr(ours, "apply", ours)
        for args, kwargs in replacement.calls():
            try:
                if not _agree(theirs(*args, **kwargs), ours(*args, **kwargs)):
                    return f"version {version} is not known, and gives something else"
            except Exception as error:
                return f"version {version} is not known, and raises {error!r}"
        return None

    def _holders(self, value: Any) -> Iterator[tuple[types.ModuleType, str]]:
        for name, module in list(sys.modules.items()):
            inside = name == self.package or name.startswith(f"{self.package}.")
            if inside and isinstance(module, types.ModuleType):
                for attribute, held in list(vars(module).items()):
                    if held is value:
                        yield module, attribute

    def _entry(self, item: Replacement | Addition) -> Entry:
        path = item.path
        if path in self._added:
            return Entry(path, "added", [path.replace(":", ".")], item.what)
        if path in self._swaps:
            ours = self._swaps[path][1]
            modules = [f"{module.__name__}.{name}" for module, name in self._holders(ours)]
            return Entry(path, "replaced", modules or [path.replace(":", ".")], item.what)
        if path in self._refused:
            return Entry(path, "left alone", [], self._refused[path])
        return Entry(path, "waiting" if self._on else "not patched", [], item.what)


def _find(module: Any, name: str) -> Any:
    """The attribute, or None; of a class as it stands in the class."""
    found = module
    for part in name.split("."):
        if found is None:
            return None
        found = inspect.getattr_static(found, part, None)
    return found


def _agree(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_agree, a, b))
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
    def find_spec(
        self, name: str, path: Any = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not any(host.waits_for(name) for host in _hosts):
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find and finder is not self else None
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None

    @classmethod
    def install(cls) -> None:
        if not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.insert(0, cls())
