"""What a monitor makes of the axes of activations: samples, tokens and padding, maps, rows of tokens (fault 36)."""

import copy
import json
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from fastent import spectral_entropy
from fastent.activations import Tokens
from fastent.monitor.monitor import SpectralEntropyMonitor as Monitor
from fastent.records import EntropyRecord

N, T, D = 9, 5, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    scale = 1.0 / (1.0 + torch.arange(shape[-1], dtype=torch.float64))  # a spectrum that decays
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


class Give(nn.Module):
    """A layer that gives what it is told."""

    def __init__(self, make: Any = None) -> None:
        super().__init__()
        self.make = make or (lambda h: h)

    def forward(self, *args: Any) -> Any:
        return self.make(*args)


class Language(nn.Module):
    """Embeds tokens; its padding is whatever stands there. Like a model of Hugging Face, it takes keywords."""

    def __init__(self, make: Any = None) -> None:
        super().__init__()
        self.body, self.pool = Give(make), Give(lambda h: h[:, 0])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
        return self.pool(self.body(input_ids))


def lengths(side: str) -> Tensor:
    real = torch.arange(T) < torch.tensor([5, 1, 2, 3, 4, 5, 2, 3, 1])[:, None]
    return (real if side == "right" else real.flip(1)).to(torch.int64)


def record_of(model: nn.Module, probe: Any, layers: Any = "body", **options: Any) -> EntropyRecord:
    (record,) = Monitor(model, probe, layers, **options).step(0)
    return record


# Padding


@pytest.mark.parametrize("tokens", get_args(Tokens))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_probe_is_left_out_of_the_record_that_says_so(side: str, tokens: Tokens) -> None:
    mask, h = lengths(side), draw(N, T, D)
    padded = torch.where(mask[..., None] == 1, h, torch.nan)
    expected = spectral_entropy(h, tokens=tokens, mask=mask)
    for probe in (
        {"input_ids": padded, "attention_mask": mask},
        {"attention_mask": mask.bool(), "input_ids": padded},
        (padded, mask),  # known by the parameter of the forward pass
    ):
        record = record_of(Language(), probe, tokens=tokens)
        assert record.mask == "attention_mask"
        assert (record.n, record.normalized) == (expected.n, expected.normalized)
    unmasked = spectral_entropy(h, tokens=tokens)
    assert tokens == ("first" if side == "right" else "last") or unmasked.normalized != expected.normalized


def test_record_of_a_mask_survives_json_and_older_ones_without_it_are_read() -> None:
    mask = lengths("left")
    monitor = Monitor(Language(), {"input_ids": draw(N, T, D), "attention_mask": mask}, "*", tokens="flatten")
    monitor.step(0)
    state = json.loads(json.dumps(monitor.state_dict()))
    assert state["history"]["mask"] == ["attention_mask", None]  # the pool has no tokens
    again = copy.deepcopy(monitor)
    again.load_state_dict(state)
    assert again.history == monitor.history
    del state["history"]["mask"]
    again.load_state_dict(state)
    assert [record.mask for record in again.history] == [None, None]


def test_deferred_records_and_those_with_a_standard_error_name_their_mask_too() -> None:
    probe = {"input_ids": draw(N, T, 70), "attention_mask": lengths("right")}
    records = [
        record_of(Language(), probe, tokens="flatten", **options)
        for options in ({"mode": "sync"}, {"mode": "deferred"}, {"standard_error": True})
    ]
    assert [record.mask for record in records] == ["attention_mask"] * 3
    assert len({record.normalized for record in records}) == 1
    assert records[2].standard_error is not None


def test_a_named_mask_is_used_also_where_true_is_padding() -> None:
    mask, h = lengths("right"), draw(N, T, D)
    expected = spectral_entropy(h, tokens="flatten", mask=mask).normalized
    additive = torch.where(mask == 1, 0.0, -torch.inf)
    for name, entry in (
        ("real", mask),
        ("real", mask.float()),
        ("~padding", mask == 0),
        ("~padding", 1 - mask),
        ("~padding", additive),
        ("~src_key_padding_mask", mask == 0),
    ):
        probe = {"input_ids": h, name.removeprefix("~"): entry}
        record = record_of(Language(), probe, tokens="flatten", mask=name)
        assert (record.mask, record.normalized) == (name, expected)
    nested = ({"inputs": {"x": h, "real": mask}},)
    model = Give(lambda batch: batch["inputs"]["x"])
    assert record_of(model, nested, "", tokens="flatten", mask="real").normalized == expected


def test_masks_that_cannot_be_used_are_refused_when_the_monitor_is_built() -> None:
    mask, h = lengths("right"), draw(N, T, D)
    additive = torch.where(mask == 1, 0.0, -torch.inf)
    for entries, options, message in [
        ({"real": mask}, {"mask": "reel", "tokens": "last"}, "no tensor 'reel'; it has: input_ids, real"),
        ({"real": mask}, {"mask": "real"}, "needs tokens"),
        (
            {"real": mask[:, None]},
            {"mask": "real", "tokens": "last"},
            r"mask='real' of the probe: .*\(9, 1, 5\)",
        ),
        (
            {"attention_mask": additive},
            {"tokens": "last"},
            'give mask="~attention_mask"|mask="~attention_mask" where 0',
        ),
        ({"attention_mask": mask[:, None, None]}, {"tokens": "last"}, "give a function as layers"),
        (
            {"key_padding_mask": mask == 0},
            {"mask": "key_padding_mask", "tokens": "last"},
            'mask="~key_padding_mask"',
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            Monitor(Language(), {"input_ids": h, **entries}, "body", **options)
    with pytest.raises(ValueError, match="needs a probe that has it; for observe give"):
        Monitor(mask="attention_mask", tokens="last")


def test_a_mask_that_does_not_fit_is_an_error_if_named_and_a_warning_if_not() -> None:
    mask, h = lengths("right"), draw(N, T, D)
    halved = Language(lambda h: h[:, ::2])
    with pytest.raises(
        ValueError, match=r"layer 'body' on the probe: 'real'.* 9 samples of 5 tokens, .* 3 tokens"
    ):
        record_of(halved, {"input_ids": h, "real": mask}, tokens="flatten", mask="real")
    probe = {"input_ids": h, "attention_mask": mask}
    with pytest.warns(UserWarning, match="layer 'body': what is padding there counts as tokens"):
        monitor = Monitor(halved, probe, "body", tokens="flatten", every=1)
    (record,) = monitor.step(0)
    assert (record.n, record.mask) == (27, None)
    monitor.step(1)  # warned of once
    record_of(halved, {"input_ids": h, "attention_mask": torch.ones_like(mask)}, tokens="flatten")
    causal = torch.ones(T, T).tril()
    assert record_of(Language(), {"input_ids": h, "attention_mask": causal}, tokens="flatten").mask is None


def test_a_padding_mask_of_torch_that_is_not_used_is_warned_of() -> None:
    probe = {"input_ids": draw(N, T, D), "src_key_padding_mask": lengths("right") == 0}
    with pytest.warns(UserWarning, match='give mask="~src_key_padding_mask" to leave it out'):
        Monitor(Language(), probe, "body", tokens="flatten")
    Monitor(Language(), probe, "pool")  # no tokens are asked for


def test_of_an_encoder_and_a_decoder_the_mask_must_be_named() -> None:
    mask, h = lengths("right"), draw(N, T, D)
    probe = {"input_ids": h, "attention_mask": mask, "decoder_attention_mask": lengths("left")}
    with pytest.raises(
        ValueError, match=r"an encoder and a decoder, .* mask='attention_mask' for layers of the enc"
    ):
        record_of(Language(), probe, tokens="last")
    for name in ("attention_mask", "decoder_attention_mask"):
        assert record_of(Language(), probe, tokens="last", mask=name).mask == name
    model = Language()
    model.config = type("Config", (), {"is_encoder_decoder": True})()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        record_of(model, {"input_ids": h, "attention_mask": mask}, tokens="last")


def test_rows_of_all_tokens_are_read_by_sample_with_the_mask() -> None:
    mask, h = lengths("left"), draw(N, T, D)
    flat = Language(lambda h: h.flatten(0, 1))
    for tokens in get_args(Tokens):
        record = record_of(flat, {"input_ids": h, "attention_mask": mask}, tokens=tokens)
        expected = spectral_entropy(h, tokens=tokens, mask=mask)
        assert (record.n, record.normalized, record.mask) == (
            expected.n,
            expected.normalized,
            "attention_mask",
        )


def test_rows_of_an_expert_are_taken_unless_some_of_them_may_be_padding() -> None:
    h = draw(N, T, D)
    expert = Language(lambda h: h.flatten(0, 1)[3:17])
    record = record_of(expert, {"input_ids": h}, tokens="flatten")
    assert (record.n, record.normalized) == (14, spectral_entropy(h.flatten(0, 1)[3:17]).normalized)
    full = torch.ones(N, T, dtype=torch.bool)
    assert record_of(expert, {"input_ids": h, "attention_mask": full}, tokens="flatten").n == 14
    with pytest.raises(ValueError, match="which of its rows are padding is open"):
        record_of(expert, {"input_ids": h, "attention_mask": lengths("left")}, tokens="flatten")
    for tokens in ("last", None):
        with pytest.raises(
            ValueError, match=r'\(14, 4\) on a probe of 9 samples, not a row for each.*tokens="flatten"'
        ):
            record_of(expert, {"input_ids": h}, tokens=tokens)


def test_fewer_rows_than_samples_are_a_part_of_them_where_no_tokens_are_meant() -> None:
    h = draw(N, D)
    record = record_of(Give(lambda h: h[2:7]), h, "")
    assert (record.n, record.normalized) == (5, spectral_entropy(h[2:7]).normalized)
    with pytest.raises(ValueError, match=r"gave \(4, 9\) on a probe of 9 samples"):
        record_of(Give(lambda h: h.T), h, "")


# Samples


def test_an_activation_with_other_samples_than_the_probe_names_layer_shapes_and_remedy() -> None:
    h = draw(N, T, D)
    turned = Language(lambda h: h.transpose(0, 1))
    for tokens in get_args(Tokens):
        message = r"layer 'body' on the probe: .*\(5, 9, 4\) on a probe of 9 samples: give samples_axis=1"
        with pytest.raises(ValueError, match=message):
            record_of(turned, h, tokens=tokens)
        record = record_of(turned, h, tokens=tokens, samples_axis=1)
        assert record.normalized == pytest.approx(spectral_entropy(h, tokens=tokens).normalized, abs=1e-14)
    with pytest.raises(ValueError, match=r"\(3, 15, 4\) on a probe of 9 samples: give a function as layers"):
        record_of(Language(lambda h: h.reshape(3, 15, D)), h, tokens="flatten")
    with pytest.raises(ValueError, match=r"with samples_axis=1 the second axis .* it gave \(9, 3, 4\)"):
        record_of(Language(lambda h: h[:, :3]), h, tokens="last", samples_axis=1)


def test_layers_that_disagree_on_where_the_probe_has_its_samples_are_an_error() -> None:
    model = nn.Sequential(Give(), Give(lambda h: h.transpose(0, 1)))
    with pytest.raises(
        ValueError, match=r"\(9, 5, 4\) are along its first axis in layer '1' and .* second in '0'"
    ):
        Monitor(model, draw(N, T, D), "*", tokens="last", samples_axis=1).step(0)


@pytest.mark.parametrize("layers", ["0", "1"])
def test_a_probe_with_tokens_first_is_read_by_samples_axis_1(layers: str) -> None:
    h = draw(N, T, D)
    model = nn.Sequential(Give(), Give(lambda h: h[-1]))
    record = record_of(model, h.transpose(0, 1).contiguous(), layers, tokens="last", samples_axis=1)
    assert record.normalized == pytest.approx(spectral_entropy(h[:, -1]).normalized, abs=1e-14)
    assert record.n == N


def test_rows_along_the_second_axis_of_a_probe_name_samples_axis_1() -> None:
    model = nn.Sequential(Give(), Give(lambda h: h[-1]))
    with pytest.raises(ValueError, match="probe counts samples along its second axis, give samples_axis=1"):
        record_of(model, draw(T, N, D), "1")


def equal_axes(module: nn.Module) -> tuple[nn.Module, Tensor]:
    """A module whose shapes show nothing: as many samples as tokens."""
    return module.double(), draw(T, T, 8)


@pytest.mark.parametrize(
    ("module", "layer", "owner"),
    [
        (nn.LSTM(8, 6), "", "LSTM"),
        (nn.GRU(8, 6), "", "GRU"),
        (nn.RNN(8, 6), "", "RNN"),
        (nn.TransformerEncoderLayer(8, 2, 16), "", "TransformerEncoderLayer"),
        (nn.TransformerEncoderLayer(8, 2, 16), "linear1", "TransformerEncoderLayer"),
        (nn.TransformerEncoderLayer(8, 2, 16), "linear1:input", "TransformerEncoderLayer"),
        (nn.TransformerEncoderLayer(8, 2, 16), "self_attn", "MultiheadAttention"),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False),
            "",
            "TransformerEncoder",
        ),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False),
            "layers.1.norm1",
            "TransformerEncoderLayer",
        ),
    ],
)
def test_torch_modules_with_tokens_first_are_refused_until_the_axis_is_said(
    module: nn.Module, layer: str, owner: str
) -> None:
    model, x = equal_axes(module)
    with pytest.raises(
        ValueError, match=rf"layer '{layer}' .* its {owner} has batch_first=False: give samples_axis=1"
    ):
        record_of(model, x, layer, tokens="last")
    by_tokens = record_of(model, x, layer, tokens="last", samples_axis=1)
    by_samples = record_of(model, x.transpose(0, 1), layer, tokens="last", samples_axis=0)
    assert by_tokens.normalized != by_samples.normalized


def test_torch_modules_with_samples_first_are_taken() -> None:
    for module in (
        nn.LSTM(8, 6, batch_first=True),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    ):
        model, x = equal_axes(module)
        model.eval()
        out = model(x)
        expected = spectral_entropy((out[0] if isinstance(out, tuple) else out).detach()[:, -1])
        assert record_of(model, x, "", tokens="last").normalized == expected.normalized


def test_a_function_is_taken_at_its_word_unless_its_axes_are_exchanged() -> None:
    h = draw(N, T, D)
    model = Language()

    def taken(record: EntropyRecord) -> tuple[int, float]:
        return record.n, record.normalized

    rows = record_of(model, h, lambda model, probe: probe[:4, 0])
    assert taken(rows) == (4, spectral_entropy(h[:4, 0]).normalized)
    windows = record_of(model, h, lambda model, probe: probe.reshape(3, 15, D), tokens="last")
    assert taken(windows) == (3, spectral_entropy(h.reshape(3, 15, D)[:, -1]).normalized)
    with pytest.raises(ValueError, match="give samples_axis=1"):
        record_of(model, h, lambda model, probe: probe.transpose(0, 1), tokens="last")
    turned = record_of(model, h, lambda model, probe: probe.transpose(0, 1), tokens="last", samples_axis=1)
    assert taken(turned) == (N, spectral_entropy(h[:, -1]).normalized)


def test_activations_at_hand_are_read_by_the_same_axes() -> None:
    h = draw(N, T, D)
    monitor = Monitor(tokens="last", samples_axis=1, positions="mean", channel_axis=1)
    maps = draw(N, 3, 2, 2)
    for layer, activations in {"a": h.transpose(0, 1), "b": h[:, 0], "c": maps}.items():
        monitor.observe(0, activations, layer=layer)
    assert [record.normalized for record in monitor.flush()] == [
        spectral_entropy(h[:, -1]).normalized,
        spectral_entropy(h[:, 0]).normalized,
        spectral_entropy(maps, positions="mean", channel_axis=1).normalized,
    ]
    for part in h.split(3):
        monitor.observe(1, part.transpose(0, 1), layer="a", merge=True)
    assert monitor.flush()[0].normalized == pytest.approx(spectral_entropy(h[:, -1]).normalized, abs=1e-14)
    with pytest.raises(ValueError, match=r"^layer 'd': h must have shape") as caught:
        Monitor().observe(0, h, layer="d")
    assert "batch_dims" not in str(caught.value)


# Maps


def test_maps_of_convolutions_need_positions_and_pools_need_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1)).double()
    x = torch.rand(20, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    maps = model[0](x).detach()
    with pytest.raises(
        ValueError, match=r'on the probe: .* positions="flatten" or "mean" with channel_axis=1'
    ):
        record_of(model, x, "0")
    assert record_of(model, x, "1").normalized == spectral_entropy(model(x).detach()[:, :, 0, 0]).normalized
    for positions, n in (("flatten", 720), ("mean", 20)):
        first, second = Monitor(model, x, "*", positions=positions, channel_axis=1).step(0)
        assert (first.n, first.d, second.n, second.d) == (n, 6, 20, 6)
        assert first.normalized == spectral_entropy(maps, positions=positions, channel_axis=1).normalized
    assert Monitor(model, x[:1], "0", positions="flatten", channel_axis=1).step(0)[0].n == 36


def test_positions_are_for_sequences_of_channels_where_no_tokens_are_meant() -> None:
    conv = nn.Conv1d(3, 6, 3).double()
    x = draw(20, 3, 8)
    record = record_of(conv, x, "", positions="mean", channel_axis=1)
    assert record.normalized == pytest.approx(
        spectral_entropy(conv(x).detach().mean(2)).normalized, abs=1e-14
    )
    both = nn.Sequential(Give(), Give(lambda h: h[..., None].expand(20, 3, 8, 2)))
    records = Monitor(both, x, "*", tokens="flatten", positions="mean", channel_axis=2).step(0)
    assert [(record.n, record.d) for record in records] == [(60, 8), (20, 8)]


def test_choices_of_axes_that_do_not_go_together_are_refused() -> None:
    for options, message in [
        ({"positions": "mean"}, "go together"),
        ({"channel_axis": 1}, "go together"),
        ({"positions": "last", "channel_axis": 1}, "positions must be one of 'flatten', 'mean'; got 'last'"),
        ({"samples_axis": 2}, "samples_axis must be one of 0, 1; got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Monitor(**options)  # type: ignore[arg-type]
