"""The probe, and the forward pass that takes activations from it, also through wrappers of the model."""

import copy
import pickle
from collections import UserDict, namedtuple
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from fastent import spectral_entropy
from fastent.monitor import isolation
from fastent.monitor.monitor import SpectralEntropyMonitor
from fastent.monitor.probe import Probe, find_layers, plain_module

Monitor = SpectralEntropyMonitor


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (48, 6)), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(7)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(3))
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


# Layers


def test_record_is_the_entropy_of_the_module_output_in_eval_mode() -> None:
    model, x = Blocks(), inputs()
    records = Monitor(model, x, ["blocks.1", "head", ""]).step(0)
    assert [record.layer for record in records] == ["blocks.1", "head", ""]
    model.eval()
    with torch.no_grad():
        h = model.embed(x)
        h = h + model.blocks[0](h)
        expected = [spectral_entropy(model.blocks[1](h)), *[spectral_entropy(model(x))] * 2]
    assert [record.normalized for record in records] == [r.normalized for r in expected]
    assert [record.total_variance for record in records] == [r.total_variance for r in expected]


def test_globs_match_in_the_order_of_the_model_and_never_twice() -> None:
    model = Blocks()
    assert list(find_layers(model, "blocks.?")) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(find_layers(model, ["head", "blocks.*.0", "*.0"])) == [
        "head", "blocks.0.0", "blocks.1.0", "blocks.2.0", "blocks.0",
    ]  # fmt: skip
    assert "" not in find_layers(model, "*")
    model.alias = model.head
    assert "alias" not in find_layers(model, "*")
    assert list(find_layers(model, "alias")) == ["alias"]


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(6, 6), "mlp": nn.Sequential(nn.Linear(6, 6), nn.ReLU())})
            for _ in range(2)
        )
        self.mlp = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block["mlp"](x + block["attn"](x))  # type: ignore[index]
        return self.mlp(x)


ATTN, MLP = ["blocks.0.attn", "blocks.1.attn"], ["blocks.0.mlp", "blocks.1.mlp"]
INSIDE = ["blocks.0.mlp.0", "blocks.0.mlp.1", "blocks.1.mlp.0", "blocks.1.mlp.1"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["embed", "mlp"]),
        ("**", ["embed", "mlp", *ATTN, *MLP, *INSIDE]),
        ("blocks", [*ATTN, *MLP]),
        ("blocks.*", [*ATTN, *MLP]),
        ("b*s", [*ATTN, *MLP]),
        ("blocks.1", ["blocks.1.attn", "blocks.1.mlp"]),
        ("blocks.*.mlp", MLP),
        ("blocks.*.m*", MLP),
        ("blocks.**", [*ATTN, *MLP, *INSIDE]),
        ("**.mlp", ["mlp", *MLP]),
        ("blocks.**.mlp", MLP),
        ("**.attn", ATTN),
        ("**mlp.?", INSIDE),
        ("blocks.[1-9].attn", ["blocks.1.attn"]),
        ("blocks.[!1].attn", ["blocks.0.attn"]),
        ("*.mlp.*", []),
        ("*mlp*", ["mlp"]),
        ("e?bed", ["embed"]),
        (["mlp", "*", "blocks.1.attn"], ["mlp", "embed", "blocks.1.attn"]),
    ],
)
def test_a_star_stays_within_a_level_two_cross_dots_and_a_container_means_its_children(
    pattern: Any, names: list[str]
) -> None:
    if not names:
        with pytest.raises(
            ValueError, match=r"stays within one level, and \*\* would match 'blocks\.0\.mlp\.0'"
        ):
            find_layers(Deep(), pattern)
        return
    found = list(find_layers(Deep(), pattern))
    assert sorted(found) == sorted(names)
    records = Monitor(Deep(), inputs(), pattern).step(0)
    assert [record.layer for record in records] == found
    if isinstance(pattern, list):
        assert found == names


def test_only_what_has_its_own_name_given_is_named() -> None:
    found = find_layers(Deep(), ["mlp", "*", "blocks"])
    assert {name for name, layer in found.items() if layer.named} == {"mlp"}
    assert find_layers(Deep(), ["*", "mlp"])["mlp"].named


def test_a_container_without_modules_is_an_error() -> None:
    model = Deep()
    model.empty = nn.ModuleList()
    with pytest.raises(ValueError, match="'empty' is a container that holds no module"):
        find_layers(model, "empty")


def test_a_sequential_that_is_only_iterated_over_names_its_children_in_the_error() -> None:
    class Iterates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.body:
                x = layer(x)
            return x

    with pytest.raises(RuntimeError, match=r"'body' fired 0 times.*children may run without it: 'body\.0'"):
        Monitor(Iterates(), inputs(), "body")
    assert [record.layer for record in Monitor(Iterates(), inputs(), "body.*").step(0)] == [
        "body.0",
        "body.1",
    ]


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_modules_are_refused_at_construction() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    traced = torch.jit.trace(nn.Linear(6, 6), inputs())
    for model in (scripted, traced):
        with pytest.raises(TypeError, match="model is a TorchScript module"):
            Monitor(model, inputs(), "", check=False)
    model = nn.Sequential(nn.Linear(6, 6), scripted)
    for name in ("1", "1.0", "*", "**"):
        with pytest.raises(TypeError, match="is in a TorchScript module, which calls no hooks"):
            Monitor(model, inputs(), name, check=False)
    assert Monitor(model, inputs(), "0").step(0)[0].d == 6


def test_what_a_function_returns_is_measured_when_it_returns() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True)), inputs()

    def first(net: nn.Module, probe: Any) -> Tensor:
        h = net[0](probe)  # type: ignore[index]
        net[1](h)  # type: ignore[index]
        return h

    assert Monitor(model, x, first).step(0)[0].normalized == spectral_entropy(model(x).detach()).normalized


def test_a_typo_is_an_error_with_close_names() -> None:
    with pytest.raises(ValueError, match=r"no layer matches 'block\.1'; close to it: 'blocks\.1'"):
        Monitor(Blocks(), inputs(), "block.1")
    with pytest.raises(ValueError, match="no layer matches 'zzz'; the model has: 'embed'"):
        Monitor(Blocks(), inputs(), "zzz")
    with pytest.raises(ValueError, match=r"no layer matches 'block\.9\*'"):
        Monitor(Blocks(), inputs(), ["head", "block.9*"])
    with pytest.raises(ValueError, match="layers is empty"):
        Monitor(Blocks(), inputs(), [])


def test_a_module_in_place_of_a_name_is_an_error() -> None:
    model = Blocks()
    with pytest.raises(TypeError, match=r"names of model\.named_modules"):
        Monitor(model, inputs(), model.head)
    with pytest.raises(TypeError, match="got Linear among them"):
        Monitor(model, inputs(), [model.head])
    with pytest.raises(TypeError, match="a name, several of them, or a function; got 0"):
        Monitor(model, inputs(), 0)  # type: ignore[arg-type]


def test_a_layer_that_never_ran_is_an_error_that_counts_0_times() -> None:
    model = Blocks()
    monitor = Monitor(model, inputs(), ["head", "unused"], check=False)
    with pytest.raises(RuntimeError, match="'unused' fired 0 times"):
        monitor.step(0)
    assert monitor.history == []  # nothing in part
    attention = nn.MultiheadAttention(8, 2, batch_first=True)  # takes out_proj's weights without calling it
    x = inputs(16, 5, 8)
    with pytest.raises(RuntimeError, match=r"'out_proj' fired 0 times.*uses its weights"):
        Monitor(attention, (x, x, x), "out_proj").step(0)


def test_a_layer_that_ran_3_times_is_an_error_that_counts_them() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.cell(x).tanh()
            return x

    with pytest.raises(RuntimeError, match="'cell' fired 3 times"):
        Monitor(Loop(), inputs(), "cell").step(0)


def test_a_module_tied_to_two_places_is_an_error_that_counts_2_times() -> None:
    first = nn.Linear(6, 6)
    model = nn.Sequential(first, nn.Tanh(), first)
    for name in ("0", "2"):
        with pytest.raises(RuntimeError, match=f"'{name}' fired 2 times"):
            Monitor(model, inputs(), name).step(0)


def test_tied_weights_in_two_modules_are_two_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    records = Monitor(model, inputs(), ["0", "2"]).step(0)
    assert records[0].total_variance != records[1].total_variance


def test_an_in_place_operation_after_the_layer_does_not_change_its_record() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True)), inputs()
    record = Monitor(model, x, "0").step(0)[0]
    assert record.normalized == spectral_entropy(model[0](x).detach()).normalized
    assert record.normalized != spectral_entropy(model(x).detach()).normalized


def test_the_input_of_a_module_is_taken_beside_its_output_by_name_and_by_glob() -> None:
    model, x = Blocks().eval(), inputs()
    with torch.no_grad():
        embedded = model.embed(x)
        first = embedded + model.blocks[0](embedded)
        second = first + model.blocks[1](first)
    inside = {"blocks.0": embedded, "blocks.1": first, "blocks.2": second}
    records = Monitor(model, x, ["blocks.?:input", "blocks.1", "embed:input", ":input"]).step(0)
    expected = {f"{name}:input": h for name, h in inside.items()}
    expected |= {"blocks.1": model.blocks[1](first), "embed:input": x, ":input": x}
    assert {record.layer for record in records} == set(expected)
    for record in records:
        assert record.normalized == spectral_entropy(expected[record.layer].detach()).normalized, record.layer
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_input_is_what_the_module_gets_by_place_or_by_keyword_before_it_runs() -> None:
    class InPlace(nn.Module):
        def forward(self, scale: float, *, h: Tensor, other: Tensor) -> Tensor:
            return h.mul_(other * scale)

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.empty = InPlace(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.empty("no tensor")
            return self.inner(2.0, h=x.clone(), other=x)

    x = inputs()
    records = Monitor(Caller(), x, ["inner:input", "inner"]).step(0)
    assert [r.normalized for r in records] == [spectral_entropy(h).normalized for h in (x, x * (x * 2.0))]
    with pytest.raises(TypeError, match="layer 'empty:input' was called without a tensor at its first level"):
        Monitor(Caller(), x, "empty:input").step(0)
    model = Caller()  # a module's own hooks come first: what they put in is what it gets
    model.inner.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "h": 3 * kwargs["other"].flip(1)}), with_kwargs=True
    )
    record = Monitor(model, x, "inner:input").step(0)[0]
    assert record.total_variance == spectral_entropy(3 * x.flip(1)).total_variance


def test_an_input_that_no_layer_has_is_an_error_with_the_name_as_it_was_asked_for() -> None:
    with pytest.raises(ValueError, match=r"no layer matches 'heed:input'; close to it: 'head'"):
        Monitor(Blocks(), inputs(), "heed:input")
    with pytest.raises(ValueError, match="no layer matches 'head:output'"):
        Monitor(Blocks(), inputs(), "head:output")
    with pytest.raises(RuntimeError, match="'unused:input' fired 0 times"):
        Monitor(Blocks(), inputs(), "unused:input").step(0)


def test_hooks_are_gone_afterwards_and_after_an_exception() -> None:
    model = Blocks()
    Monitor(model, inputs(), "*", check=False).step  # noqa: B018  built, not run
    for layers in ("head", "unused"):
        try:
            Monitor(model, inputs(), layers).step(0)
        except RuntimeError:
            assert layers == "unused"
        assert not any(module._forward_hooks for module in model.modules())


def test_of_a_tuple_a_dict_or_a_named_tuple_the_first_tensor_is_taken() -> None:
    pair = namedtuple("pair", "loss logits")

    class Output(nn.Module):
        def __init__(self, make: Any) -> None:
            super().__init__()
            self.make = make

        def forward(self, x: Tensor) -> Any:
            return self.make(x)

    x = inputs()
    expected = spectral_entropy(x).normalized
    for make in (
        lambda h: (None, h, 2 * h),
        lambda h: [h],
        lambda h: pair(None, h),
        lambda h: {"a": None, "b": h},
    ):
        assert Monitor(Output(make), x, "").step(0)[0].normalized == expected
    with pytest.raises(TypeError, match="layer '' returned NoneType without a tensor"):
        Monitor(Output(lambda h: None), x, "").step(0)
    with pytest.raises(TypeError, match="layer '' returned tuple without a tensor"):
        Monitor(Output(lambda h: ((h,),)), x, "").step(0)


def test_a_recurrent_layer_gives_its_outputs_and_needs_tokens() -> None:
    model, x = nn.LSTM(6, 5, batch_first=True), inputs(20, 4, 6)
    out = model(x)[0]
    record = Monitor(model, x, "", tokens="last").step(0)[0]
    assert record.normalized == spectral_entropy(out[:, -1].detach()).normalized
    with pytest.raises(ValueError, match=r"layer '' on the probe: .* Say which: tokens=\"flatten\"") as info:
        Monitor(model, x, "").step(0)
    assert "batch_dims" not in str(info.value)  # which is no argument of a monitor


def test_tokens_apply_to_3d_layers_only_so_a_glob_may_mix_them() -> None:
    class Pool(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.mean(1)

    model, x = nn.Sequential(nn.Linear(6, 5), Pool()), inputs(20, 4, 6)
    records = Monitor(model, x, "*", tokens="flatten").step(0)
    assert [(record.layer, record.n) for record in records] == [("0", 80), ("1", 20)]


def test_transformer_layers_run_as_in_training_not_in_the_inference_kernel() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x, padding = inputs(12, 5, 8), torch.zeros(12, 5, dtype=torch.bool)
    padding[:, 3:] = True
    probe = {"src": x, "src_key_padding_mask": padding}
    # The inference kernel would make "layers.0" a nested tensor and never call "layers.1.linear1".
    layers, mask = ["layers.0", "layers.1.linear1", ""], "~src_key_padding_mask"
    records = Monitor(model, probe, layers, tokens="flatten", mask=mask).step(0)
    assert [record.n for record in records] == [36, 36, 36]
    assert [record.d for record in records] == [8, 16, 8]


def test_a_callable_gets_the_plain_module_in_eval_mode_and_the_probe() -> None:
    model, x = Blocks(), inputs()

    def embedding(module: nn.Module, probe: Any) -> Tensor:
        assert module is model
        assert probe is x
        assert not module.training
        return module.embed(probe)

    record = Monitor(model, x, embedding).step(0)[0]
    assert record.layer == "embedding"
    assert record.normalized == spectral_entropy(model.embed(x).detach()).normalized
    assert model.training

    by_name = Monitor(model, x, lambda module, probe: {"a": module.embed(probe), "b": probe}).step(0)
    assert [record.layer for record in by_name] == ["a", "b"]
    assert by_name[1].normalized == spectral_entropy(x).normalized

    with pytest.raises(
        TypeError, match=r"layer '<lambda>' on the probe: h must be a torch\.Tensor.*; got int"
    ):
        Monitor(model, x, lambda module, probe: 3).step(0)


# The probe


def test_probe_forms_give_the_same_activations() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor | None = None, scale: float = 1.0) -> Tensor:
            return scale * (a if b is None else a + b)

    a, b = inputs(), inputs(seed=1)
    expected = spectral_entropy(2.0 * (a + b)).normalized
    for probe in ((a, b, 2.0), {"a": a, "b": b, "scale": 2.0}, UserDict(a=a, b=b, scale=2.0)):
        assert Monitor(Sum(), probe, "").step(0)[0].normalized == expected


@pytest.mark.parametrize("n", [0, 1])
def test_a_probe_of_0_or_1_samples_is_refused_when_the_monitor_is_built(n: int) -> None:
    with pytest.raises(ValueError, match=f"the probe has N = {n}"):
        Monitor(Blocks(), inputs(n, 6), "head")


def test_one_sample_is_enough_where_its_tokens_are_the_rows() -> None:
    record = Monitor(nn.Linear(6, 3), inputs(1, 40, 6), "", tokens="flatten").step(0)[0]
    assert record.n == 40
    with pytest.raises(ValueError, match="N = 0"):
        Monitor(nn.Linear(6, 3), inputs(0, 40, 6), "", tokens="flatten")
    with pytest.raises(ValueError, match="N = 1"):
        Monitor(nn.Linear(6, 3), inputs(1, 40, 6), "", tokens="last")


def test_a_probe_without_tensors_or_with_unhashable_content_is_refused() -> None:
    with pytest.raises(ValueError, match="no tensor with a sample axis"):
        Probe((torch.tensor(1.0), None))
    with pytest.raises(TypeError, match=r"probe\.0 is ndarray"):
        Probe((np.zeros((4, 2)),))
    with pytest.raises(TypeError, match="got ndarray"):
        Probe(np.zeros((4, 2)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"probe\.x has layout torch\.sparse_coo"):
        Probe({"x": torch.eye(3).to_sparse()})


def test_a_changed_probe_is_an_error_naming_old_and_new_content() -> None:
    x = inputs()
    monitor = Monitor(Blocks(), x, "head", every=1)
    monitor.step(0)
    old = Probe(x).digest[:12]
    x[3, 2] += 1e-6
    new = Probe(x).digest[:12]
    with pytest.raises(ValueError, match=f"content was {old} and is {new}"):
        monitor.step(1)
    x.copy_(inputs())  # the same content again, though its version counter went on
    assert len(monitor.step(2)) == 1


def test_a_probe_changed_through_numpy_which_leaves_no_mark_is_found() -> None:
    array = inputs().numpy().copy()
    monitor = Monitor(Blocks(), torch.from_numpy(array), "head")
    array[0] = 0
    with pytest.raises(ValueError, match="the probe changed"):
        monitor.step(0)


def test_a_probe_that_moved_to_another_device_is_an_error_naming_both() -> None:
    x = inputs()
    probe = Probe((x,))
    torch.utils.swap_tensors(x, torch.empty_like(x, device="meta"))
    with pytest.raises(ValueError, match="moved from cpu to meta"):
        probe.check()


def test_the_digest_knows_content_dtype_shape_and_plain_values_but_not_strides_or_order() -> None:
    x = inputs(4, 6)
    digest = Probe(x).digest
    assert Probe(x.T.contiguous().T).digest == digest
    assert Probe(x.reshape(6, 4)).digest != digest
    assert Probe(x.double()).digest != digest
    assert Probe({"x": x, "k": 1}).digest == Probe({"k": 1, "x": x}).digest
    assert Probe({"x": x, "k": 1}).digest != Probe({"x": x, "k": 2}).digest
    for dtype in (torch.bfloat16, torch.int64, torch.bool):
        assert Probe(x.to(dtype)).digest == Probe(x.to(dtype).clone()).digest
    with torch.inference_mode():
        frozen = x.clone()
    Probe(frozen).check()  # has no version counter


# Wrappers


def fit(model: nn.Module, plain: nn.Module, monitor: Monitor | None, steps: int = 3) -> list[Tensor]:
    opt = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(steps):
        opt.zero_grad()
        model(inputs(48, 6, seed=step)).square().mean().backward()
        if monitor:
            monitor.step(2 * step)
        opt.step()
        if monitor:
            monitor.step(2 * step + 1)
    return [p.detach().clone() for p in plain.parameters()]


@pytest.fixture
def dynamo() -> Iterator[Any]:
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield torch._dynamo.utils.counters
    torch._dynamo.reset()


class Affine(nn.Linear):  # torch.compile skips the code of torch's own modules, not of this one
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Affine(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)).relu())


@pytest.mark.parametrize("how", ["wrapped", "in place", "submodule wrapped", "submodule in place"])
def test_a_compiled_model_is_probed_with_0_recompiles_and_0_graph_breaks(how: str, dynamo: Any) -> None:
    def build() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        plain = Net()
        if how == "wrapped":
            return torch.compile(plain, backend="eager"), plain
        if how == "in place":
            plain.compile(backend="eager")
        elif how == "submodule wrapped":
            plain.first = torch.compile(plain.first, backend="eager")
        else:
            plain.first.compile(backend="eager")
        return plain, plain

    expected = fit(*build(), None)
    graphs = dynamo["stats"]["unique_graphs"]
    assert graphs >= 1

    torch._dynamo.reset()
    dynamo.clear()
    model, plain = build()
    monitor = Monitor(model, inputs(48, 6, seed=99), ["first:input", "first", "norm"], every=1)
    weights = fit(model, plain, monitor)
    assert all(map(torch.equal, weights, expected))
    assert dynamo["stats"]["unique_graphs"] == graphs
    assert not dynamo["graph_break"]
    assert [record.layer for record in monitor.history] == ["first:input", "first", "norm"] * 6
    assert monitor.history[0].normalized == spectral_entropy(inputs(48, 6, seed=99)).normalized
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        direct = spectral_entropy(plain.first(inputs(48, 6, seed=99)))
    assert Monitor(model, inputs(48, 6, seed=99), "first").step(0)[0].normalized == direct.normalized


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_plain_module_takes_wrappers_off_in_any_order(process_group: None) -> None:
    net = Net()
    ddp = nn.parallel.DistributedDataParallel(torch.compile(net, backend="eager"))
    wrapped = torch.compile(ddp, backend="eager")
    assert plain_module(wrapped) is net
    assert plain_module(nn.DataParallel(net)) is net


def test_a_ddp_model_is_probed_through_its_module_with_plain_names(process_group: None) -> None:
    torch.manual_seed(0)
    expected = fit(net := Net(), net, None)
    torch.manual_seed(0)
    ddp = nn.parallel.DistributedDataParallel(net := Net())
    monitor = Monitor(ddp, inputs(), ["norm", "norm:input", "first"], every=1)
    weights = fit(ddp, net, monitor)
    assert all(map(torch.equal, weights, expected))
    assert {record.layer for record in monitor.history} == {"norm", "norm:input", "first"}
    records = {record.layer: record.normalized for record in monitor.history[-3:]}
    assert records["norm:input"] == records["first"] != records["norm"]


def test_what_an_average_of_weights_and_a_ddp_part_hold_have_the_names_of_what_they_wrap(
    process_group: None,
) -> None:
    net = Net()
    average = AveragedModel(net)
    net.head = nn.parallel.DistributedDataParallel(net.head)  # type: ignore[assignment]
    records = [
        record
        for model in (average, net)
        for record in Monitor(model, inputs(), ["norm", "head", "*"]).step(0)
    ]
    assert [record.layer for record in records] == ["norm", "head", "first"] * 2
    assert [record.normalized for record in records[:3]] == [record.normalized for record in records[3:]]


WRAPPERS: dict[str, Any] = {
    "EMA": AveragedModel,
    "EMA of compiled": lambda net: AveragedModel(torch.compile(net, backend="eager")),
    "compiled EMA": lambda net: torch.compile(AveragedModel(net), backend="eager"),
    "EMA of checkpointed": lambda net: AveragedModel(checkpoint_wrapper(net)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_no_wrapper_is_part_of_a_layers_name_and_the_whole_path_is_one_too(wrap: Any) -> None:
    layers = ["embed", "blocks", "blocks.1.*", "**head", "embed:input"]
    expected = Monitor(Blocks().eval(), inputs(), layers).step(0)
    torch.manual_seed(7)
    model = wrap(Blocks())
    records = Monitor(model, inputs(), layers).step(0)
    assert [(record.layer, record.normalized) for record in records] == [
        (record.layer, record.normalized) for record in expected
    ]
    path = next(path for path, _ in plain_module(model).named_modules() if path.endswith("head"))
    assert path != "head"
    for wanted in (path, f"**.{path}".replace("**.module", "*")):
        assert [record.layer for record in Monitor(model, inputs(), wanted).step(0)] == [path]


def test_a_copy_and_a_pickle_of_model_and_monitor_have_no_hook_and_go_on_by_themselves() -> None:
    for wrap in (lambda net: net, *WRAPPERS.values()):
        model = wrap(Blocks())
        monitor = Monitor(model, inputs(), "head", every=1)
        monitor.step(0)
        twins = []
        for again in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in again(model).modules())
            twins.append(again(monitor))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(inputs(*weight.shape))  # the twins' are their own
        ((before,), (after,)) = monitor.history, monitor.step(1)
        assert before.normalized != after.normalized
        assert [twin.step(1)[0].normalized for twin in twins] == [before.normalized] * 2


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net, mesh = Net(), init_device_mesh("cpu", (1,))
    fully_shard(net.head, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def whole(weights: list[Tensor]) -> list[Tensor]:
    return [weight.full_tensor() for weight in weights]


def test_an_fsdp2_model_trains_to_the_same_bits_with_a_probe_before_and_after_each_update(
    process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(fit(net := sharded(), net, None))
    net = sharded()
    monitor = Monitor(net, inputs(), ["norm", "head"], every=1)
    assert all(map(torch.equal, whole(fit(net, net, monitor)), expected))
    assert len(monitor.history) == 12

    # Not sharded again, the root's weights stay gathered, and the update of the shards would pass them by.
    monkeypatch.setattr(isolation, "_resharded", lambda modules: nullcontext())
    Monitor(net, inputs(), "norm").step(0)
    assert not hasattr(net.first.weight, "full_tensor")


def test_activations_that_are_spread_over_ranks_are_gathered(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, x = init_device_mesh("cpu", (1,)), inputs()
    record = Monitor(Net(), x, lambda net, probe: distribute_tensor(probe, mesh, [Shard(0)])).step(0)[0]
    assert record.normalized == spectral_entropy(x).normalized


def test_of_a_sharded_model_rank_0_alone_records_and_the_others_run_the_pass(
    process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, passes = sharded(), []
    net.head.register_forward_hook(lambda module, args, out: passes.append(1))
    monitor = Monitor(net, inputs(), "head", every=1)
    assert len(passes) == 1  # the check, on every rank
    assert len(monitor.step(0)) == 1
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert monitor.step(1) == []
    assert monitor.step(1) == []
    assert len(passes) == 3
    assert len(monitor.history) == 1
    plain = Net()  # not sharded: each rank that calls records
    assert len(Monitor(plain, inputs(), "head").step(0)) == 1
