"""Time and memory of PaCa networks per patch, beside the same network written out plainly.

The plain form is what a first implementation from the paper looks like: maps in the usual memory layout,
tokens rearranged between them, attention as two products and a softmax. It uses the parameters of our
network, so that only the way of computing differs.

Shapes: B images, N patches, C channels, H heads, c = C / H, M clusters.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.benchmarks.tensor_memory import LiveMemory
from vitpipe.models.paca.clustering import ConvClustering, Grid
from vitpipe.models.paca.config import PacaConfig
from vitpipe.models.paca.family import FAMILY
from vitpipe.models.paca.paca import ClusterAttention, ConvFfn, PacaBlock
from vitpipe.models.paca.paca_classifier import PacaClassifier
from vitpipe.models.paca.paca_shapes import STRIDE

_NUM_CLASSES = 1000


@dataclass(frozen=True)
class StepCost:
    """One training step of one form: forward, loss, backward, AdamW.

    Attributes:
        image_size: pixels per side.
        form: `vitpipe` or `plain`.
        batch: B.
        seconds: CPU time on a CPU, else wall time; median.
        peak_bytes: of all tensors beside parameters, gradients and the optimiser's states.
    """

    image_size: int
    form: str
    batch: int
    seconds: float
    peak_bytes: int

    @property
    def patches(self) -> int:
        """Patches of the first stage in the batch."""
        return self.batch * (self.image_size // 4) ** 2


def plain_logits(network: PacaClassifier, images_BCHW: Tensor) -> Tensor:
    """(B, 3, H, W) -> logits (B, K), step by step; for convolutional clustering without a teacher."""
    backbone = network.backbone
    stem = backbone.stem
    x_BCHW = stem.conv2(stem.conv1(images_BCHW))
    x_BNC, grid = _tokens(x_BCHW), (x_BCHW.shape[2], x_BCHW.shape[3])
    x_BNC = stem.norm(x_BNC)
    for number, (blocks, norm) in enumerate(zip(backbone.stages, backbone.norms, strict=True)):
        shares: Tensor | None = None
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            assert isinstance(block, PacaBlock)
            out, shares = _plain_attention(block.attn, block.norm1(x_BNC), grid, shares)
            x_BNC = x_BNC + out
            x_BNC = x_BNC + _plain_ffn(block.mlp, block.norm2(x_BNC), grid)
        x_BNC = norm(x_BNC)
        if number < len(backbone.transitions):
            halving = backbone.transitions[number]
            x_BCHW = halving.conv(_map(x_BNC, grid))  # type: ignore[operator]
            x_BNC, grid = _tokens(x_BCHW), (x_BCHW.shape[2], x_BCHW.shape[3])
            x_BNC = halving.norm(x_BNC)  # type: ignore[operator]
    logits: Tensor = network.head(x_BNC.mean(dim=1))
    return logits


def _plain_attention(
    attn: ClusterAttention, x_BNC: Tensor, grid: Grid, shares_BMN: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if attn.clustering is not None:
        clustering = attn.clustering
        assert isinstance(clustering, ConvClustering)
        x_BCHW = F.gelu(clustering.depthwise(_map(x_BNC, grid)))
        scores_BMHW = clustering.to_clusters(F.gelu(clustering.pointwise(x_BCHW)))
        shares_BMN = scores_BMHW.flatten(2).softmax(dim=-1)
    source = x_BNC
    if attn.cluster_norm is not None:
        source = attn.cluster_norm(torch.einsum("bmn,bnc->bmc", shares_BMN, x_BNC))
    heads, width = attn.num_heads, x_BNC.shape[-1] // attn.num_heads
    q, k, v = (
        part.reshape(len(part), -1, heads, width).permute(0, 2, 1, 3)
        for part in (attn.q(x_BNC), attn.k(source), attn.v(source))
    )
    attention_BHNM = (q @ k.transpose(-2, -1) * width**-0.5).softmax(dim=-1)
    out_BNC = (attention_BHNM @ v).transpose(1, 2).reshape(x_BNC.shape)
    return attn.proj(out_BNC), shares_BMN


def _plain_ffn(ffn: ConvFfn, x_BNC: Tensor, grid: Grid) -> Tensor:
    hidden_BND = ffn.fc1(x_BNC)
    hidden_BND = hidden_BND + _tokens(ffn.depthwise(_map(hidden_BND, grid)))
    out: Tensor = ffn.fc2(F.gelu(hidden_BND))
    return out


def _map(x_BNC: Tensor, grid: Grid) -> Tensor:
    """Tokens as a map in the usual memory layout, channel by channel."""
    return x_BNC.transpose(1, 2).reshape(len(x_BNC), -1, *grid).contiguous()


def _tokens(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.flatten(2).transpose(1, 2).contiguous()


FORMS: dict[str, Callable[[PacaClassifier, Tensor], Tensor]] = {
    "vitpipe": lambda network, images: network(images),
    "plain": plain_logits,
}


def measure_clusters(
    model: PacaConfig,
    sizes: dict[int, int],
    *,
    rounds: int,
    device: torch.device,
    say: Callable[[str], None],
) -> list[StepCost]:
    """Training steps of both forms in turn, at several image sizes.

    Args:
        model: without a teacher, with convolutional clustering.
        sizes: pixels per side -> images per batch.
        rounds: timed steps of each form at each size.
        say: told what is measured.
    """
    found = []
    for size, batch in sizes.items():
        torch.manual_seed(0)
        network = FAMILY.classifier(model, num_classes=_NUM_CLASSES, drop_path=0.0).to(device).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        images = torch.randn(batch, 3, size, size, device=device)
        labels = torch.randint(_NUM_CLASSES, (batch,), device=device)
        say(f"{model.name} at {size} pixels, {rounds} steps of each form")
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        peaks = {}
        for form, forward in FORMS.items():  # also the warm-up
            peaks[form] = _peak_bytes(network, forward, images, labels)
        for _ in range(rounds):
            # In turn: what else the machine does meets both.
            for form, forward in FORMS.items():
                times[form].append(_step(network, optimizer, forward, images, labels))
        found += [StepCost(size, form, batch, statistics.median(times[form]), peaks[form]) for form in FORMS]
    return found


def _step(network: PacaClassifier, optimizer: Any, forward: Any, images: Tensor, labels: Tensor) -> float:
    """Seconds of a step: of the processor on a CPU, where others work, too; of the clock on a GPU."""
    clock = time.process_time if images.device.type == "cpu" else time.perf_counter
    gc.collect()
    start = clock()
    F.cross_entropy(forward(network, images), labels).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return clock() - start


def _peak_bytes(network: PacaClassifier, forward: Any, images: Tensor, labels: Tensor) -> int:
    with LiveMemory() as memory:
        F.cross_entropy(forward(network, images), labels).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    peak = memory.peak_bytes(without=gradients)
    network.zero_grad(set_to_none=True)
    return peak


def batch_of(size: int, largest: int, batch: int) -> int:
    """Images of this size that have about as many patches as `batch` images of the largest size."""
    return max(1, batch * (largest // STRIDE) ** 2 // (size // STRIDE) ** 2)
