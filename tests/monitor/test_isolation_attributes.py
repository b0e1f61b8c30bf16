"""What a forward pass leaves in a model's attributes, containers, generators and caches is put back."""

import contextlib
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from fastent import spectral_entropy
from fastent.monitor import isolation
from fastent.monitor.isolation import LARGE, undisturbed
from fastent.monitor.monitor import SpectralEntropyMonitor

D = 6


def probe(n: int = 40) -> Tensor:
    return torch.linspace(-1, 1, n * D).reshape(n, D).sin()


class Rotary(nn.Module):
    """Dynamic NTK: a longer input than before makes new frequencies, remembered by a plain attribute."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(D), persistent=False)
        self.max_seq_len_cached = 4

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.max_seq_len_cached:
            self.register_buffer("inv_freq", torch.full((D,), float(len(x))), persistent=False)
            self.max_seq_len_cached = len(x)
        return x * self.inv_freq


class Counting(nn.Module):
    """A counter, in eval mode too, that the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Noisy(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, draw: Callable[[], Any], **generators: Any) -> None:
        super().__init__()
        self.__dict__.update(generators)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x + self.draw()


def own_torch() -> nn.Module:
    g = torch.Generator().manual_seed(5)
    return Noisy(lambda: torch.rand((), generator=g), g=g)


def own_in_a_list() -> nn.Module:
    g = [torch.Generator().manual_seed(5)]
    return Noisy(lambda: torch.rand((), generator=g[0]), g=g)


def own_python() -> nn.Module:
    g = random.Random(5)
    return Noisy(g.random, g=g)


def own_numpy() -> nn.Module:
    g = np.random.default_rng(5)
    return Noisy(g.random, g=g)


def own_bits() -> nn.Module:
    g = np.random.PCG64(5)
    return Noisy(np.random.Generator(g).random, g=g)


def own_legacy() -> nn.Module:
    g = np.random.RandomState(5)
    return Noisy(g.rand, g=g)


class Caching(nn.Module):
    """Keeps what it has seen in containers, nested and shared, and in tensors inside them, and uses all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Tensor] = []
        self.layers = {"a": [torch.zeros(D)], "b": (torch.zeros(D), [0])}
        self.recent: deque[float] = deque(maxlen=3)
        self.seen: set[int] = set()
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.order = OrderedDict(x=1, y=2)
        self.alias = self.layers["a"]

    def forward(self, x: Tensor) -> Tensor:
        self.keys.append(x.detach().mean(0))
        self.alias[0].add_(1)
        self.layers["b"][0].add_(2)
        self.layers["b"][1][0] += 1
        self.recent.append(float(len(x)))
        self.seen.add(len(self.keys))
        self.counts["calls"] += 1
        self.order.move_to_end("x")
        first = 1.0 if next(iter(self.order)) == "x" else 2.0
        h = x * first + torch.stack(self.keys).sum(0) + self.layers["a"][0] + self.layers["b"][0]
        return h + sum(self.recent) + len(self.seen) + self.counts["calls"] + self.layers["b"][1][0]


class Running(nn.Module):
    """A plain tensor that is not a buffer, written in place, with a view of it beside."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(D)
        self.part = self.mean[:2]

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
        return x + self.mean + self.part.sum()


class Growing(nn.Module):
    """Makes a hook, a submodule and a parameter at its first call, and remembers that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        self.proj: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.ready = True
            del self.proj
            self.proj = nn.Linear(D, D)
            self.register_forward_hook(lambda module, args, out: out * 2)
        return self.proj(x)


class Replacing(nn.Module):
    """Deletes an attribute and adds another."""

    def __init__(self) -> None:
        super().__init__()
        self.first: float | None = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "first"):
            del self.first
            return x
        self.later = 3.0
        return x * 2


class State(NamedTuple):
    mean: Tensor
    counts: list[int]


class Named(nn.Module):
    """Keeps a named tuple of things that it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State(torch.zeros(D), [0])

    def forward(self, x: Tensor) -> Tensor:
        self.state.mean.add_(1)
        self.state.counts[0] += 1
        return x * self.state.counts[0] + self.state.mean


class Renormed(nn.Module):
    """Embeddings whose rows a forward pass scales down, one of them tied to the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Embedding(4, D, max_norm=0.5)
        self.bag = nn.EmbeddingBag(4, D, max_norm=0.5)
        self.tied = nn.Linear(D, 4, bias=False)
        self.tied.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(len(x)) % (4 if len(x) > 8 else 3)
        return x * self.one(ids) + self.bag(ids[:, None]) + self.tied(x).sum(1, keepdim=True)


def hidden(how: str) -> Callable[[], nn.Module]:
    class Hiding(nn.Module):
        """Runs a module that is none of its submodules, as a teacher that no optimiser shall see."""

        def __init__(self) -> None:
            super().__init__()
            self.__dict__["teacher"] = nn.Sequential(Counting(), nn.BatchNorm1d(D), Running())
            if how == "in a list":
                self.teachers = [self.__dict__.pop("teacher")]

        def forward(self, x: Tensor) -> Tensor:
            teacher: nn.Sequential = self.teachers[0] if how == "in a list" else self.teacher
            return teacher(x) + teacher[1].running_mean

    Hiding.__name__ = f"a module hidden {how}"
    return Hiding


KINDS = [Rotary, Counting, own_torch, own_in_a_list, own_python, own_numpy, own_bits, own_legacy, Caching]
KINDS += [Running, Growing, Replacing, Named, Renormed, hidden("in a list"), hidden("past setattr")]


def train(make: Callable[[], nn.Module], probed: bool, fails: bool = False) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), make(), nn.Linear(D, 3))
    if fails:
        model.append(nn.Identity())
        model[3].register_forward_hook(lambda module, args, out: out if model.training else 1 / 0)
    monitor = SpectralEntropyMonitor(model, probe(), "0", every=1, check=False)
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(4):
        if probed:
            try:
                monitor.step(step)
            except ZeroDivisionError:
                assert fails
        torch.manual_seed(step)
        loss = model(torch.randn(8, D)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return [p.tolist() for p in model.parameters()] + [list(model.state_dict()), loss.item()]


@pytest.mark.parametrize("fails", [False, True], ids=["pass", "failing pass"])
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_training_is_the_same_when_a_module_keeps_things_in_attributes(make: Any, fails: bool) -> None:
    assert train(make, True, fails) == train(make, False, fails)


def test_a_named_tuple_is_the_same_object_afterwards_and_its_own_kind_in_the_pass() -> None:
    model = Named()
    before = model.state
    with undisturbed(model):
        assert isinstance(model.state, State)
        assert model.state.mean is not before.mean
    assert model.state is before


def test_a_renormed_weight_is_scaled_in_the_pass_and_the_layer_that_is_tied_to_it_sees_it() -> None:
    torch.manual_seed(0)
    model = Renormed()
    weight = model.one.weight
    before, version = weight.detach().clone(), weight._version
    with undisturbed(model):
        model(probe())
        assert model.one.weight.norm(dim=1).max() < 0.51
        assert torch.equal(model.tied.weight, model.one.weight)
    assert model.one.weight is weight is model.tied.weight
    assert torch.equal(weight, before)
    assert weight._version == version


def test_a_parameter_that_the_forward_pass_writes_to_is_warned_of_by_name() -> None:
    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(D), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.codes.add_(x.detach().mean(0))
            return x + self.codes

    with pytest.warns(UserWarning, match=r"writes to parameters in eval mode \(Codes\.codes\)"):
        SpectralEntropyMonitor(Codes(), probe(), "")


class Holding(nn.Module):
    """A layer with data beside, which its forward pass changes."""

    def __init__(self, data: Any, change: Callable[[Any], object]) -> None:
        super().__init__()
        self.data, self.change = data, change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self.data)
        return x


@pytest.mark.parametrize(
    ("data", "change"),
    [
        (list(range(30_000)), lambda data: data.append(0)),
        (dict.fromkeys(range(30_000), 0.5), lambda data: data.update({-1: 0.0, -2: 1.0})),
        (deque(range(30_000)), lambda data: data.extend("ab")),
        ({"train": [[0]] * 3, "test": list(range(30_000))}, lambda data: data.update(cached=[1])),
    ],
)
def test_what_a_pass_adds_at_the_end_of_a_large_container_is_taken_off(data: Any, change: Any) -> None:
    before = data.copy()
    model = Holding(data, change)
    with undisturbed(model):
        model(probe())
        assert data != before
    assert data == before
    assert model.data is data


@pytest.mark.parametrize("kind", [list, tuple, set, deque])
def test_what_a_large_attribute_holds_is_not_walked(kind: Any) -> None:
    data = kind(range(isolation.MOST + 1))
    nested = {"documents": [[[0] * 100 for _ in range(20)] for _ in range(10)], "all": data}
    small = [torch.zeros(3), [1]]
    taken = isolation.Snapshot([Holding(data, len), Holding(nested, len), Holding(small, len)], {})
    live = [id(container) for container, _ in taken._dicts + taken._others]
    assert id(small) in live
    assert id(small[1]) in live
    assert {id(data), id(nested), id(nested["documents"])}.isdisjoint(live)


def test_tensors_in_a_list_of_very_many_are_not_copied_and_those_of_a_module_always() -> None:
    many = [torch.zeros(1) for _ in range(isolation.MOST // isolation.TENSOR + 1)]
    model = nn.Module()
    for i in range(len(many)):
        model.register_buffer(f"b{i}", torch.zeros(1))
    few = torch.ones(1)
    model.many, model.few = many, [few]
    with undisturbed(model):
        assert model.many[9] is many[9]
        assert model.few[0] is not few
        assert all(buffer.add_(1) == 1 for buffer in model.buffers())
    assert all(buffer == 0 for buffer in model.buffers())


def test_containers_and_tensors_are_the_same_objects_afterwards() -> None:
    model = Caching()
    model(probe())
    model.keep = torch.ones(3)
    before = dict(model.__dict__)
    layer, nested = model.layers["a"][0], model.layers["b"]
    version = layer._version
    SpectralEntropyMonitor(model, probe(), "").step(0)
    assert all(model.__dict__[name] is value for name, value in before.items())
    assert list(model.__dict__) == list(before)
    assert model.layers["a"][0] is layer
    assert model.layers["b"] is nested
    assert model.recent.maxlen == 3
    assert (layer.tolist(), layer._version) == ([1.0] * D, version)


# Weights that are made anew from others


def test_the_weight_of_the_old_weight_norm_keeps_its_graph_for_a_penalty() -> None:
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        layer = torch.nn.utils.weight_norm(nn.Linear(D, 4))
    model = nn.Sequential(layer, nn.Tanh())

    def gradient(probed: bool) -> Tensor:
        model.zero_grad()
        out = model(probe())
        if probed:
            SpectralEntropyMonitor(model, probe(), "1").step(0)
        (out.square().mean() + layer.weight.square().sum()).backward()
        return layer.weight_g.grad.clone()

    expected = gradient(False)
    assert torch.equal(gradient(True), expected)
    assert expected.norm() > 1


@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_a_cached_parametrisation_is_neither_read_nor_filled(where: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(D, D)), nn.Tanh())
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(module.weight))
    monitor = SpectralEntropyMonitor(model, probe(), "1", every=1, check=False)
    with parametrize.cached():
        if where == "before":
            monitor.step(0)
        first = model(probe())
        weight = model[0].weight
        if where == "between":
            monitor.step(0)
            assert seen[-1] is not weight  # that of training has a power iteration of its own
        second = model(probe())
        assert model[0].weight is weight
        if where == "after":
            monitor.step(0)
        (first + second).square().mean().backward()
    assert model[0].parametrizations.weight.original.grad.norm() > 0
    assert not parametrize._cache
    assert not parametrize._cache_enabled


# Large tensors are copied only where they are written


class Large(nn.Module):
    read: Tensor
    written: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("read", torch.ones(LARGE // 4))
        self.register_buffer("written", torch.ones(LARGE // 4))
        self.plain = torch.ones(LARGE // 4)
        self.part = self.read[:D]

    def forward(self, x: Tensor) -> Tensor:
        self.written.add_(1)
        out = x * self.read[:D] * self.written[:D] * self.plain[:D] * self.part
        outside.append([torch._C._is_cow_tensor(t) for t in (self.read, self.written, self.plain, self.part)])
        return out


outside: list[Any] = []


def test_large_tensors_take_no_memory_unless_they_are_written() -> None:
    model = Large()
    names = ("read", "written", "plain", "part")
    originals = [getattr(model, name) for name in names]
    addresses = [t.data_ptr() for t in originals]
    views = [t.numpy() for t in originals]
    SpectralEntropyMonitor(model, probe(), "").step(0)
    assert outside.pop() == [True, False, True, True]
    assert all(getattr(model, name) is t for name, t in zip(names, originals, strict=True))
    assert not any(torch._C._is_cow_tensor(t) for t in originals)
    assert [t.data_ptr() for t in originals] == addresses
    assert [t._version for t in originals] == [0] * 4
    model.written.fill_(3)
    assert views[1].tolist() == model.written.tolist() == [3.0] * (LARGE // 4)


def test_a_large_buffer_stays_where_it_is_when_the_model_keeps_its_copy() -> None:
    kept: list[Tensor] = []

    class Keeps(Large):
        def forward(self, x: Tensor) -> Tensor:
            kept.append(self.read[3:])
            return x * self.read[:D]

    model = Keeps()
    address = model.read.data_ptr()
    with undisturbed(model):
        model(probe())
    model.read.fill_(2)
    assert model.read.data_ptr() == address
    assert kept[0].unique().tolist() == [1.0]


class Graph:
    """Stands for one that was captured: it reads and writes tensors by their addresses."""

    def __init__(self, read: Tensor, write: Tensor) -> None:
        self.read, self.write = read, write

    def replay(self) -> None:
        self.write.copy_(2 * self.read)


def test_a_module_that_replays_a_cuda_graph_keeps_the_tensors_that_the_graph_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One of torch's own is not to be made here, and where torch has CUDA not without a device.
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)

    class Graphed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.static = {"in": torch.zeros(40, D), "out": torch.zeros(40, D)}
            self.graphs = [(40, Graph(self.static["in"], self.static["out"]))]
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.static["in"].copy_(x)
            self.graphs[0][1].replay()
            return self.static["out"].clone()

    model, x = Graphed(), probe()
    record = SpectralEntropyMonitor(model, x, "").step(0)[0]
    assert record.total_variance == pytest.approx(4 * spectral_entropy(x).total_variance, rel=1e-6)
    assert model.count.item() == 0


@pytest.mark.gpu
def test_large_tensors_on_a_gpu_stay_where_they_are() -> None:
    model = Large().cuda()
    model.plain, model.part = model.plain.cuda(), model.part.cuda()
    originals = [model.read, model.written]
    addresses = [t.data_ptr() for t in originals]
    SpectralEntropyMonitor(model, probe().cuda(), "", every=1, check=False, mode="sync").step(0)
    assert outside.pop()[:2] == [True, False]
    assert (model.read is originals[0], model.written is originals[1]) == (True, True)
    assert [t.data_ptr() for t in originals] == addresses
    assert model.written.unique().tolist() == [1.0]


def test_a_large_buffer_that_grows_in_place_is_as_before_whether_or_not_torch_ends_the_pass() -> None:
    class Grows(Large):
        def forward(self, x: Tensor) -> Tensor:
            self.read.resize_(LARGE).zero_()
            return x

    model = Grows()
    address = model.read.data_ptr()
    with contextlib.suppress(RuntimeError):  # of torch's "COW", up from some release after 2.11
        SpectralEntropyMonitor(model, probe(), "").step(0)
    assert model.read.unique().tolist() == [1.0]
    assert (model.read.data_ptr(), model.read.shape) == (address, (LARGE // 4,))


@pytest.mark.parametrize("memory", ["numpy", "shared"])
def test_large_buffers_in_memory_that_cannot_be_cloned_lazily_are_copied(memory: str) -> None:
    model = Large()
    if memory == "numpy":
        model.written = torch.from_numpy(np.ones(LARGE // 4, dtype=np.float32))
    else:
        model.written = torch.ones(LARGE // 4).share_memory_()
    SpectralEntropyMonitor(model, probe(), "").step(0)
    outside.clear()
    assert model.written.unique().tolist() == [1.0]


def made_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.ones(LARGE // 4)


ODD: dict[str, Callable[[], Tensor]] = {
    "inference": made_in_inference_mode,
    "float8": lambda: torch.ones(8).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "conjugate": lambda: torch.ones(LARGE, dtype=torch.complex64).conj(),
    "expanded": lambda: torch.ones(1, LARGE).expand(5, LARGE),
    "empty": lambda: torch.empty(0),
    "strided": lambda: torch.arange(float(LARGE))[1::3],
    "channels last": lambda: torch.ones(2, 8, 64, 64).to(memory_format=torch.channels_last),
    "meta": lambda: torch.ones(3, device="meta"),
    "not a leaf": lambda: torch.ones(4, requires_grad=True) * 2,
}


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
def test_tensors_of_every_kind_have_copies_of_their_kind_and_come_back(make: Any, kind: str) -> None:
    seen: list[Tensor] = []

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.odd)
            return x

    model, tensor = Reads(), make()
    if kind == "buffer":
        model.register_buffer("odd", tensor)
    else:
        model.odd = tensor
    with undisturbed(model):
        model(probe())
    assert model.odd is tensor
    assert seen[0] is not tensor
    assert (seen[0].dtype, seen[0].layout, seen[0].shape) == (tensor.dtype, tensor.layout, tensor.shape)
    if tensor.layout == torch.strided and tensor.device.type == "cpu":
        assert torch.equal(seen[0].to(torch.complex64), tensor.detach().to(torch.complex64))


def test_training_differs_without_the_lazy_copies_of_large_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation._Copies, "of", lambda self, value: value)
    model = Large()
    SpectralEntropyMonitor(model, probe(), "", check=False).step(0)
    outside.clear()
    assert model.written.unique().tolist() == [2.0]


@pytest.mark.parametrize("threads", [1, 2])
def test_operations_that_write_to_a_large_buffer_write_to_the_copy(threads: int) -> None:
    index = torch.arange(0, 512, 2)
    writes: dict[str, Callable[[Tensor], object]] = {
        "index_put_": lambda t: t.index_put_((index,), torch.zeros(64)),
        "scatter_": lambda t: t.scatter_(0, index[:64][None], 0.0),
        "index_copy_": lambda t: t.index_copy_(0, index, torch.zeros(256, 64)),
        "copy_": lambda t: t.copy_(torch.zeros(512, 64)),
        "slice": lambda t: t[:, 3].zero_(),
        "numpy": lambda t: t.numpy().fill(0),
        "out": lambda t: torch.mul(t, 2, out=t),
        "resize_": lambda t: t.resize_(100, 64).zero_(),
        "data": lambda t: t.data.zero_(),
        "batch_norm": lambda t: nn.functional.batch_norm(torch.randn(8, 64), t[0], t[1], training=True),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, write in writes.items():

            class Writer(nn.Module):
                table: Tensor

                def forward(self, x: Tensor, write: Any = write) -> Tensor:
                    write(self.table)
                    assert self.table.unique().tolist() != [1.0]
                    return x

            model = Writer()
            model.register_buffer("table", torch.ones(512, 64))
            SpectralEntropyMonitor(model, probe(), "").step(0)
            assert (model.table.unique().tolist(), model.table._version, len(model.table)) == ([1], 0, 512), (
                name
            )
    finally:
        torch.set_num_threads(before)
