"""Detectors of mmdet and segmentors of mmseg as what the loop trains."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitpipe.config.dense_sections import DetectOptimConfig
from vitpipe.config.train_sections import OptimConfig
from vitpipe.dense.backbone import NET_PREFIX
from vitpipe.dense.feed import DenseBatch
from vitpipe.optim.groups import parameter_groups
from vitpipe.train.trainable import Trainable

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class DenseMethod(Trainable):
    """A detector or segmentor with `DenseMaps` as `backbone`, which learns by the losses of its own heads.

    Args:
        network: on its device, because mm's data preprocessor keeps the device that the network was moved to.
        synchronised: batch norm takes its statistics over all ranks.
    """

    model: Any

    def __init__(self, network: nn.Module, *, synchronised: bool = False) -> None:
        super().__init__()
        # The configuration sets the norm of the heads only; batch norms between backbone and heads are
        # converted.
        self.model = nn.SyncBatchNorm.convert_sync_batchnorm(network) if synchronised else network

    def losses(self, batch: DenseBatch) -> dict[str, Tensor]:
        """The losses of all heads and their sum, `loss`; sampled boxes and dropout are torch's own draws."""
        # What mmengine's `train_step` does. The preprocessor pads the images to one size, on the device.
        raw = {"inputs": batch.inputs, "data_samples": batch.samples}
        prepared = self.model.data_preprocessor(raw, training=True)
        _, values = self.model.parse_losses(self.model(**prepared, mode="loss"))
        # Heads report accuracies, too.
        return {name: value for name, value in values.items() if "loss" in name}

    def groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Optimiser groups with the layer-wise learning-rate decay of the network's family.

        Learned queries and level embeddings of a head take no weight decay (Mask2Former, arXiv 2112.01527).
        """
        assert isinstance(optim, DetectOptimConfig)
        net, decay = self.model.backbone.net, optim.layer_decay
        # They are 2-D, so the rule that exempts vectors (biases, norms) does not cover them.
        embeddings = tuple(
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) and not name.startswith(NET_PREFIX)
        )

        exempt = [] if optim.decay_norms else _norm_parameters(self.model)

        def rate_of(name: str) -> float:
            if not name.startswith(NET_PREFIX):
                return optim.head_rate
            return optim.restart_rate if name.endswith(net.restarted) else 1.0

        # Heads count as the layer above the network's last: they train at the full rate.
        def layer_of(name: str) -> int:
            inner = name.removeprefix(NET_PREFIX)
            return net.head_layer if inner == name else net.layer_of(inner)

        return parameter_groups(
            self.model.named_parameters(),
            weight_decay=optim.weight_decay,
            no_decay=(*net.no_decay, *embeddings, *exempt),
            vectors_decay=optim.decay_vectors,
            layer_of=None if decay is None else layer_of,
            layer_scales=() if decay is None else net.layer_scales(decay),
            rate_of=rate_of,
        )


def _norm_parameters(network: nn.Module) -> list[str]:
    """Names of the parameters of all norms, whatever they are called."""
    return [
        f"{name}.{own}" if name else own
        for name, module in network.named_modules()
        if isinstance(module, _NORMS)
        for own, _ in module.named_parameters(recurse=False)
    ]
