"""Log-probs, entropy and gradients of transformers models, beside those of their own logits."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from compare import assert_close_to_truth

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from rlhf_kernels import linear_token_loss  # noqa: E402
from rlhf_kernels.integrations.transformers import (  # noqa: E402
    LogprobOutput,
    hidden_forward,
    hidden_output,
    logprob_forward,
    patch,
    patched,
    unpatch,
)

V = 101  # no multiple of anything
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
HEAD_DIM = {"head_dim": 16}
# family -> (changes to the configuration, (logit scale, softcap) to be found)
FAMILIES = {
    "llama": ({}, (1.0, None)),
    "qwen2": ({"tie_word_embeddings": True}, (1.0, None)),
    "qwen3": (HEAD_DIM, (1.0, None)),
    "gemma2": ({**HEAD_DIM, "final_logit_softcapping": 2.0, "sliding_window": 8}, (1.0, 2.0)),
    "gemma3_text": ({**HEAD_DIM, "final_logit_softcapping": 3.0}, (1.0, 3.0)),
    "mistral": (HEAD_DIM, (1.0, None)),
    "mixtral": ({"num_local_experts": 2}, (1.0, None)),
    "phi": ({"num_key_value_heads": 2}, (1.0, None)),  # a bias
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, (1.0, None)),
    "gptj": (
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 8},
        (1.0, None),
    ),
    "gpt_neox": ({}, (1.0, None)),
    "cohere": ({"logit_scale": 0.0625}, (0.0625, None)),
    "granite": ({"logits_scaling": 6.0}, (1 / 6, None)),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, (1.0, None)),
    "falcon": ({}, (1.0, None)),
    "stablelm": ({}, (1.0, None)),
    # The scale and the cap of other names, which nothing here knows.
    "recurrent_gemma": (
        {"num_attention_heads": 2, "lru_width": 32, "logits_soft_cap": 5.0, "head_dim": 16},
        (1.0, 5.0),
    ),
    "nanochat": ({**HEAD_DIM, "final_logit_softcapping": 4.0}, (1.0, 4.0)),
    "mamba": ({"state_size": 4}, (1.0, None)),  # a state in place of keys and values
    "hyperclovax": ({"logits_scaling": 0.5}, (0.5, None)),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(family="llama", dtype=torch.float32, **changes):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    tokens = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    options = {**tokens, **SIZES, **FAMILIES[family][0], **changes}
    if family in ("gpt2", "gptj"):
        options = {k: v for k, v in options.items() if k not in SIZES}
    config = transformers.AutoConfig.for_model(family, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # logits of some size, biases and norms that are not the initial ones
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif "embed" in name or "head" in name or "wte" in name:
                p.mul_(10)
    return model.to(dtype).eval()


def batch(side="right"):
    """input_ids, attention_mask (3, 9); the second row has 4 tokens of padding."""
    torch.manual_seed(1)
    input_ids, mask = torch.randint(3, V, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    if side == "left":
        mask = mask.flip(1)
    return input_ids.masked_fill(mask == 0, 0), mask


def from_logits(model, input_ids, mask, temperature=1.0, **kwargs):
    """(logprob, entropy) by softmax of the model's own logits, and where both tokens are valid."""
    z = model(input_ids, attention_mask=mask, use_cache=False, **kwargs).logits[:, :-1]
    z = z if z.dtype == torch.float64 else z.float()
    logp = (z / temperature).log_softmax(-1)
    valid = (mask[:, 1:] * mask[:, :-1]).bool()
    logprob = logp.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.where(valid, logprob, 0.0), torch.where(valid, entropy, 0.0)


def gradients(model, outputs):
    """By name, of a scalar that weighs every log-prob and entropy differently."""
    torch.manual_seed(2)
    scalar = sum((x * torch.randn(x.shape)).sum() for x in outputs)
    model.zero_grad()
    scalar.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, run, own):
    ours, expected = run(), own()
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got, want = gradients(model, ours), gradients(model, expected)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        size = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=2e-5 * size, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_agrees_with_its_own_logits(family):
    model, (input_ids, mask) = make(family), batch()
    _, head = hidden_forward(model, input_ids, mask)
    scale, softcap = FAMILIES[family][1]
    assert head.logit_scale == pytest.approx(scale, rel=1e-12)
    assert head.softcap == (softcap and pytest.approx(softcap, rel=1e-6))
    assert_same(
        model,
        lambda: logprob_forward(model, input_ids, mask, temperature=0.7, with_entropy=True),
        lambda: from_logits(model, input_ids, mask, 0.7),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
def test_16_bits_are_no_worse_than_the_models_own_logits(family):
    model, (input_ids, mask) = make(family, torch.bfloat16), batch()
    with torch.no_grad():
        got = logprob_forward(model, input_ids, mask, with_entropy=True)
        plain = from_logits(model, input_ids, mask)
        hidden, head = hidden_forward(model, input_ids, mask)
        z = hidden.double() @ head.weight.double().t() * head.logit_scale
        z = head.softcap * torch.tanh(z / head.softcap) if head.softcap else z
        fake = _Returns(z)
        truth = from_logits(fake, input_ids, mask)
    for a, b, c in zip(got, plain, truth, strict=True):
        assert a.dtype == torch.float32
        assert_close_to_truth(a, b, c, 1e-5)


class _Returns(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, *args, **kwargs):
        return self


@pytest.mark.parametrize(
    ("family", "no_dropout"),
    [
        ("llama", {}),
        ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        ("opt", {"dropout": 0.0}),
    ],
    ids=["llama", "gpt2", "opt"],
)
def test_left_padding_in_train_mode_with_checkpointing(family, no_dropout):
    model, (input_ids, mask) = make(family, **no_dropout), batch("left")
    # OPT takes the positions from the mask.
    extra = {} if family == "opt" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    own = from_logits(model, input_ids, mask, **extra)
    want = gradients(model, own)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    out = logprob_forward(model, input_ids, mask, with_entropy=True, **extra)
    for x, y in zip(out, own, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, out).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-4, msg=name)


def test_dropout_is_that_of_the_models_own_call():
    model, (input_ids, mask) = make("gpt2").train(), batch()
    results = []
    for call in (logprob_forward, lambda *args: from_logits(*args)[0]):
        torch.manual_seed(5)
        results.append(call(model, input_ids, mask))
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], logprob_forward(model, input_ids, mask))


def test_autocast():
    model, (input_ids, mask) = make(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        got = logprob_forward(model, input_ids, mask)
        own = from_logits(model, input_ids, mask)[0]
    torch.testing.assert_close(got, own, rtol=0.02, atol=0.02)
    assert gradients(model, [got])["lm_head.weight"].dtype == torch.float32


def test_autocast_within_the_models_forward():
    """accelerate's mixed precision: off again when the model returns."""
    model, (input_ids, mask) = make(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logprob_forward(model, input_ids, mask)
    inner = type(model).forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(inner).__get__(model)
    before = model.forward
    assert torch.equal(logprob_forward(model, input_ids, mask), expected)
    assert model.forward is before


def test_given_tokens():
    model, (input_ids, mask) = make(), batch()
    several = torch.randint(V, (3, 9, 4))
    logp = model(input_ids, attention_mask=mask).logits.log_softmax(-1)
    got = logprob_forward(model, input_ids, mask, tokens=several)
    torch.testing.assert_close(got, logp.gather(-1, several))
    labels = input_ids.clone()
    labels[:, :4] = -100
    got = logprob_forward(model, input_ids, mask, tokens=labels[:, 1:])
    want = logp[:, :-1].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(got, torch.where(labels[:, 1:] == -100, 0.0, want))
    got = logprob_forward(model, input_ids, mask, tokens=input_ids[:, -2:], logits_to_keep=3)
    torch.testing.assert_close(got, want[:, -2:])
    embeds = model.get_input_embeddings()(input_ids)
    got = logprob_forward(model, attention_mask=mask, inputs_embeds=embeds, tokens=input_ids[:, 1:])
    torch.testing.assert_close(got, want)


def test_padding_gives_zero_and_no_gradient():
    model, (input_ids, mask) = make(), batch("left")
    out = logprob_forward(model, input_ids, mask, with_entropy=True)
    padding = (mask[:, 1:] * mask[:, :-1]) == 0
    assert padding.sum() == 4 and all((x[padding] == 0).all() for x in out)


def test_no_logits_exist():
    """No operator of the call returns a tensor of that size; with logits one does."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == V:
                    self.elements = max(self.elements, x.numel())
            return out

    model, input_ids = make(), torch.randint(3, V, (12, 9))  # more than the weight's 32 x V
    with Largest() as largest:
        logprob_forward(model, input_ids, chunk_tokens=4).sum().backward()
    assert largest.elements <= 32 * V
    with Largest() as largest:
        model(input_ids)
    assert largest.elements == input_ids.numel() * V


def test_hidden_output_hands_on_what_else_the_model_returns():
    model, (input_ids, mask) = make("mixtral", output_router_logits=True), batch()
    own = model(input_ids, attention_mask=mask, output_hidden_states=True)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, head, output, autocast = hidden_output(
            model, input_ids, mask, output_hidden_states=True
        )
    assert autocast.fast_dtype == torch.bfloat16 and head.weight is model.lm_head.weight
    hidden, head, output, _ = hidden_output(model, input_ids, mask, output_hidden_states=True)
    assert type(output) is type(own) and output.past_key_values is None
    torch.testing.assert_close(output.aux_loss, own.aux_loss)
    torch.testing.assert_close(output.hidden_states[-1], own.hidden_states[-1])
    torch.testing.assert_close(hidden @ head.weight.T, own.logits)


def test_hidden_forward_serves_linear_token_loss():
    model, (input_ids, mask) = make("gemma2"), batch()
    tokens = torch.where(mask[:, 1:] == 1, input_ids[:, 1:], -100)
    hidden, head = hidden_forward(model, input_ids, mask)
    loss, _ = linear_token_loss(
        hidden[:, :-1],
        tokens=tokens,
        loss_fn=lambda logprob, entropy: (-logprob.sum(), None),
        **head._asdict(),
    )
    logprob, _ = from_logits(model, input_ids, mask)
    torch.testing.assert_close(loss, -logprob.sum())
    got, want = gradients(model, [loss]), gradients(model, [-logprob.sum()])
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


# --- the patch ------------------------------------------------------------------------------------


def test_patch_is_reversible_and_idempotent():
    model, (input_ids, mask) = make("granite"), batch()
    signature = inspect.signature(model.forward)
    own = model(input_ids, attention_mask=mask).logits
    expected = logprob_forward(model, input_ids, mask)
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__
    patch(model)
    patch(model)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(input_ids, attention_mask=mask).logits, own)
    out = model(input_ids, mask, return_logprob=True)
    assert isinstance(out, LogprobOutput) and out.entropy is None
    assert torch.equal(out.logprob, expected)
    assert torch.equal(logprob_forward(model, input_ids, mask), expected)
    with patched(model):
        pass
    assert model(input_ids, attention_mask=mask, return_logprob=True).logprob is not None
    assert model.generate(input_ids, attention_mask=mask, max_new_tokens=2).shape == (3, 11)
    unpatch(model)
    unpatch(model)
    assert "forward" not in model.__dict__
    assert torch.equal(model(input_ids, attention_mask=mask).logits, own)


def test_a_copy_of_a_patched_model_is_patched_itself():
    model, (input_ids, mask) = make(), batch()
    patch(model)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    out = reference(input_ids, attention_mask=mask, return_logprob=True)
    assert torch.equal(out.logprob, logprob_forward(reference, input_ids, mask))
    assert not torch.equal(out.logprob, logprob_forward(model, input_ids, mask))
    unpatch(reference)
    assert "forward" not in reference.__dict__ and "forward" in model.__dict__


def test_a_copy_keeps_another_patch_beneath():
    model = make()
    model.forward = type(model).forward.__get__(model)
    patch(model)
    reference = copy.deepcopy(model)
    unpatch(reference)
    assert reference.forward.__self__ is reference
    unpatch(model)
    assert model.forward.__self__ is model


def test_an_error_leaves_the_model_as_it_was():
    model, (input_ids, mask) = make(), batch()
    own = model(input_ids).logits
    with pytest.raises(ValueError, match=r"tokens: expected shape \(3, 9\) or \(3, 8\), as the mo"):
        logprob_forward(model, input_ids, mask, tokens=input_ids[:, :5])
    with pytest.raises((TypeError, AttributeError)):  # the model's own, as its version has it
        logprob_forward(model, input_ids, mask, nonsense=lambda: 0, position_ids="none")
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__
    assert torch.equal(model(input_ids).logits, own)


def test_a_hook_may_ask_for_log_probs_of_its_own():
    """As one that scores a prompt with the model before the model runs."""
    model, (ids, _) = make(), batch()
    inner = []

    def hook(module, args):
        if not inner:
            inner.append(None)
            inner[0] = logprob_forward(model, ids)

    with torch.no_grad():
        want = logprob_forward(model, ids)
        model.get_decoder().register_forward_pre_hook(hook)
        assert torch.equal(logprob_forward(model, ids), want) and torch.equal(inner[0], want)
        torch.testing.assert_close(model(ids).logits.shape[:2], ids.shape)


def test_threads_share_a_model():
    """Each of them gets what it asked for: log-probs, hidden states, or the model's own logits."""
    model, (ids, _) = make(), batch()
    with torch.no_grad():
        logits, logprob = model(ids).logits, logprob_forward(model, ids)
    together, found = threading.Barrier(6), []

    def work(kind):
        with torch.no_grad():
            together.wait()
            for _ in range(20):
                if kind == "logits":
                    found.append(torch.equal(model(ids).logits, logits))
                elif kind == "logprob":
                    found.append(torch.equal(logprob_forward(model, ids), logprob))
                else:
                    hidden, head = hidden_forward(model, ids)
                    found.append(torch.equal(hidden @ head.weight.t(), logits))

    kinds = ["logits", "logprob", "hidden"] * 2
    with ThreadPoolExecutor(len(kinds)) as pool:
        list(pool.map(work, kinds))
    assert len(found) == 20 * len(kinds) and all(found)
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


def test_auxiliary_loss_of_experts():
    model, (input_ids, mask) = make("mixtral"), batch()
    own = model(input_ids, attention_mask=mask, output_router_logits=True)
    with patched(model):
        out = model(input_ids, attention_mask=mask, output_router_logits=True, return_logprob=True)
    assert torch.equal(out.aux_loss, own.aux_loss)


def own_fields(output):
    """What a model of this version of transformers returns beside its logits."""
    names = [field.name for field in dataclasses.fields(output)]
    return {name: getattr(output, name) for name in names if name != "logits"}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "mamba"])
def test_the_other_fields_of_the_output_keep_their_names(family):
    """Versions of transformers name them differently (5.24: cache, before: past_key_values)."""
    model, (input_ids, _) = make(family), batch()
    patch(model)
    own = own_fields(model(input_ids, output_hidden_states=True))
    out = model(input_ids, output_hidden_states=True, use_cache=True, return_logprob=True)
    got = own_fields(out)
    assert isinstance(out, LogprobOutput) and list(got) == ["logprob", "entropy", *own]
    assert all(type(got[name]) is type(x) for name, x in own.items())
    assert sum(x is not None for x in own.values()) >= 2  # hidden states, and a cache


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle", "pytree", "from its items"])
def test_the_output_can_be_copied_and_flattened(how):
    """As data parallelism does, and whoever sends it to another process."""

    @dataclasses.dataclass
    class Output(transformers.utils.ModelOutput):
        logits: torch.Tensor | None = None
        unheard_of: torch.Tensor | None = None
        entropy: str | None = None
        absent: torch.Tensor | None = None

    model, (input_ids, mask) = changed(lambda model, z: z), batch()
    inner = type(model).forward
    type(model).forward = lambda self, *args, **kwargs: Output(
        inner(self, *args, **kwargs).logits, unheard_of=torch.ones(2), entropy="not ours"
    )
    with patched(model), torch.no_grad():  # torch copies no others deeply
        out = model(input_ids=input_ids, attention_mask=mask, return_logprob=True)
    assert list(out) == ["logprob", "unheard_of"] and out.absent is None is out.entropy
    again = {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda x: pickle.loads(pickle.dumps(x)),
        "pytree": lambda x: torch.utils._pytree.tree_map(lambda leaf: leaf, x),
        "from its items": lambda x: type(x)((key, x[key]) for key in x),
    }[how](out)
    assert type(again) is type(out) and list(again) == list(out) and again.absent is None
    assert torch.equal(again.logprob, out[0]) and torch.equal(again["unheard_of"], torch.ones(2))


class Wrapper(nn.Module):
    """As PEFT does: the model's ``forward`` is called, not the model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.base_model.forward(input_ids, attention_mask, **kwargs)


def test_a_wrapped_model():
    model, (input_ids, mask) = make(), batch()
    got = logprob_forward(Wrapper(model), input_ids, mask)
    assert torch.equal(got, logprob_forward(model, input_ids, mask))


@pytest.mark.parametrize("softcap", [0.01, 1.0, 37.5, 1e3, 3e5])
@pytest.mark.parametrize("scale", [0.01, 1.0, 12.0])
def test_scale_and_softcap_are_read(scale, softcap):
    model, (input_ids, mask) = make("gemma2", final_logit_softcapping=softcap), batch()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * scale)
    _, head = hidden_forward(model, input_ids, mask)
    assert head.logit_scale == pytest.approx(scale, rel=1e-6)
    if head.softcap is None:  # it bends nothing
        assert softcap > 1e5 * scale
    else:
        assert head.softcap == pytest.approx(softcap, rel=1e-6)


@pytest.fixture
def one_process(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_data_parallel(kind, one_process):
    model, (input_ids, mask) = make(), batch()
    expected = logprob_forward(model, input_ids, mask)
    want = gradients(model, [expected])
    if kind == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        fsdp = pytest.importorskip("torch.distributed.fsdp")
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
    out = logprob_forward(model, input_ids, mask)
    assert torch.equal(out, expected)
    for name, gradient in gradients(model, [out]).items():
        full = gradient.full_tensor() if kind == "FSDP2" else gradient
        torch.testing.assert_close(full, want[name.removeprefix("module.")])


def test_a_head_sharded_by_itself_is_refused(one_process):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model, (input_ids, mask) = make(), batch()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fsdp.fully_shard(model.lm_head, mesh=mesh)
    for sharded in (model, fsdp.fully_shard(model, mesh=mesh)):
        with pytest.raises(TypeError, match="expected the whole weight of the output embeddings"):
            logprob_forward(sharded, input_ids, mask)


def test_compiled():
    """Its decoder, once for all calls; a model compiled as a whole runs as if it were not."""
    model, (input_ids, mask) = make(), batch()
    want = logprob_forward(model, input_ids, mask)
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(logprob_forward(compiled, input_ids, mask), want)
    assert not graphs
    model.model.compile(backend=backend)
    for _ in range(2):
        torch.testing.assert_close(logprob_forward(model, input_ids, mask), want)
    assert len(graphs) == 1


# --- what cannot be expressed ---------------------------------------------------------------------


def changed(change):
    """A Llama that does ``change(self, logits)`` to its logits."""

    class Model(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = change(self, out.logits)
            return out

    model = make()
    model.__class__ = Model
    model.offset = nn.Parameter(torch.ones(()))
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, z: z + torch.linspace(0, 1, V), "more than a scale and a softcap"),
        *(
            (lambda model, z, k=k, b=b: z + b * (torch.arange(V) == k), "more than a scale")
            for k in (0, 1, 2, 12, V - 1)
            for b in (0.01, -5.0, 1e4)
        ),
        (lambda model, z: z[..., : V - 1], r"returns as `logits` what is of shape"),
        (lambda model, z: z.log_softmax(-1), "more than a scale and a softcap"),
        (lambda model, z: z.clamp(-50, 50), "more than a scale and a softcap"),
        (lambda model, z: -z, "more than a scale and a softcap"),
        (lambda model, z: z.index_fill(-1, torch.tensor([7]), -1e9), "more than a scale"),
        (lambda model, z: z * model.offset, "parameters act on the logits"),
        (lambda model, z: z + torch.zeros(3, 9, V), "returns as `logits` what is of shape"),
        (lambda model, z: z.view(3, 9, V), "failed on a row of logits"),
        (lambda model, z: None, "returns as `logits` what is None"),
        (lambda model, z: model.lm_head(torch.ones(1, 1, 32)), "output embeddings 2 times"),
    ],
    ids=[
        "bias",
        *(f"bias {b} of token {k}" for k in (0, 1, 2, 12, V - 1) for b in (0.01, -5.0, 1e4)),
        *"cut softmax clamp sign banned parameter rows view none twice".split(),
    ],
)
def test_a_head_that_cannot_be_expressed_raises(change, message):
    model, (input_ids, mask) = changed(change), batch()
    with pytest.raises(TypeError, match=f"model: what Model does with its logits.*{message}"):
        logprob_forward(model, input_ids, mask)
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


def test_a_scale_and_a_softcap_together_are_expressed():
    model, (input_ids, mask) = changed(lambda model, z: 2 * torch.tanh(3 * z.float())), batch()
    _, head = hidden_forward(model, input_ids, mask)
    assert head.logit_scale == pytest.approx(6, rel=1e-6)
    assert head.softcap == pytest.approx(2, rel=1e-6)
    got = logprob_forward(model, input_ids, mask)
    torch.testing.assert_close(got, from_logits(model, input_ids, mask)[0])


def test_a_tiny_vocabulary():
    model = make(vocab_size=5)
    input_ids = torch.randint(5, (2, 6))
    got = logprob_forward(model, input_ids)
    torch.testing.assert_close(got, from_logits(model, input_ids, torch.ones(2, 6).long())[0])


def test_other_heads_are_refused():
    class Quantized(nn.Linear):
        def forward(self, x):
            return super().forward(x.round())

    model, (input_ids, mask) = make(), batch()
    model.lm_head.__class__ = Quantized
    with pytest.raises(TypeError, match=r"a plain nn\.Linear, got Quantized with"):
        logprob_forward(model, input_ids, mask)
    for other in (nn.Linear(3, 3), make().model, None):
        with pytest.raises(TypeError, match="model: expected a causal language model"):
            logprob_forward(other, input_ids, mask)


def test_lora_on_lm_head():
    """35. An adapter on the head that a fused loss, which takes the head's weight, passes by: it
    is refused."""

    class Lora(nn.Module):  # as PEFT's has it: weight and bias are those of what it wraps
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.added = base, nn.Linear(32, V, bias=False)

        weight = property(lambda self: self.base_layer.weight)
        bias = property(lambda self: self.base_layer.bias)

        def forward(self, x):
            return self.base_layer(x) + self.added(x)

    model, (input_ids, mask) = make(), batch()
    model.lm_head = Lora(model.lm_head)
    with pytest.raises(TypeError, match=r"a plain nn\.Linear, got Lora with a forward of its own"):
        logprob_forward(model, input_ids, mask)


def test_bad_arguments_are_named():
    model, (input_ids, mask) = make(), batch()
    with pytest.raises(ValueError, match="labels: expected None"):
        logprob_forward(model, input_ids, mask, labels=input_ids)
    with pytest.raises(ValueError, match="tokens: expected the tokens to score"):
        logprob_forward(model, inputs_embeds=torch.zeros(3, 9, 32))
    with pytest.raises(IndexError):
        logprob_forward(model, input_ids, tokens=torch.full((3, 9), V))
    for tokens, error in ((input_ids.float(), TypeError), (input_ids[0], ValueError)):
        with pytest.raises(error, match="tokens: expected"):
            logprob_forward(model, input_ids, tokens=tokens)


def test_the_library_alone_imports_no_transformers():
    script = "import sys, rlhf_kernels; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_encoder_and_decoder():
    config = transformers.BartConfig(
        vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=32,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model, (input_ids, mask) = transformers.BartForConditionalGeneration(config).eval(), batch()
    answer = torch.randint(3, V, (3, 5))
    with pytest.raises(ValueError, match="tokens: expected the tokens to score"):
        logprob_forward(model, input_ids, mask, decoder_input_ids=answer)
    options = {"tokens": answer[:, 1:], "decoder_input_ids": answer}
    got = logprob_forward(model, input_ids, mask, **options)
    logits = model(input_ids, attention_mask=mask, decoder_input_ids=answer).logits
    logp = logits.log_softmax(-1)[:, :-1]
    torch.testing.assert_close(got, logp.gather(-1, answer[:, 1:, None]).squeeze(-1))
    model.final_logits_bias.normal_()
    with pytest.raises(TypeError, match="more than a scale and a softcap"):
        logprob_forward(model, input_ids, mask, **options)
