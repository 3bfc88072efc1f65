"""Parameter groups: learning-rate factor and weight decay of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    no_decay: Sequence[str] = (),
    vectors_decay: bool = False,
    layer_of: Callable[[str], int] | None = None,
    layer_scales: Sequence[float] = (),
    rate_of: Callable[[str], float] | None = None,
) -> list[dict[str, Any]]:
    """Sort trainable parameters into optimiser groups by layer and weight decay.

    Tensors with at most one dimension (norms, biases, layer scale) do not decay, unless asked for.

    Args:
        named_parameters: of the network.
        weight_decay: for all parameters that decay.
        no_decay: ends of names of other parameters that do not decay.
        vectors_decay: only `no_decay` is exempt (mmdetection's and mmsegmentation's optimisers).
        layer_of: name -> layer id; without it all parameters are in one layer with factor 1.
        layer_scales: learning-rate factor of each layer id.
        rate_of: name -> a further factor on the learning rate.

    Returns:
        Groups in order of layer, each with `params`, `names`, `layer`, `lr_scale`, `decays`, `weight_decay`.
        Frozen parameters are left out.
    """
    groups: dict[tuple[int, bool, float], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        # Frozen parameters (fixed position tables, a frozen backbone) would cost optimiser state for nothing.
        if not parameter.requires_grad:
            continue
        layer = layer_of(name) if layer_of else 0
        # The rule of MAE's, iTPN's and RevCol's released code. `no_decay` has what each of them exempts
        # besides.
        decays = (parameter.ndim > 1 or vectors_decay) and not name.endswith(tuple(no_decay))
        rate = rate_of(name) if rate_of else 1.0
        group = groups.setdefault(
            (layer, decays, rate),
            {
                "params": [],
                "names": [],
                "layer": layer,
                "lr_scale": rate * (layer_scales[layer] if layer_of else 1.0),
                "decays": decays,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    # Sorted, not in order of appearance: torch's optimisers match a saved state to parameters by position
    # alone.
    return [groups[key] for key in sorted(groups)]
