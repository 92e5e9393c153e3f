"""What a function or a class shows to who does not call it: the same for ours as for the host's."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

NAMES = ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__")


def holder_of(path: str) -> tuple[Any, str]:
    """The module or class that has what a path of the report names, and its name there."""
    module, _, name = path.partition(":")
    *owners, attribute = name.split(".")
    held = sys.modules[module]
    for owner in owners:
        held = getattr(held, owner)
    return held, attribute


def assert_host_keeps_its_face(host: Any, count: int) -> None:
    """While it is patched, ``count`` replacements; and afterwards all of it is as it was."""
    holders = {r.path: holder_of(r.path) for r in host.replacements if r.module in sys.modules}
    before = {path: inspect.getattr_static(*at, None) for path, at in holders.items()}
    listed = {path: list(vars(at[0])) for path, at in holders.items()}
    with host.patched():
        replaced = [entry for entry in host.report() if entry.status == "replaced"]
        assert len(replaced) == count
        for entry in replaced:
            holder, name = holders[entry.path]
            ours, original = inspect.getattr_static(holder, name), before[entry.path]
            assert ours is not original, entry.path
            for what, got, want in face(holder, name, ours, original):
                assert got == want, f"{entry.path}: {what}: {got!r}, not {want!r}"
    for path, at in holders.items():
        assert inspect.getattr_static(*at, None) is before[path], path
        assert list(vars(at[0])) == listed[path], path


def face(holder: Any, name: str, ours: Any, original: Any) -> Iterator[tuple[str, Any, Any]]:
    """(what, of ours, of the original)."""
    found = getattr(holder, name)
    yield "descriptor", type(ours) is staticmethod, type(original) is staticmethod
    if isinstance(original, staticmethod):
        ours, original = ours.__func__, original.__func__
    yield "copy", copy.copy(found) is found and copy.deepcopy(found) is found, True
    yield "pickle", pickle.loads(pickle.dumps(found)) is found, True
    yield "signature", inspect.signature(ours), inspect.signature(original)
    if not inspect.ismethod(original):  # a function then, of the name under which pickle finds it
        for attribute in NAMES:
            yield attribute, getattr(ours, attribute, None), getattr(original, attribute, None)
    yield "coroutine", inspect.iscoroutinefunction(ours), inspect.iscoroutinefunction(original)
    yield "class", isinstance(ours, type), isinstance(original, type)
    if isinstance(original, type):
        yield from face_of_class(ours, original)
    else:
        yield "type", isinstance(ours, types.FunctionType), callable(original)
        if not hasattr(original, "_torchdynamo_orig_callable"):  # ours is not a compiled one
            yield "attributes", original.__dict__.keys() - ours.__dict__.keys(), set()
        taken = [inspect.signature(x, follow_wrapped=False).parameters for x in (ours, original)]
        if not any(p.kind is p.VAR_POSITIONAL for p in taken[1].values()):
            yield "parameters", *([(p.name, p.kind, p.default) for p in x.values()] for x in taken)


def face_of_class(ours: Any, original: Any) -> Iterator[tuple[str, Any, Any]]:
    class Before(original):
        pass

    class Made(ours):
        @staticmethod
        def forward(ctx, x, factor=3.0):
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor, None

    yield "isinstance of its metaclass", isinstance(ours, type(original)), True
    for kind in (original, ours, Before, Made):
        yield f"subclass, {kind}", issubclass(kind, ours) and issubclass(kind, original), True
    yield "others are no subclasses", issubclass(torch.autograd.Function, ours), False
    yield "type of a subclass", type(Made), type(original)
    yield "forward", ours.forward, original.forward
    yield "backward", ours.backward, original.backward
    x = torch.ones(2, requires_grad=True)
    out = Made.apply(x)
    yield "a subclass's own forward", out.tolist(), [3.0, 3.0]
    yield "a subclass's own backward", torch.autograd.grad(out.sum(), x)[0].tolist(), [3.0, 3.0]
    yield "apply", *(inspect.signature(kind.apply) for kind in (ours, original))
