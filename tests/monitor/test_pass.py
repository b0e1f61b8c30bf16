"""The probe's pass: where it ends, in how many parts it is made and with which casts, and that H is the same."""

import json
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastent
from fastent import Moments, Status
from fastent.monitor import probe as probe_module
from fastent.monitor.monitor import SpectralEntropyMonitor as Monitor
from fastent.monitor.probe import Probe

BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def inputs(n: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


class Counted(nn.Linear):
    """Counts its calls in a list, which a probe puts back, and in one of the class, which it does not."""

    calls: list[str] = []  # noqa: RUF012

    def __init__(self, name: str, *sizes: int) -> None:
        super().__init__(*sizes)
        self.name, self.own = name, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.name)
        self.own[0] += 1
        return super().forward(x)


class Model(nn.Module):
    """An embedding, three blocks with a buffer, a norm and a projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = Counted("embed", 6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(Counted(f"block{i}", 8, 8), nn.BatchNorm1d(8), nn.Tanh()) for i in range(3)
        )
        self.head = Counted("head", 8, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _no_calls() -> Iterator[None]:
    Counted.calls.clear()
    yield
    Counted.calls.clear()


def calls(monitor: Monitor, step: int) -> list[str]:
    """What ran in the probe's pass of a step."""
    Counted.calls.clear()
    monitor.step(step)
    return list(Counted.calls)


ALL = ["embed", "block0", "block1", "block2", "head"]


def values(monitor: Monitor) -> str:
    return json.dumps(monitor.state_dict()["history"])


def test_the_projection_behind_the_last_watched_layer_is_computed_in_the_first_pass_alone() -> None:
    model = Model()
    monitor = Monitor(model, inputs(), "blocks", every=1)
    assert Counted.calls == ALL
    assert calls(monitor, 0) == calls(monitor, 1) == ALL[:-1]
    unchecked = Monitor(model, inputs(), "blocks", every=1, check=False)
    assert calls(unchecked, 0) == ALL
    assert calls(unchecked, 1) == ALL[:-1]
    assert values(unchecked) == values(monitor)


@pytest.mark.parametrize(
    ("layers", "ran"),
    [
        ("blocks.2:input", ALL[:3]),
        (["blocks.1", "embed"], ALL[:3]),
        (["blocks.0.0:input", "blocks.0.0"], ALL[:2]),
        ("head", ALL),
        (["", "embed"], ALL),
        (lambda model, x: model.embed(x), ALL[:1]),
    ],
)
def test_a_pass_ends_with_the_last_layer_in_the_order_of_the_model_or_before_it_runs(
    layers: Any, ran: list[str]
) -> None:
    monitor = Monitor(Model(), inputs(), layers, every=1)
    assert calls(monitor, 0) == ran


def test_what_a_shorter_pass_records_has_the_bits_of_a_whole_one_and_training_those_of_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(watch: bool) -> tuple[list[Tensor], str]:
        model = Model()
        monitor = Monitor(model, inputs(), ["blocks.1", "blocks.0.1:input"], every=1) if watch else Monitor()
        for step in range(3):
            if watch:
                monitor.step(step)
            model.zero_grad()
            model(inputs(seed=step + 1)).square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad  # type: ignore[operator]
        assert model.head.own == [3]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        return [*model.state_dict().values(), torch.get_rng_state()], values(monitor)

    short, history = train(True)
    assert all(map(torch.equal, short, train(False)[0]))
    monkeypatch.setattr(probe_module, "_has_hooks_for_any_end", lambda model: True)
    assert train(True)[1] == history


def test_a_layer_that_is_idle_lets_the_pass_go_on_and_one_that_wakes_up_is_seen() -> None:
    class Sparse(Model):
        used = (0, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for i in self.used:
                x = x + self.blocks[i](x)
            return self.head(x)

    model = Sparse()
    monitor = Monitor(model, inputs(), "blocks.*", every=1)
    assert calls(monitor, 0) == ALL[:-1]
    model.used = (0, 1)  # type: ignore[assignment]
    assert calls(monitor, 1) == ["embed", "block0", "block1", "head"]
    assert [r.status.value for r in monitor.history[-3:]] == ["ok", "ok", "not_run"]
    model.used = (1, 0, 2)  # in another order: whole once more
    assert calls(monitor, 2) == ["embed", "block1", "block0", "block2", "head"]
    assert calls(monitor, 3) == ["embed", "block1", "block0", "block2"]
    model.used = (0, 0, 1, 2)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"'blocks\.0' fired 2 times in one forward pass"):
        monitor.step(4)


def test_an_idle_layer_that_only_a_pattern_matched_is_waited_for_to_the_end_of_the_pass() -> None:
    class Late(Model):
        late = False

        def __init__(self) -> None:
            super().__init__()
            self.blocks.append(nn.Linear(40, 5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks[:3]:  # type: ignore[union-attr]
                x = x + block(x)
            x = self.head(x)
            return self.blocks[3](x) if self.late else x

    model = Late()
    with pytest.warns(UserWarning, match=r"'blocks\.3' did not run"):
        monitor = Monitor(model, inputs(), "blocks.*", every=1)
    assert calls(monitor, 0) == ALL
    model.late = True
    assert [r.layer for r in monitor.step(1)] == [*BLOCKS, "blocks.3"]


def test_a_loaded_state_is_followed_by_a_whole_pass() -> None:
    monitor = Monitor(Model(), inputs(), BLOCKS, every=1)
    monitor.step(0)
    monitor.load_state_dict(monitor.state_dict())
    assert calls(monitor, 1) == ALL
    assert calls(monitor, 2) == ALL[:-1]


variable: ContextVar[int] = ContextVar("variable", default=0)


def test_what_a_model_changes_for_the_time_of_its_pass_is_put_back_where_it_is_cut_short() -> None:
    class Scoped(Model):
        def forward(self, x: Tensor) -> Tensor:
            token = variable.set(1)
            self.step = self.embed.bias.new_ones(1)
            self.blocks[0].training = True
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
                out = super().forward(x)
            variable.reset(token)
            return out

    model = Scoped()
    fields = set(model.__dict__)
    monitor = Monitor(model, inputs(), BLOCKS, every=1)
    assert calls(monitor, 0) == ALL[:-1]
    assert variable.get() == 0
    assert set(model.__dict__) == fields
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_a_model_that_catches_what_its_layers_raise_gives_the_same(caught: type[BaseException]) -> None:
    class Catching(Model):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except caught:
                return super().forward(x)

    monitor, plain = (Monitor(model, inputs(), BLOCKS, every=1) for model in (Catching(), Model()))
    plain.step(0)
    assert calls(monitor, 0) == (ALL[:-1] if caught is Exception else [*ALL[:-1], *ALL])
    assert values(monitor) == values(plain)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_may_be_the_last(reentrant: bool) -> None:
    class Checkpointed(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    model, plain = Checkpointed(), Monitor(Model(), inputs(), BLOCKS, every=1)
    monitor = Monitor(model, inputs(), BLOCKS, every=1)
    plain.step(0)
    assert calls(monitor, 0) == ALL[:-1]
    assert values(monitor) == values(plain)
    model(inputs().requires_grad_()).sum().backward()
    assert model.embed.weight.grad is not None


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_that_is_to_be_called_at_any_end_makes_the_pass_whole(everywhere: bool) -> None:
    seen: list[str] = []
    model = Model()
    monitor = Monitor(model, inputs(), BLOCKS, every=1)

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if module is model:
            seen.append("end")

    if everywhere:
        handle = nn.modules.module.register_module_forward_hook(hook, always_call=True)
    else:
        handle = model.register_forward_hook(hook, always_call=True)
    try:
        assert calls(monitor, 0) == ALL
    finally:
        handle.remove()
    assert seen == ["end"]
    assert calls(monitor, 1) == ALL[:-1]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_where_ranks_need_each_other_the_pass_is_whole_and_under_ddp_it_is_not(process_group: None) -> None:
    class Parallel(Model):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            torch.distributed.all_reduce(out)
            return out

    ddp = nn.parallel.DistributedDataParallel(Model())
    assert calls(Monitor(ddp, inputs(), BLOCKS, every=1), 0) == ALL[:-1]
    # Another rank may watch other layers, and would wait for this one in a call behind its own end.
    assert calls(Monitor(Parallel(), inputs(), BLOCKS, every=1), 0) == ALL


def test_a_sharded_models_pass_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "is_sharded", lambda module: True)
    for rank in range(2):
        monkeypatch.setattr(probe_module, "_rank", lambda rank=rank: rank)
        assert calls(Monitor(Model(), inputs(), BLOCKS, every=1), 0) == ALL
        Counted.calls.clear()
        monitor = Monitor(Model(), inputs(), BLOCKS, every=1, batch_size=8)
        assert Counted.calls == 3 * ALL  # in the check at construction too
        assert calls(monitor, 0) == 3 * ALL


@pytest.mark.parametrize("parts", [1, 3])
def test_an_error_of_this_rank_alone_does_not_end_its_part_of_a_sharded_models_pass(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "is_sharded", lambda module: True)
    monitor = Monitor(Model(), inputs(), BLOCKS, every=1, batch_size=24 // parts)
    monitor._evaluator._devices["blocks.0"] = torch.device("meta")
    Counted.calls.clear()
    with pytest.raises(ValueError, match=r"'blocks.0' on the probe: the activations moved from meta to cpu"):
        monitor.step(0)
    assert Counted.calls == parts * ALL
    monitor._evaluator.forget()
    assert len(monitor.step(0)) == 3


def test_a_layer_in_a_thread_of_the_models_own_ends_no_pass() -> None:
    import threading

    class Threaded(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            thread = threading.Thread(target=lambda: self.blocks[0](x))
            thread.start()
            thread.join()
            return self.head(x)

    monitor = Monitor(Threaded(), inputs(), "blocks.0", every=1)
    assert calls(monitor, 0) == ["embed", "block0", "head"]
    assert len(monitor.history) == 1


# In parts


def close(ours: Monitor, theirs: Monitor) -> None:
    assert [(r.layer, r.n, r.d, r.status, r.mask) for r in ours.history] == [
        (r.layer, r.n, r.d, r.status, r.mask) for r in theirs.history
    ]
    for a, b in zip(ours.history, theirs.history, strict=True):
        assert a.normalized == pytest.approx(b.normalized, abs=1e-12)
        assert a.total_variance == pytest.approx(b.total_variance, rel=1e-12)


@pytest.mark.parametrize("size", [1, 5, 8, 23])
def test_a_probe_in_parts_has_the_entropy_of_the_whole_and_the_bits_of_its_parts_moments(size: int) -> None:
    model, x = Model().double(), inputs(24).double()  # in float32 a product of fewer rows has other last bits
    monitor = Monitor(model, x, ["head", "blocks.1", "embed:input"], every=1, batch_size=size)
    whole = Monitor(model, x, ["head", "blocks.1", "embed:input"], every=1)
    monitor.step(0)
    whole.step(0)
    close(monitor, whole)
    model.eval()
    with torch.no_grad():
        parts = [model(part) for part in x.split(size)]
    moments = Moments()
    for part in parts:
        moments.update(part)
    assert monitor.history[0].normalized == moments.spectral_entropy().normalized


def test_a_part_as_large_as_the_probe_is_the_whole_pass_to_the_bit() -> None:
    large, whole = (Monitor(Model(), inputs(), "head", every=1, batch_size=b) for b in (24, None))
    large.step(0)
    whole.step(0)
    assert values(large) == values(whole)


def test_each_part_ends_with_the_last_watched_layer_after_the_first_whole_one() -> None:
    monitor = Monitor(Model(), inputs(), "blocks", every=1, batch_size=10)
    assert Counted.calls == ALL + 2 * ALL[:-1]
    assert calls(monitor, 0) == 3 * ALL[:-1]


def test_every_tensor_with_the_probes_samples_is_cut_at_any_depth_and_nothing_else() -> None:
    pair = namedtuple("pair", "a k")
    probe = {
        "x": inputs(6),
        "other": torch.arange(4),
        "scale": 2.0,
        "nested": [torch.arange(6), (torch.arange(6), None)],
        "pair": pair(torch.arange(12).view(6, 2), "text"),
        "own": UserDict(y=torch.arange(6), z=torch.tensor(3)),
        "ordered": OrderedDict(y=torch.arange(6)),
    }
    given, args, kwargs = Probe(probe).part(slice(4, 6))
    assert args == ()
    assert given == kwargs
    assert torch.equal(kwargs["x"], probe["x"][4:])  # type: ignore[index]
    assert kwargs["other"] is probe["other"]
    assert kwargs["scale"] == 2.0
    assert kwargs["nested"][0].tolist() == kwargs["nested"][1][0].tolist() == [4, 5]
    assert type(kwargs["pair"]) is pair
    assert kwargs["pair"].a.tolist() == [[8, 9], [10, 11]]
    assert (type(kwargs["own"]), kwargs["own"]["y"].tolist(), kwargs["own"]["z"].item()) == (
        UserDict,
        [4, 5],
        3,
    )
    assert (type(kwargs["ordered"]), kwargs["ordered"]["y"].tolist()) == (OrderedDict, [4, 5])
    assert probe["own"]["y"].tolist() == list(range(6))  # type: ignore[index]
    x, args, kwargs = Probe(inputs(6)).part(slice(0, 2))
    assert args[0] is x
    assert kwargs == {}
    assert [len(t) for t in Probe((inputs(6), torch.arange(6))).part(slice(0, 2))[1]] == [2, 2]


class Tokens(nn.Module):
    """Samples of tokens with a mask; `first` gives them as (tokens, samples, d), `flat` as rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 4)
        self.shape = ""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.shape == "first":
            x = x.transpose(0, 1)
        return self.outer(self.inner(x.flatten(0, 1) if self.shape == "flat" else x).tanh())


@pytest.mark.parametrize("tokens", ["flatten", "first", "last", "mean", "skip_first"])
@pytest.mark.parametrize("shape", ["", "first", "flat"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_mask_is_cut_with_its_samples(tokens: Any, shape: str, dtype: torch.dtype) -> None:
    model = Tokens().double()
    model.shape = shape
    x = torch.randn(11, 7, 6, generator=torch.Generator().manual_seed(3)).double()
    mask = torch.ones(11, 7, dtype=dtype)
    mask[:4, 5:] = 0  # the second part of four is full, the third is not
    mask[9] = 0
    mask[9, 3] = 1
    options: Any = {"tokens": tokens, "samples_axis": 1 if shape == "first" else None}
    probe = {"x": x, "attention_mask": mask}
    whole, parts = (Monitor(model, probe, ["outer", "inner"], batch_size=b, **options) for b in (None, 4))
    whole.step(0)
    parts.step(0)
    close(parts, whole)
    assert {r.mask for r in parts.history} == {"attention_mask"}


def test_a_part_of_padding_alone_adds_no_row() -> None:
    x, mask = inputs(48).view(8, 6, 6).double(), torch.ones(8, 6)
    mask[2:4] = 0
    probe = {"x": x, "attention_mask": mask}
    whole, parts = (
        Monitor(Tokens().double(), probe, "inner", tokens="flatten", batch_size=b) for b in (None, 2)
    )
    whole.step(0)
    parts.step(0)
    close(parts, whole)
    assert parts.history[0].n == 36


def test_which_axis_of_a_part_counts_samples_must_be_seen() -> None:
    x = torch.randn(7, 11, 6)  # (tokens, samples, d)
    with pytest.raises(ValueError, match=r"samples_axis=1 cannot tell which one .*: take another batch_size"):
        Monitor(nn.Linear(6, 4), torch.randn(11, 4, 6), "", tokens="last", samples_axis=1, batch_size=4)
    with pytest.raises(ValueError, match=r"a part of the probe, 3 samples along its first axis"):
        Monitor(nn.Linear(6, 4), x, "", tokens="last", samples_axis=1, batch_size=3)


class Routed(nn.Module):
    """Two experts; samples go to the second where their first feature is above `edge`."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.edge = nn.ModuleList(nn.Linear(6, 5) for _ in range(2)), edge

    def forward(self, x: Tensor) -> list[Tensor]:
        second = x[:, 0] > self.edge
        parts = zip(self.experts, (x[~second], x[second]), strict=True)
        return [expert(rows) for expert, rows in parts if len(rows)]


def test_an_expert_may_be_idle_in_a_part_and_have_one_row_in_another() -> None:
    x = inputs(20)
    x[:, 0] = -1.0
    x[[7, 18], 0] = 1.0
    names = ["experts.0", "experts.1"]
    whole, parts = (
        Monitor(Routed(0.0).double(), x.double(), names, every=1, batch_size=b) for b in (None, 6)
    )
    whole.step(0)
    parts.step(0)
    close(parts, whole)
    assert [r.n for r in parts.history] == [18, 2]
    for monitor in (whole, parts):
        monitor._watched.model.edge = 2.0  # type: ignore[union-attr, assignment]
    assert [[r.status for r in monitor.step(1)] for monitor in (whole, parts)] == 2 * [
        [Status.OK, Status.NOT_RUN]
    ]


@pytest.mark.parametrize("size", [None, 6])
def test_a_named_layer_with_one_row_in_all_is_an_error_until_it_has_more(size: int | None) -> None:
    x = inputs(20)
    x[:, 0] = -1.0
    x[7, 0] = 1.0
    monitor = Monitor(Routed(0.0), x, "experts.1", every=1, batch_size=size, check=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"needs at least 2 .*experts\.1|experts\.1.* needs at least 2"):
            monitor.step(0)
    with pytest.raises(ValueError, match="needs at least 2"):
        Monitor(Routed(0.0), x, "experts.1", batch_size=size)
    with pytest.raises(RuntimeError, match=r"'experts\.1' fired 0 times"):
        Monitor(Routed(2.0), x, "experts.1", batch_size=size)


def test_a_function_gets_the_parts_in_the_form_of_the_probe() -> None:
    seen: list[int] = []

    def layers(model: nn.Module, probe: Any) -> dict[str, Tensor]:
        seen.append(len(probe[0]))
        return {"a": model(*probe), "b": probe[0]}

    model, probe = nn.Bilinear(6, 6, 4).double(), (inputs(24).double(), inputs(24, seed=1).double())
    parts, whole = (Monitor(model, probe, layers, every=1, batch_size=b, check=False) for b in (10, None))
    parts.step(0)
    whole.step(0)
    assert seen == [10, 10, 4, 24]
    close(parts, whole)


def test_parts_start_from_the_same_state_and_leave_none() -> None:
    class Counting(Model):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0
            self.register_buffer("sum", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            self.sum += 1  # type: ignore[operator, assignment]
            return super().forward(x) + self.seen

    model = Counting()
    monitor = Monitor(model, inputs(), "", every=1, batch_size=8)
    monitor.step(0)
    assert (model.seen, float(model.sum.sum())) == (0, 0.0)
    x = inputs()
    model.eval()
    moments = Moments()
    for part in x.split(8):
        model.seen = 0
        moments.update(model(part).detach())
    assert monitor.history[0].normalized == moments.spectral_entropy().normalized


def test_what_parts_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        Monitor(Model(), inputs(), "head", batch_size=0)
    with pytest.raises(ValueError, match="standard_error needs the activations"):
        Monitor(Model(), inputs(), "head", batch_size=8, standard_error=True)
    with pytest.raises(ValueError, match="are for the pass of a probe"):
        Monitor(batch_size=8)


# Casts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_probe_under_autocast_has_the_bits_of_a_pass_under_it(dtype: torch.dtype) -> None:
    model, x = Model(), inputs(64)
    monitor = Monitor(model, x, "blocks.1.0", every=1, autocast=dtype)
    plain = Monitor(model, x, "blocks.1.0", every=1)
    for step in range(2):
        assert len(monitor.step(step)) == len(plain.step(step)) == 1
    assert not torch.is_autocast_enabled("cpu")
    seen: list[Tensor] = []
    model.blocks[1][0].register_forward_hook(lambda module, args, out: seen.append(out))  # type: ignore[index]
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        model(x)
        plain.step(2)  # the caller's holds too
        monitor.step(2)
        assert torch.get_autocast_dtype("cpu") == dtype
    assert seen[0].dtype == dtype
    direct = fastent.spectral_entropy(seen[0]).normalized
    assert [r.normalized for r in monitor.history] == 3 * [direct]
    assert plain.history[2].normalized == direct != plain.history[1].normalized
    assert torch.is_autocast_cache_enabled()


def test_autocast_takes_the_two_types_that_it_casts_to() -> None:
    with pytest.raises(
        ValueError, match=r"autocast must be one of None, torch\.bfloat16, torch\.float16; got"
    ):
        Monitor(Model(), inputs(), "head", autocast=torch.float32)
    with pytest.raises(ValueError, match="are for the pass of a probe"):
        Monitor(autocast=torch.bfloat16)
