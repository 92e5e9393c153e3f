"""How functions of a host are replaced: on a package made here."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import threading
import warnings

import pytest
import torch

from rlhf_kernels.integrations import patching
from rlhf_kernels.integrations.patching import Addition, Host, Replacement, signature_of

CORE = """
import torch

def double(x, factor: "float" = 2.0) -> torch.Tensor:
    return x * factor

def unlike(x, other=None):
    return x

REGISTRY = {}

class Maker:
    def triple(self, x):
        return x * 3
    @staticmethod
    def half(x):
        return x / 2
"""
USER = """
from {package}.core import double as twice
from {package}.core import Maker

def call(x):
    return twice(x)
"""


def calls():
    yield (torch.ones(2),), {}
    yield (torch.arange(3.0),), {"factor": 5.0}


def one_call():
    yield (torch.ones(2),), {}


def make_double(original, strict):
    def ours(x, factor=2.0):
        ours.seen += 1
        return torch.full_like(x, float("nan")) if strict and not x.any() else factor * x

    ours.seen = 0
    return ours


def register(module, strict):
    module.REGISTRY["ours"] = strict
    return lambda: module.REGISTRY.pop("ours")


def register_where_nothing_is(module, strict):
    module.OTHER["ours"] = strict


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A package ``fakehost`` of version 1.2, and its Host."""
    package = "fakehost"
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "core.py").write_text(CORE)
    (folder / "user.py").write_text(USER.format(package=package))
    info = tmp_path / f"{package}-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    half = "fakehost.core:Maker.half"
    made = Host(
        package,
        [(1, 2)],
        [
            Replacement("fakehost.core:double", "(x, factor=2.0)", make_double, calls, "doubles"),
            Replacement("fakehost.core:unlike", "(x)", make_double, one_call, "is not what it was"),
            Replacement("fakehost.core:gone", "(x)", make_double, one_call, "was there once"),
            Replacement(half, "(x)", lambda f, strict: lambda x: x * 0.5, one_call, "halves"),
        ],
        {"fakehost.core:Maker.triple": "it is fast enough"},
        [
            Addition("fakehost.core:REGISTRY['ours']", register, "is ours"),
            Addition("fakehost.core:OTHER['ours']", register_where_nothing_is, "has no place"),
        ],
    )
    monkeypatch.setattr(patching, "_hosts", [*patching._hosts, made])
    before = list(sys.meta_path)
    yield made
    made.unpatch()
    sys.meta_path[:] = before
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        del sys.modules[name]


def load(name):
    return importlib.import_module(f"fakehost.{name}")


@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_order_of_patch_and_import_does_not_matter(host, when):
    if when != "before":
        load("core")
    if when == "after":
        load("user")
    host.patch()
    core, user = load("core"), load("user")
    assert core.double is user.twice and core.double.seen == 0
    assert torch.equal(user.call(torch.ones(2)), torch.full((2,), 2.0))
    assert core.double.seen == 1
    assert core.Maker.half(torch.ones(())).item() == 0.5
    host.unpatch()
    assert core.double is user.twice and not hasattr(core.double, "seen")
    assert isinstance(inspect.getattr_static(core.Maker, "half"), staticmethod)
    assert core.Maker().half(torch.ones(())).item() == 0.5


def test_nothing_is_imported_for_a_patch(host):
    host.patch()
    assert not any(name.startswith("fakehost") for name in sys.modules)
    assert {entry.status for entry in host.report()} == {"waiting", "left alone"}


def test_modules_keep_their_own_loaders(host):
    host.patch()
    core = load("core")
    assert "def double" in inspect.getsource(core)
    assert type(core.__loader__) is type(core.__spec__.loader)
    assert not isinstance(core.__loader__, patching._Loader)


def test_report_says_what_where_and_why(host):
    load("user")
    host.patch()
    entries = {entry.path: entry for entry in host.report()}
    double = entries["fakehost.core:double"]
    assert double.status == "replaced" and double.reason == "doubles"
    assert sorted(double.modules) == ["fakehost.core.double", "fakehost.user.twice"]
    unlike = entries["fakehost.core:unlike"]
    assert unlike.status == "left alone"
    assert unlike.reason == "expected the signature (x), got (x, other=None)"
    assert entries["fakehost.core:gone"].reason == "this version has no gone"
    assert entries["fakehost.core:Maker.triple"].reason == "it is fast enough"
    text = str(host.report())
    assert text.startswith("fakehost 1.2.3\n") and "also as fakehost.user.twice" in text
    host.unpatch()
    assert {entry.status for entry in host.report()} == {"not patched", "left alone"}


def test_survey_imports_and_leaves_the_host_as_it_was(host):
    report = host.survey()
    assert {e.path: e.status for e in report}["fakehost.core:double"] == "replaced"
    assert not hasattr(load("core").double, "seen")


def test_patch_is_idempotent_and_nests(host):
    core = load("core")
    original = core.double
    with host.patched():
        ours = core.double
        host.patch()
        with host.patched():
            assert core.double is ours
        assert core.double is ours
    assert core.double is original
    host.unpatch()
    assert core.double is original


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_registry_gets_what_is_ours_and_loses_it(host, when):
    if when == "after":
        load("core")
    host.patch(strict=False)
    core = load("core")
    host.patch(strict=False)
    assert core.REGISTRY == {"ours": False}
    entries = {entry.path: entry for entry in host.report()}
    added = entries["fakehost.core:REGISTRY['ours']"]
    assert (added.status, added.reason) == ("added", "is ours")
    refused = entries["fakehost.core:OTHER['ours']"]
    assert refused.status == "left alone" and "does not take it: AttributeError" in refused.reason
    host.unpatch()
    assert core.REGISTRY == {}
    assert {entry.status for entry in host.report()} == {"not patched", "left alone"}


def test_strict(host):
    core = load("core")
    for strict in (True, False):
        with host.patched(strict=strict):
            assert core.double(torch.zeros(2)).isnan().all() == strict
            with pytest.raises(RuntimeError, match=f"is patched with strict={strict}"):
                host.patch(strict=not strict)


@pytest.mark.parametrize("agrees", [True, False])
def test_an_unknown_version_is_verified_on_small_calls(host, monkeypatch, agrees):
    core = load("core")
    if not agrees:
        monkeypatch.setattr(core, "double", lambda x, factor=2.0: x + factor)
    monkeypatch.setattr(host, "version", lambda: "1.3.0")
    with pytest.warns(RuntimeWarning, match=r"fakehost 1\.3\.0 is not among .* with \(1\.2\)"):
        host.patch()
    (double,) = [entry for entry in host.report() if entry.path.endswith("double")]
    if agrees:
        assert double.status == "replaced"
    else:
        assert double.status == "left alone"
        assert double.reason == "version 1.3.0 is not known, and gives something else"
        assert not hasattr(core.double, "seen")


def test_a_known_version_warns_of_nothing(host):
    load("core")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host.patch()


def test_a_host_that_is_not_installed_is_named(host, monkeypatch):
    monkeypatch.setattr(host, "version", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="fakehost is not installed"):
        host.patch()
    assert str(host.report()).startswith("fakehost is not installed")


def test_threads(host):
    """Patch and unpatch from several threads: in the end nothing is left."""
    core = load("core")
    original, errors = core.double, []

    def run():
        try:
            for _ in range(50):
                host.patch()
                assert core.double(torch.ones(1)).item() == 2
                host.unpatch()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and core.double is original


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_process_does_not_wait_for_the_parents_lock(host):
    load("core")
    held, go = threading.Event(), threading.Event()

    def hold():
        with patching._lock:
            held.set()
            go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        host.patch()
        os._exit(0 if hasattr(load("core").double, "seen") else 1)
    try:
        for _ in range(200):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            threading.Event().wait(0.05)
        else:
            os.kill(child, 9)
            pytest.fail("the child waits")
    finally:
        go.set()
        thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_signature_is_names_kinds_and_defaults():
    def function(a: int, /, b: str = "x", *, c: float = 1.0, **rest: int) -> str: ...

    assert signature_of(function) == "(a, /, b='x', *, c=1.0, **rest)"


@pytest.mark.parametrize("agrees", [True, False])
def test_an_autograd_function_is_checked_by_its_forward(host, monkeypatch, agrees):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor=2.0):
            return x * factor

    class Ours:
        @staticmethod
        def apply(x, factor=2.0):
            return x * factor if agrees else x

    core = load("core")
    monkeypatch.setattr(core, "Scale", Scale, raising=False)
    scale = "fakehost.core:Scale"
    signature = "(ctx, x, factor=2.0)"
    made = Replacement(scale, signature, lambda original, strict: Ours, one_call, "scales")
    monkeypatch.setattr(host, "replacements", [made])
    monkeypatch.setattr(host, "version", lambda: "1.3.0")
    with pytest.warns(RuntimeWarning, match="fakehost 1.3.0"):
        host.patch()
    assert core.Scale is (Ours if agrees else Scale)
    assert signature_of(Scale) == signature
