"""The stacked models against their plain modules: same weights, same loss and gradients, over every variant."""

import dataclasses
import itertools
import math

import pytest
import torch

from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.models import (
    head_gradients,
    initial_parameters,
    make_model,
    pair_losses,
    parameter_shapes,
    plain_model,
)
from fastent.grokking.train.stacked import into_input, into_weight, layer_norm, linear, linear_onto
from fastent.grokking.train.tasks import make_task

TINY = {"modulus": 11, "width": 16, "heads": 4, "feedforward": 24}


def every(**choices):
    return [dict(zip(choices, chosen, strict=True)) for chosen in itertools.product(*choices.values())]


NO_YES, READOUTS, PLACES = (False, True), ("last", "mean"), ("post", "pre", "none")
ACTIVATIONS = ("relu", "gelu")
CONFIGS = [
    TrainConfig(**TINY, **choice)
    for choice in (
        *every(readout=READOUTS, norm_place=PLACES, equals_token=NO_YES, activation=ACTIVATIONS),
        *every(readout=READOUTS, equals_token=NO_YES, separate_tokens=(True,)),
        *every(readout=READOUTS, norm_place=PLACES, final_norm=(True,), entropy_at=("readout", "final_norm")),
        *every(
            task=("s5",),
            operand_tokens=("images",),
            readout=READOUTS,
            equals_token=NO_YES,
            separate_tokens=(True,),
        ),
        *every(
            model=("mlp",),
            combine=("concat", "sum"),
            activation=ACTIVATIONS,
            separate_tokens=NO_YES,
            hidden=((20,), (20, 12)),
        ),
    )
]


def name_of(config):
    plain = TrainConfig(**TINY)
    return ", ".join(
        f"{field.name} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(plain, field.name)
    )


def stacked(config, seeds, dtype):
    """Parameters of `seeds`, every zero or one of them moved so that no gradient is lost on it."""
    starts = [initial_parameters(config, make_task(config), seed) for seed in range(seeds)]
    numbers = torch.Generator().manual_seed(0)
    return {
        name: torch.stack(
            [start[name] + 0.3 * torch.randn(start[name].shape, generator=numbers) for start in starts]
        ).to(dtype)
        for name in starts[0]
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_loss_and_gradients_are_the_plain_modules(config, seeds, dtype, tolerance):
    task = make_task(config)
    model = make_model(config, task, torch.device("cpu"))
    parameters = stacked(config, seeds, dtype)
    # More rows than pairs of some tokens: rows of the table are looked up several times, others never.
    pairs = torch.randint(len(task.labels), (seeds, 40), generator=torch.Generator().manual_seed(1))
    columns = model.columns[:, pairs]
    hidden, kept = model.forward(parameters, model.table(parameters), columns)
    losses, grad, head = head_gradients(parameters, hidden, columns[-1])
    gradients = model.backward(parameters, kept, grad) | head
    for s in range(seeds):
        plain = plain_model(config, task).to(dtype)
        plain.load_state_dict({name: tensor[s] for name, tensor in parameters.items()})
        loss = torch.nn.functional.cross_entropy(plain(task.inputs[pairs[s]]), task.labels[pairs[s]])
        loss.backward()
        assert abs(losses[s] - loss) <= tolerance * loss
        measured = kept.representation[s]
        assert (
            measured - plain.represent(task.inputs[pairs[s]])
        ).abs().max() <= tolerance * measured.abs().max()
        assert set(gradients) == {name for name, _ in plain.named_parameters()}
        for name, parameter in plain.named_parameters():
            size = parameter.grad.abs().max()
            assert (gradients[name][s] - parameter.grad).abs().max() <= tolerance * size, name


@pytest.mark.parametrize("config", CONFIGS[::7], ids=name_of)
def test_the_plain_module_and_the_stack_agree_on_names_and_shapes(config):
    plain = plain_model(config, make_task(config)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in plain.items()} == parameter_shapes(
        config, make_task(config)
    )


def test_only_the_last_positions_query_and_rows_are_computed():
    config = TrainConfig(equals_token=True)
    task = make_task(config)
    model = make_model(config, task, torch.device("cpu"))
    p = {name: tensor.unsqueeze(0) for name, tensor in initial_parameters(config, task, 0).items()}
    table = model.table(p)
    assert table.query.shape[2] == 1  # "=" alone asks
    assert table.value.shape[1] == 2 * 97 + 1  # each token once for each position, not 3 x 512 rows
    images = TrainConfig(task="s5", operand_tokens="images")
    ten = make_model(images, make_task(images), torch.device("cpu"))
    q = {n: t.unsqueeze(0) for n, t in initial_parameters(images, make_task(images), 0).items()}
    assert [ten.table(q).query.shape[2], ten.table(q).value.shape[1]] == [5, 50]
    hidden, kept = model.forward(p, table, model.columns[:, None, :512])
    assert kept.hidden.shape == (1, 512, config.feedforward)
    assert hidden.shape == (1, 512, config.width)


@pytest.mark.parametrize("name", parameter_shapes(TrainConfig(), make_task(TrainConfig())))
def test_a_start_has_the_spread_of_torchs_own(name):
    config = TrainConfig(init_scale=1.0)
    task = make_task(config)
    torch.manual_seed(0)
    theirs = plain_model(config, task).state_dict()[name].double()
    ours = initial_parameters(config, task, 0)[name]
    if theirs.std() == 0:
        assert torch.equal(ours, theirs)
    else:
        n = theirs.numel()
        assert abs(ours.mean()) < 4 * theirs.std() / math.sqrt(n)
        assert abs(ours.std() / theirs.std() - 1) < 4 / math.sqrt(n)
        # Uniform or normal: their largest values differ by a factor of two.
        assert abs(ours.abs().max() / ours.std() - theirs.abs().max() / theirs.std()) < 0.6


@pytest.mark.parametrize("model", ["transformer", "mlp"])
def test_a_normal_start_has_one_spread_and_a_xavier_start_the_bounds_of_torchs_initialiser(model):
    for start, scale in (("normal", 1.0), ("xavier", 0.5)):
        config = TrainConfig(start=start, init_scale=scale, model=model, final_norm=True)
        for name, tensor in initial_parameters(config, make_task(config), 0).items():
            if "norm" in name:
                assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("weight"))))
            elif name.endswith("bias"):
                assert not tensor.any()
            else:
                embedding = name in ("tokens.weight", "positions.weight")
                torch.manual_seed(0)
                theirs = torch.nn.init.xavier_uniform_(torch.empty(tensor.shape, dtype=torch.float64))
                if start == "normal" or embedding:
                    theirs.normal_(0, 0.02 if start == "normal" else scale)
                n = tensor.numel()
                assert abs(tensor.mean()) < 4 * theirs.std() / math.sqrt(n)
                assert abs(tensor.std() / theirs.std() - 1) < 6 / math.sqrt(n)
                assert abs(tensor.abs().max() / tensor.std() - theirs.abs().max() / theirs.std()) < 0.8


def test_a_start_depends_on_the_seed_and_a_variant_leaves_the_rest_alone():
    task = make_task(TrainConfig())
    with_norm = initial_parameters(TrainConfig(), task, 3)
    half = TrainConfig().init_scale / 2
    without = initial_parameters(TrainConfig(norm_place="none", init_scale=half), task, 3)
    assert torch.equal(with_norm["layer.linear1.weight"], without["layer.linear1.weight"])
    assert torch.equal(with_norm["tokens.weight"], 2 * without["tokens.weight"])
    other = initial_parameters(TrainConfig(), task, 4)
    assert not torch.equal(with_norm["layer.linear1.weight"], other["layer.linear1.weight"])


def test_pair_losses_are_cross_entropy_and_a_tie_is_not_right():
    p = {"head.weight": torch.eye(3).unsqueeze(0), "head.bias": torch.zeros(1, 3)}
    logits = torch.tensor([[[3.0, 1.0, 1.0], [3.0, 1.0, 1.0], [0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]])
    labels = torch.tensor([[0, 1, 1, 0]])
    losses, right = pair_losses(p, logits, labels)
    assert right.tolist() == [[True, False, False, False]]
    want = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="none")
    assert torch.allclose(losses[0], want, atol=1e-6)


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("dense", [True, False])
def test_products_are_right_to_float32_also_for_slices_of_wider_matrices(seeds, dense):
    numbers = torch.Generator().manual_seed(0)

    def draw(*shape):
        wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=numbers)
        part = wide[..., : shape[-1]]
        return part.contiguous() if dense else part

    x, weight, grad, base = draw(seeds, 37, 20), draw(seeds, 11, 20), draw(seeds, 37, 11), draw(seeds, 37, 11)
    bias = torch.randn(seeds, 11, generator=numbers)
    want = x.double() @ weight.double().mT + bias.double().unsqueeze(1)
    before = base.clone()
    for got, reference in (
        (linear(x, weight, bias), want),
        (linear(x, weight, bias, relu=True), want.relu()),
        (linear_onto(base, x, weight, bias), base.double() + want),
        (into_input(grad, weight), grad.double() @ weight.double()),
        (into_weight(grad, x), grad.double().mT @ x.double()),
        (into_weight(x, grad), x.double().mT @ grad.double()),
    ):
        assert got.shape == reference.shape
        assert (got - reference).abs().max() < 2e-5  # 37 products of size 1 at most, eps 1.2e-7 each
    assert torch.equal(base, before)


def test_layer_norm_does_not_depend_on_how_many_seeds_there_are():
    x, weight, bias = torch.randn(3, 5, 16), torch.randn(3, 16), torch.randn(3, 16)
    together = layer_norm(x, weight, bias)[0]
    for s in range(3):
        alone = layer_norm(x[s : s + 1], weight[s : s + 1], bias[s : s + 1])[0]
        assert torch.allclose(together[s], alone[0], atol=1e-6)
