"""Features side by side, and an MLP on them."""

import torch


def test_it_is_its_formula(build, make_batch) -> None:
    model, batch = build("early", early_hidden=(8, 4)), make_batch(cfp=(1, 0), oct=(2, 1))
    features = torch.cat([model.encoder(name).summaries(batch)[0] for name in ("cfp", "oct")], dim=1)
    assert features.shape == (2, 128) and not features[1, :64].any()
    first, second = (layer[0] for layer in model.fusion)
    torch.testing.assert_close(model(batch).logits, model.head(second(first(features).relu()).relu()))
    assert [tuple(layer.weight.shape) for layer in (first, second, model.head)] == [(8, 128), (4, 8), (4, 4)]


def test_without_hidden_layers_it_is_linear(build) -> None:
    model = build("early", early_hidden=())
    assert not list(model.fusion.parameters()) and model.head.in_features == 128
