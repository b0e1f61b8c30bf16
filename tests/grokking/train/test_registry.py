"""Tasks, models, conditions and measures of other packages: found by name, or refused in a sentence that says whose."""

import dataclasses
import re
import sys

import numpy as np
import pytest
import torch
from guests import install

from fastent.grokking.train import registry
from fastent.grokking.train.conditions import HeldLogits, HeldNorm, InTurn, Mixing, make_condition
from fastent.grokking.train.config import TrainConfig
from fastent.grokking.train.measures import Measures, task_harmonics
from fastent.grokking.train.models import Condition, starting_module
from fastent.grokking.train.runs import Job
from fastent.grokking.train.stack import Stack
from fastent.grokking.train.storage import RunError
from fastent.grokking.train.sweep import check_config
from fastent.grokking.train.tasks import Task, make_task, split, task_of_table

SMALL = TrainConfig(modulus=7, width=8, heads=1, feedforward=8, batch_size=8, probe_size=8)

GAMES = """
import numpy as np
from fastent.grokking.train.models import Condition
from fastent.grokking.train.tasks import task_of_table

def nim(config):
    n = np.arange(8)
    return task_of_table("nim", n[:, None] ^ n, config)

class Silent(Condition):
    def __init__(self, argument, setting):
        self.share = float(argument or 0.5)
    def before_head(self, hidden):
        return self.share * hidden
    def before_head_gradient(self, grad):
        return self.share * grad

def margin(moment):
    top = moment.logits("train").topk(2).values
    return {"margin": (top[..., 0] - top[..., 1]).mean(1)}
"""


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    yield
    registry._installed.cache_clear()


@pytest.fixture
def games(tmp_path, monkeypatch):
    points = {
        "fastent.tasks": {"nim": "nim_games:nim"},
        "fastent.conditions": {"silent": "nim_games:Silent"},
        "fastent.measures": {"margin": "nim_games:margin"},
    }
    install(tmp_path, "nim-games", "nim_games", GAMES, points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nim_games", raising=False)
    return tmp_path


def condition(name, **changes):
    return make_condition(Job("own", name, dataclasses.replace(SMALL, **changes), (0, 1)), None)


def test_names_of_an_installed_package_are_there_and_nothing_of_it_is_imported_before_one_is_used(games):
    assert str(registry.origin("task", "nim")) == "nim-games 1.0 (nim_games:nim)"
    assert [each.name for each in registry.names("measure")][-1] == "margin"
    config = dataclasses.replace(SMALL, task="nim", measures=("margin",))
    assert "nim_games" not in sys.modules
    task = make_task(config)
    assert task.labels.view(8, 8)[5].tolist() == [5 ^ b for b in range(8)]
    check_config(config)
    stack = Stack(config, (0, 1))
    margins = Measures(config)(stack)["margin"]
    for seed, found in zip((0, 1), margins, strict=True):
        train, _ = split(task, config.train_fraction, seed)
        top = stack.module(seed)(task.inputs[train]).detach().topk(2).values
        assert found == pytest.approx(float((top[:, 0] - top[:, 1]).mean()), rel=1e-4)


def test_a_condition_of_a_package_takes_its_argument_and_goes_together_with_ours(games):
    assert condition("silent-0.25").share == 0.25
    assert condition("silent").share == 0.5
    both = condition("losses-0.2+silent-0.5+norm-start")
    hidden = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    mixed = Mixing(0.2, "losses")
    assert torch.equal(both.before_head(hidden), 0.5 * mixed.before_head(hidden))
    grad = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(both.before_head_gradient(grad), mixed.before_head_gradient(0.5 * grad))
    with pytest.raises(RunError, match="condition 'silent-x': could not convert"):
        condition("silent-x")
    with pytest.raises(RunError, match=r"for it goes into names of folders; got 'silent-\.\./x'"):
        condition("silent-../x")


def test_numbers_reach_the_condition_that_asked_for_them_in_any_order():
    class Counting(Condition):
        def numbers(self, seeds, step):
            return [np.full(len(seeds), 7.0)]

        def after_step(self, state, numbers):
            self.got = float(next(numbers)[0])

    counting = Counting()
    norms = HeldNorm(lambda seed, step: (2.0,))
    both = InTurn([counting, norms, HeldLogits(lambda seed, step: (3.0,))])
    numbers = iter([torch.from_numpy(array) for array in both.numbers((0,), 5)])
    p = {"head.weight": torch.eye(4)[None], "head.bias": torch.zeros(1, 4)}
    both.head_gradients(p, torch.randn(1, 3, 4), torch.tensor([[0, 1, 2]]), numbers)
    both.after_step({"parameter": p, "first": {}, "second": {}}, numbers)
    assert counting.got == 7.0
    assert float(torch.linalg.vector_norm(p["head.weight"])) == pytest.approx(2.0)
    with pytest.raises(RunError, match="HeldLogits and HeldLogits both change the gradients of the head"):
        InTurn([HeldLogits(lambda seed, step: (1.0,))] * 2)


def test_a_package_that_cannot_be_imported_stops_its_own_runs_and_no_other(tmp_path, monkeypatch):
    install(tmp_path, "broken", "broken_games", "1 / 0", {"fastent.tasks": {"chess": "broken_games:chess"}})
    monkeypatch.syspath_prepend(tmp_path)
    said = r"task 'chess' of broken 1.0 \(broken_games:chess\) cannot be imported \(ZeroDivisionError: division by"
    with pytest.raises(ValueError, match=said):
        make_task(dataclasses.replace(SMALL, task="chess"))
    assert make_task(SMALL).name == "add mod 7"


def test_one_name_twice_is_refused_with_both_origins(games, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    points = {"fastent.tasks": {"nim": "more_games:nim", "add": "more_games:add"}}
    install(other, "more-games", "more_games", "", points)
    monkeypatch.syspath_prepend(other)
    for name, first in (
        ("nim", r"more-games 1.0 \(more_games:nim\)"),
        ("add", r"fastent \(fastent.*:modular\)"),
    ):
        with pytest.raises(
            ValueError, match=rf"task '{name}' is there 2 times: from {first} and from \S+ 1.0"
        ):
            make_task(dataclasses.replace(SMALL, task=name))
    with pytest.raises(ValueError, match=r"'nim' is there 3 times: .* and from this process \(.*<lambda>\)"):
        registry.register("task", "nim", lambda config: None)


def test_a_script_registers_for_its_own_process_and_again_as_a_cell_of_a_notebook_does():
    for n in (3, 4):
        registry.register(
            "task",
            "least",
            lambda config, n=n: task_of_table("min", np.minimum.outer(*[range(n)] * 2), config),
        )
        assert make_task(dataclasses.replace(SMALL, task="least")).operands == n
    assert registry.origin("task", "least").package == ""
    registry.register("task", "nothing", lambda config: None)
    with pytest.raises(
        TypeError, match=r"'nothing' of this process \(.*\) must be made as a Task; got NoneType"
    ):
        make_task(dataclasses.replace(SMALL, task="nothing"))
    registry.register("model", "nothing", lambda config, task: 3)
    with pytest.raises(TypeError, match=r"must be made as a torch.nn.Module; got int"):
        starting_module(dataclasses.replace(SMALL, model="nothing"), make_task(SMALL), 0)
    with pytest.raises(TypeError, match="a measure must be callable"):
        registry.register("measure", "number", 3)


SCRIPT = """
import functools
import torch
from fastent.grokking.train import Condition

SCALE = 2
def helper(x): return x + 1

class Model(torch.nn.Module):
    'What it is.'
    depth = 3
    def __init__(self, config, task):
        super().__init__()
        self.head = torch.nn.Linear(config.width, task.classes)
    def forward(self, tokens):
        'How.'
        return helper(tokens) * SCALE  # so

class Child(Model):
    pass

class Kept(Condition):
    def __init__(self, kept, table=torch.zeros(2)):
        self.kept, self.table = kept, table

def made(k): return lambda config: k
lambda_of_1, partial_of_1, kept_1 = made(1), functools.partial(helper, 1), Kept(1)
"""


def printed(text, name):
    scope = {"__name__": "script"}
    exec(compile(text, "script", "exec"), scope)
    return registry.fingerprint(scope[name])


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("Model", "depth = 3", "depth = 4"),
        ("Model", "self.head =", "self.tail ="),
        ("Model", "SCALE = 2", "SCALE = 3"),
        ("Model", "x + 1", "x + 2"),
        ("Child", "tokens) * SCALE", "tokens) + SCALE"),
        ("lambda_of_1", "made(1)", "made(2)"),
        ("partial_of_1", "helper, 1)", "helper, 2)"),
        ("kept_1", "Kept(1)", "Kept(2)"),
        ("kept_1", "zeros(2)", "ones(2)"),
    ],
)
def test_the_fingerprint_changes_with_code_and_values(name, old, new):
    assert SCRIPT.count(old) == 1
    assert printed(SCRIPT, name) != printed(SCRIPT.replace(old, new), name)


def test_the_fingerprint_does_not_change_with_comments_docstrings_lines_or_the_process():
    moved = "\n\n" + SCRIPT.replace("  # so", "").replace("How.", "In which way.").replace(
        "What it is.", "It."
    )
    for name in ("Model", "Child", "lambda_of_1", "partial_of_1", "kept_1"):
        assert printed(SCRIPT, name) == printed(SCRIPT, name) == printed(moved, name)


@pytest.mark.parametrize("name", ["<b>", "a/b", "Nim", "", "x" * 41, "a-b"])
def test_a_name_that_could_not_stand_in_the_name_of_a_folder_is_refused(name):
    with pytest.raises(ValueError, match="must be a lower-case letter and then at most 39"):
        registry.register("task", name, len)
    with pytest.raises(
        ValueError, match=re.escape(f"task must be add, sub, mul, mul_nonzero or s5; got {name!r}")
    ):
        TrainConfig(task=name)


def test_a_condition_may_not_be_called_as_what_changes_nothing():
    with pytest.raises(ValueError, match="may not be called baseline, to, with"):
        registry.register("condition", "baseline", len)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        *(
            ({name: [1.0]}, f"column '{name}', which is there already")
            for name in ("entropy", "run", "crc32", "event", "seconds")
        ),
        ({"logit_scale": [1.0]}, "column 'logit_scale', which is there already"),
        ({"<i>": [1.0]}, "column '<i>', which is no name of letters"),
        ({"own": [1.0, 2.0]}, "as 'own', which must be one number or word for each of 1 seeds"),
        ({"own": [[1.0]]}, "as 'own', which must be one number"),
    ],
)
def test_a_column_that_is_none_is_refused_with_the_measure_that_returned_it(returned, said):
    registry.register("measure", "mine", lambda moment: returned)
    config = dataclasses.replace(SMALL, measures=("logit_scale", "mine"))
    with pytest.raises(RunError, match=rf"measure 'mine' of this process \(.*\) returns .*{re.escape(said)}"):
        Measures(config)(Stack(config, (0,)))


def test_a_moment_has_the_pairs_labels_and_logits_of_each_set():
    seen = {}

    def look(moment):
        for which in ("probe", "test_probe", "train", "test", "all"):
            seen[which] = (moment.numbers(which), moment.labels(which), moment.representations(which))
        seen["logits"], seen["bias"] = moment.logits("test"), moment.parameter("head.bias")
        seen["said"] = (moment.step, moment.seeds, moment.config, moment.task.name)
        return {"zero": np.zeros(2)}

    registry.register("measure", "look", look)
    config = dataclasses.replace(SMALL, measures=("look",))
    stack = Stack(config, (3, 4))
    stack.train_step()
    assert Measures(config)(stack) == {"zero": [0.0, 0.0]}
    task = stack.task
    torch.testing.assert_close(seen["probe"][2], stack.representations())
    torch.testing.assert_close(seen["test_probe"][2], stack.representations("test"))
    for numbers, labels, found in (seen[which] for which in ("probe", "train", "test", "all")):
        assert torch.equal(labels, task.labels[numbers])
        torch.testing.assert_close(found, stack.represent(numbers))
    both = torch.cat([seen["train"][0], seen["test"][0]], 1).sort(1).values
    assert torch.equal(both, torch.arange(49).expand(2, -1))
    for place, seed in enumerate((3, 4)):
        logits = stack.module(seed)(task.inputs[seen["test"][0][place]])
        torch.testing.assert_close(seen["logits"][place], logits)
    assert seen["said"] == (1, (3, 4), config, "add mod 7")
    assert seen["bias"].shape == (2, 7)


def test_a_task_without_a_group_is_refused_the_measures_that_need_one_and_with_exponents_has_them():
    table = np.add.outer(range(6), range(6)) % 6
    registry.register("task", "plain", lambda config: task_of_table("plain", table, config))
    with pytest.raises(
        ValueError, match="fourier and progress need the characters of a group, and task 'plain'"
    ):
        check_config(dataclasses.replace(SMALL, task="plain", measures=("fourier",)))
    registry.register(
        "task", "hours", lambda config: task_of_table("hours", table, config, exponents=lambda: np.arange(6))
    )
    theirs, ours = (
        task_harmonics(dataclasses.replace(SMALL, task="hours")),
        task_harmonics(dataclasses.replace(SMALL, modulus=6)),
    )
    assert np.array_equal(theirs.basis, ours.basis)
    assert theirs.names == ours.names == ("1", "2", "3")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": torch.tensor([0, 9])}, "labels must be int64, from 0 to 1; got torch.int64, from 0 to 9"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels must be int64"),
        ({"inputs": torch.tensor([[0, 1], [-1, 0]])}, "inputs must be int64, from 0 to 1; got torch.int64, from -1"),
        ({"offset": 2}, r"\(from the second operand's 2 is taken off\)"),
        ({"labels": torch.tensor([0])}, r"inputs must have shape \(M, T\) and labels \(M,\); got \(2, 2\) and \(1,\)"),
    ],
)  # fmt: skip
def test_a_task_whose_tables_do_not_fit_is_refused(changes, said):
    given = {"inputs": torch.tensor([[0, 1], [1, 0]]), "labels": torch.tensor([0, 1]), "offset": 0, **changes}
    with pytest.raises(ValueError, match=said):
        Task(name="odd", operands=2, tokens=2, vocabulary=2, classes=2, **given)
    with pytest.raises(ValueError, match=r"the table of results must be integers of shape \(n, n\)"):
        task_of_table("odd", [[0, 1, 2], [1, 0, 2]], SMALL)


def test_a_task_of_three_operands_is_trained_by_the_transformer_and_not_by_the_mlp():
    triples = torch.cartesian_prod(*[torch.arange(4)] * 3)
    three = Task(
        "a + b + c", triples, triples.sum(1) % 4, operands=4, tokens=4, offset=0, vocabulary=4, classes=4
    )
    registry.register("task", "three", lambda config: three)
    config = dataclasses.replace(SMALL, task="three")
    stack = Stack(config, (0,), dtype=torch.float64)
    stack.train_step()
    assert torch.allclose(stack.logits(torch.arange(64))[0], stack.module(0)(triples), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="the MLP reads two tokens, and task 'a \\+ b \\+ c' has 3"):
        Stack(dataclasses.replace(config, model="mlp"), (0,))
