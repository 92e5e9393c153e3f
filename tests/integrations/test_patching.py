"""How functions of a host are replaced: on a package made here."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import os
import pickle
import sys
import threading
import types
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


def variable():
    yield (torch.ones(2, requires_grad=True),), {}


def register(module, ours):
    module.REGISTRY["ours"] = ours
    return lambda: module.REGISTRY.pop("ours")


def register_where_nothing_is(module, ours):
    module.OTHER["ours"] = ours


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
    like = ("double", "(x, factor=2.0)", make_double, calls)
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
            Addition("fakehost.core:REGISTRY['ours']", *like, register, "is ours"),
            Addition("fakehost.core:OTHER['ours']", *like, register_where_nothing_is, "no place"),
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
    waiting = importlib.util.find_spec("fakehost.core").loader
    assert "def double" in waiting.get_source("fakehost.core")


def test_report_says_what_where_and_why(host):
    load("user")
    host.patch()
    entries = {entry.path: entry for entry in host.report()}
    double = entries["fakehost.core:double"]
    assert double.status == "replaced" and double.reason == "doubles"
    assert sorted(double.modules) == ["fakehost.core.double", "fakehost.user.twice"]
    unlike = entries["fakehost.core:unlike"]
    assert unlike.status == "left alone"
    assert unlike.reason == (
        "in fakehost 1.2.3 it takes the arguments (x, other=None), in the versions that this "
        "library was tested with (x)"
    )
    assert entries["fakehost.core:gone"].reason == "fakehost 1.2.3 has no gone"
    assert entries["fakehost.core:Maker.triple"].reason == "it is fast enough"
    text = str(host.report())
    assert text.endswith("What is left alone the trainer computes itself, as without the patch.")
    assert text.startswith("fakehost 1.2.3\n") and "also as fakehost.user.twice" in text
    host.unpatch()
    assert {entry.status for entry in host.report()} == {"not patched", "left alone"}


def test_survey_imports_and_leaves_the_host_as_it_was(host):
    report = host.survey()
    assert {e.path: e.status for e in report}["fakehost.core:double"] == "replaced"
    assert not hasattr(load("core").double, "seen")


def test_check_calls_what_is_replaced(host, monkeypatch):
    """24. In a tested version too, where ``patch`` compares nothing."""
    double, half = host.replacements[0], host.replacements[3]
    monkeypatch.setattr(host, "additions", ())
    monkeypatch.setattr(host, "replacements", [double, half])
    assert host.check() == "1.2.3: 2 of 2 functions can be replaced"

    def wrong(original, strict):
        return lambda x, factor=2.0: x + factor + 1

    def raises(original, strict):
        raise AttributeError("no such thing")

    for make, why in (
        (wrong, "the two give different numbers"),
        (raises, "cannot be replaced: AttributeErr"),
    ):
        broken = [dataclasses.replace(double, make=make), half]
        monkeypatch.setattr(host, "replacements", broken)
        with pytest.raises(RuntimeError, match=f"fakehost.core:double {why}"):
            host.check()
    monkeypatch.setattr(host, "version", lambda: "1.3.0")  # there ``patch`` compares
    broken[0] = dataclasses.replace(double, make=wrong)
    assert host.check() == "1.3.0: 1 of 2 functions can be replaced"
    assert not hasattr(load("core").double, "seen")


def test_check_passes_by_calls_that_the_host_does_not_serve(host, monkeypatch):
    """As verl's own kernel on a CPU."""
    core = load("core")

    def fails(x, factor=2.0):
        raise RuntimeError("a GPU is needed")

    monkeypatch.setattr(core, "double", fails)
    monkeypatch.setattr(host, "replacements", [host.replacements[0]])
    monkeypatch.setattr(host, "additions", ())
    assert host.check() == "1.2.3: 1 of 1 functions can be replaced"


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
def test_a_registry_gets_what_is_ours_and_loses_it(host, when, caplog):
    caplog.set_level("DEBUG", patching.__name__)
    if when == "after":
        load("core")
    host.patch(strict=False)
    core = load("core")
    host.patch(strict=False)
    assert list(core.REGISTRY) == ["ours"] and not core.REGISTRY["ours"](torch.zeros(2)).any()
    entries = {entry.path: entry for entry in host.report()}
    added = entries["fakehost.core:REGISTRY['ours']"]
    assert (added.status, added.reason) == ("added", "is ours")
    refused = entries["fakehost.core:OTHER['ours']"]
    assert refused.status == "left alone" and refused.reason == KEPT
    assert "has no attribute 'OTHER'" in caplog.text
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


KEPT = (
    "an error kept ours from its place; Python's logging has it at level DEBUG, under "
    f"{patching.__name__}"
)
UNKNOWN = (
    "fakehost 1.3.0 is not among the versions that this library was tested with (1.2), and on "
    "small calls on the CPU "
)
DIFFERENT = {
    "values": lambda x, factor=2.0: x + factor,
    "gradients": lambda x, factor=2.0: x.detach() * (factor - 1) + x,
    "dtypes": lambda x, factor=2.0: (x * factor).double(),
}


@pytest.mark.parametrize("agrees", [True, *DIFFERENT])
def test_an_unknown_version_is_verified_on_small_calls(host, monkeypatch, agrees):
    core = load("core")
    made = Replacement(
        "fakehost.core:double",
        "(x, factor=2.0)",
        lambda original, strict: lambda x, factor=2.0: factor * x,
        variable,
        "doubles",
    )
    monkeypatch.setattr(host, "replacements", [made])
    if agrees is not True:
        monkeypatch.setattr(core, "double", DIFFERENT[agrees])
    monkeypatch.setattr(host, "version", lambda: "1.3.0")
    told = pytest.warns(RuntimeWarning, match=r"fakehost 1\.3\.0 is not among .* with \(1\.2\)")
    with told, torch.no_grad(), torch.inference_mode():  # which the calls are not
        host.patch()
    (double,) = [entry for entry in host.report() if entry.path.endswith("double")]
    if agrees is True:
        assert double.status == "replaced"
    else:
        assert double.status == "left alone"
        assert double.reason == f"{UNKNOWN}the two give different numbers"
        assert core.double is DIFFERENT[agrees]


@pytest.mark.parametrize("agrees", [True, False])
def test_an_addition_is_verified_too(host, monkeypatch, agrees):
    core = load("core")
    if not agrees:
        monkeypatch.setattr(core, "double", lambda x, factor=2.0: x + factor)
    monkeypatch.setattr(host, "version", lambda: "1.3.0")
    with pytest.warns(RuntimeWarning, match="fakehost 1.3.0"):
        host.patch()
    assert ("ours" in core.REGISTRY) == agrees
    (added,) = [entry for entry in host.report() if "REGISTRY" in entry.path]
    assert agrees or added.reason == f"{UNKNOWN}the two give different numbers"


def broken(*args, **kwargs):
    raise RuntimeError("NVTX functions not installed")


@pytest.mark.parametrize("whose", ["the host's", "ours"])
def test_an_error_on_small_calls_is_reported_in_words(host, monkeypatch, caplog, whose):
    """What was raised is in the log, for whoever asks for it."""
    caplog.set_level("DEBUG", patching.__name__)
    core = load("core")
    made = host.replacements[0]
    if whose == "ours":
        made = dataclasses.replace(made, make=lambda original, strict: broken)
    else:
        monkeypatch.setattr(core, "double", lambda x, factor=2.0: broken())
    monkeypatch.setattr(host, "replacements", [made])
    monkeypatch.setattr(host, "version", lambda: "1.3.0")
    with pytest.warns(RuntimeWarning, match="fakehost 1.3.0"):
        host.patch()
    (double,) = [entry for entry in host.report() if entry.path.endswith("double")]
    assert double.status == "left alone" and "NVTX" not in double.reason
    what = {
        "ours": "ours stops with an error",
        "the host's": "its own function stops with an error (some run on GPUs only), so that there "
        "is nothing to compare ours with",
    }[whose]
    assert double.reason.startswith(f"{UNKNOWN}{what}; Python's logging has it at level DEBUG")
    assert "RuntimeError: NVTX functions not installed" in caplog.text


@pytest.mark.parametrize("formula", ["the same", "another", "none is asked"])
def test_a_function_of_gpus_alone_is_compared_with_its_formula(host, monkeypatch, formula):
    """Which counts only where the host's cannot run."""
    core = load("core")
    runs = formula == "none is asked"
    if not runs:
        monkeypatch.setattr(core, "double", lambda x, factor=2.0: broken())
    plain = {"the same": lambda x, factor=2.0: x * factor, "none is asked": broken}
    made = dataclasses.replace(host.replacements[0], formula=plain.get(formula, lambda *a, **k: 0))
    monkeypatch.setattr(host, "replacements", [made])
    monkeypatch.setattr(host, "version", lambda: "1.3.0")
    with pytest.warns(RuntimeWarning, match="fakehost 1.3.0"):
        host.patch()
    (double,) = [entry for entry in host.report() if entry.path.endswith("double")]
    assert double.status == ("left alone" if formula == "another" else "replaced")
    if formula == "another":
        assert double.reason == f"{UNKNOWN}the two give different numbers"


@pytest.mark.parametrize("version, known", [("1.2.3", True), ("1.2.3+cpu", True), ("1.2.4", False)])
@pytest.mark.parametrize("suffix", ["", "rc1", ".dev0"])
def test_each_release_may_be_tested_alone(host, monkeypatch, version, known, suffix):
    """The last number counts too: OpenRLHF 0.11.0 and 0.11.2 compute different entropies."""
    known = known and not suffix
    core = load("core")
    monkeypatch.setattr(core, "double", DIFFERENT["values"])
    monkeypatch.setattr(host, "tested", ((1, 1), (1, 2, 3)))
    whole = version.replace("+", f"{suffix}+") if "+" in version else version + suffix
    monkeypatch.setattr(host, "version", lambda: whole)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        host.patch()
    names = [w for w in told if r"was tested with (1.1, 1.2.3)" in str(w.message)]
    assert len(names) == (not known)
    assert (core.double is DIFFERENT["values"]) == (not known)


def test_what_is_none_where_a_package_is_missing(host, monkeypatch):
    core = load("core")
    monkeypatch.setattr(core, "double", None)
    host.patch()
    assert host.report()[0].reason == (
        "fakehost 1.2.3 has None in its place on this machine: an optional package that it is "
        "made with is not installed"
    )


@pytest.mark.parametrize("missing", [True, False])
def test_a_module_that_cannot_be_imported_is_reported_in_words(host, tmp_path, missing):
    why = "import a_package_that_nobody_has" if missing else "raise OSError('libnvrtc')"
    (tmp_path / "fakehost" / "core.py").write_text(f"{why}\n")
    reasons = {entry.reason for entry in host.survey() if entry.path.endswith("double")}
    assert reasons == {
        "fakehost.core cannot be imported, as there is no a_package_that_nobody_has: install it"
        if missing
        else "fakehost.core cannot be imported: python -c 'import fakehost.core' shows why"
    }


def test_verification_leaves_the_random_state(host, monkeypatch):
    load("core")

    def drawn():
        yield (torch.randn(2),), {}

    made = Replacement("fakehost.core:double", "(x, factor=2.0)", make_double, drawn, "doubles")
    monkeypatch.setattr(host, "replacements", [made])
    monkeypatch.setattr(host, "version", lambda: "1.3.0")
    before = torch.get_rng_state()
    with pytest.warns(RuntimeWarning, match="fakehost 1.3.0"):
        host.patch()
    assert torch.equal(torch.get_rng_state(), before) and host.report()[0].status == "replaced"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_verification_allows_what_a_dtype_rounds(host, monkeypatch, dtype):
    """One place off in the last digit is no difference, a tenth is one."""
    core = load("core")

    def call():
        yield (torch.tensor([1.0, 3.0, -0.3], dtype=dtype),), {}

    for off, status in ((torch.finfo(dtype).eps, "replaced"), (0.1, "left alone")):
        monkeypatch.setattr(core, "double", lambda x, factor=2.0, off=off: x * factor * (1 + off))
        made = Replacement("fakehost.core:double", "(x, factor=2.0)", make_double, call, "doubles")
        made = dataclasses.replace(made, also={signature_of(core.double): call})
        monkeypatch.setattr(host, "replacements", [made])
        monkeypatch.setattr(host, "version", lambda: "1.3.0")
        with pytest.warns(RuntimeWarning, match="fakehost 1.3.0"):
            host.patch()
        assert host.report()[0].status == status
        host.unpatch()


def test_a_host_in_a_folder_without_metadata_is_of_an_unknown_version(host, tmp_path):
    (tmp_path / "fakehost-1.2.3.dist-info" / "METADATA").unlink()
    (tmp_path / "fakehost-1.2.3.dist-info").rmdir()
    importlib.invalidate_caches()
    with pytest.warns(RuntimeWarning, match="fakehost of an unknown version is not among"):
        host.patch()
    assert hasattr(load("core").double, "seen")


def test_what_cannot_be_replaced_is_left_alone_and_the_rest_is_not(host, monkeypatch, caplog):
    """Neither ``patch`` nor the host's import raises, and nothing is left half done."""
    caplog.set_level("DEBUG", patching.__name__)
    made = host.replacements

    def fails(original, strict):
        raise AttributeError("no such thing")

    broken = dataclasses.replace(made[0], make=fails)
    monkeypatch.setattr(host, "replacements", [broken, made[3]])
    host.patch()
    core = load("core")
    entries = {entry.path: entry for entry in host.report()}
    assert entries["fakehost.core:double"].reason == KEPT
    assert "AttributeError: no such thing" in caplog.text
    assert entries["fakehost.core:Maker.half"].status == "replaced"
    assert not hasattr(core.double, "seen")


def test_unpatch_keeps_what_somebody_else_has_put_there_since(host):
    core = load("core")
    original = core.double
    host.patch()

    def mine(x, factor=2.0):
        return x

    half = staticmethod(lambda x: x)
    core.double = mine
    core.Maker.half = half
    entries = {entry.path: entry for entry in host.report()}
    for path in ("fakehost.core:double", "fakehost.core:Maker.half"):
        assert entries[path].status == "overridden"
    host.unpatch()
    assert core.double is mine and inspect.getattr_static(core.Maker, "half") is half
    core.double = original


def test_a_module_that_is_loaded_again_is_patched_again(host):
    load("user")
    host.patch()
    importlib.reload(load("core"))
    core = load("core")
    assert hasattr(core.double, "seen") and list(core.REGISTRY) == ["ours"]
    assert {e.path: e.status for e in host.report()}["fakehost.core:double"] == "replaced"
    host.unpatch()
    for module, name in ((core, "double"), (load("user"), "twice")):
        assert not hasattr(getattr(module, name), "seen")


def test_a_replacement_that_fails_halfway_is_put_back(host, caplog):
    caplog.set_level("DEBUG", patching.__name__)

    class Stubborn(types.ModuleType):
        def __setattr__(self, name, value):
            raise AttributeError("read only")

    core = load("core")
    original = core.double
    stubborn = sys.modules["fakehost.stubborn"] = Stubborn("fakehost.stubborn")
    vars(stubborn)["double"] = original
    host.patch()
    assert core.double is original and vars(stubborn)["double"] is original
    (entry,) = [e for e in host.report() if e.path == "fakehost.core:double"]
    assert entry.status == "left alone" and entry.reason == KEPT and "read only" in caplog.text


def test_a_module_without_a_spec_is_no_host(host, tmp_path):
    (tmp_path / "fakehost-1.2.3.dist-info" / "METADATA").unlink()
    (tmp_path / "fakehost-1.2.3.dist-info").rmdir()
    importlib.invalidate_caches()
    sys.modules["fakehost"] = types.ModuleType("fakehost")
    assert host.version() is None and "is not installed" in str(host.report())


def test_unpatch_after_a_module_is_gone(host):
    load("core")
    host.patch()
    del sys.modules["fakehost.core"]
    host.unpatch()
    assert {entry.status for entry in host.report()} == {"not patched", "left alone"}


def test_blocks_of_several_threads(host):
    """The last one that is left puts the host's functions back."""
    core = load("core")
    original = core.double
    first, second = host.patched(), host.patched()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert core.double is not original
    second.__exit__(None, None, None)
    assert core.double is original
    host.patch()
    with host.patched():
        pass
    assert core.double is not original
    with host.patched():
        host.unpatch()
        assert core.double is original
        host.patch()
    assert core.double is not original


def test_patch_waits_for_another_thread_that_imports(host, tmp_path):
    """A module that is half there has nothing to replace yet; what it will have is replaced."""
    core = tmp_path / "fakehost" / "core.py"
    core.write_text(
        "import threading\nbegun, go = threading.Event(), threading.Event()\n"
        "begun.set()\ngo.wait(20)\n" + core.read_text()
    )
    thread = threading.Thread(target=load, args=("core",))
    thread.start()
    while not hasattr(sys.modules.get("fakehost.core"), "go"):
        pass
    half = sys.modules["fakehost.core"]
    half.begun.wait(20)
    threading.Timer(0.2, half.go.set).start()
    host.patch()
    thread.join()
    assert hasattr(load("core").double, "seen") and list(load("core").REGISTRY) == ["ours"]


def test_what_is_imported_while_a_patch_waits_is_replaced(host, tmp_path, monkeypatch):
    slow = "import time\ntime.sleep(0.3)\n"
    core = tmp_path / "fakehost" / "core.py"
    core.write_text(slow + core.read_text())
    (tmp_path / "fakehost" / "a.py").write_text(slow + "def double(x, factor=2.0): return x")
    (tmp_path / "fakehost" / "z.py").write_text(slow + "def double(x, factor=2.0): return x")
    more = [dataclasses.replace(host.replacements[0], path=f"fakehost.{m}:double") for m in "az"]
    monkeypatch.setattr(host, "replacements", [*host.replacements, *more])
    names = ["core", "a", "z"]
    thread = threading.Thread(target=lambda: [load(name) for name in names])
    thread.start()
    while "fakehost.core" not in sys.modules:
        pass
    host.patch()
    thread.join()
    assert all(hasattr(load(name).double, "seen") for name in names)


def test_a_patch_in_the_middle_of_an_import_can_be_finished(host, tmp_path, monkeypatch):
    core = tmp_path / "fakehost" / "core.py"
    core.write_text("import patch_now\n" + core.read_text())
    monkeypatch.setitem(sys.modules, "patch_now", None)
    del sys.modules["patch_now"]
    (tmp_path / "patch_now.py").write_text(
        "from rlhf_kernels.integrations import patching\npatching._hosts[-1].patch()\n"
    )
    load("core")
    sys.modules.pop("patch_now")
    assert host.report()[0].status == "waiting"
    host.patch()
    assert host.report()[0].status == "replaced" and hasattr(load("core").double, "seen")


def test_a_finder_that_imports_another_module_of_the_host(host, tmp_path):
    class Other(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "fakehost.user" and "fakehost.core" not in sys.modules:
                load("core")
            return None

    user = dataclasses.replace(host.replacements[0], path="fakehost.user:twice")
    host.replacements = (*host.replacements, user)
    host.patch()
    sys.meta_path.append(Other())
    sys.meta_path.insert(1, sys.meta_path.pop())
    load("user")
    assert hasattr(load("core").double, "seen")


def test_another_finder_that_asks_all_the_others(host):
    class Other(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            for finder in sys.meta_path:
                if finder is not self and (spec := finder.find_spec(name, path, target)):
                    return spec
            return None

    host.patch()
    sys.meta_path.insert(0, Other())
    assert hasattr(load("core").double, "seen")


def test_a_warning_that_is_an_error_leaves_nothing_patched(host, monkeypatch):
    core = load("core")
    monkeypatch.setattr(host, "version", lambda: "1.3.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeWarning):
                host.patch()
            with pytest.raises(RuntimeWarning), host.patched():
                pass
    assert {entry.status for entry in host.report()} == {"not patched", "left alone"}
    assert not hasattr(core.double, "seen")
    for patch in (host.patch, lambda: host.patched().__enter__()):
        with pytest.warns(RuntimeWarning) as told:
            patch()
        assert told[0].filename == __file__
        host.unpatch()


def test_patch_while_other_threads_import(host):
    """Modules come and go while they are searched."""
    core, original, stop, errors = load("core"), load("core").double, threading.Event(), []

    def imports():
        n = 0
        while not stop.is_set():
            name = f"fakehost.made{n % 500}"
            sys.modules[name] = types.ModuleType(name)
            setattr(core, f"made{n % 500}", n)
            n += 1
            if n % 500 == 0:
                for i in range(500):
                    sys.modules.pop(f"fakehost.made{i}")
                    delattr(core, f"made{i}")

    thread = threading.Thread(target=imports)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(50):
            host.patch()
            host.unpatch()
    except RuntimeError as error:
        errors.append(error)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not errors and core.double is original


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


def test_what_takes_the_place_of_a_bound_method_is_pickled_by_where_it_is(host, monkeypatch):
    """25. verl.utils.kernel holds the ``apply`` of a class under a name of its own."""
    core = load("core")
    core.tripled = original = core.Maker().triple

    def make(function, strict):
        return functools.wraps(function)(lambda x: x + x + x)

    made = Replacement("fakehost.core:tripled", "(x)", make, one_call, "triples")
    monkeypatch.setattr(host, "replacements", [made])
    with host.patched():
        assert (
            core.tripled is not original
            and pickle.loads(pickle.dumps(core.tripled)) is core.tripled
        )
    assert core.tripled is original


def test_unpatch_leaves_a_method_inherited_that_was(host, monkeypatch):
    core = load("core")
    core.Child = type("Child", (core.Maker,), {})
    (half,) = (r for r in host.replacements if r.name == "Maker.half")
    made = dataclasses.replace(half, path="fakehost.core:Child.half")
    monkeypatch.setattr(host, "replacements", [made])
    with host.patched():
        assert "half" in vars(core.Child) and core.Child.half is not core.Maker.half
    assert "half" not in vars(core.Child) and core.Child.half is core.Maker.half


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
    assert signature_of(Scale) == signature_of(Scale.apply) == signature
