"""Labels of a video's first frame propagated through frozen features, without any training.

Caron et al., Emerging Properties in Self-Supervised Vision Transformers, arXiv 2104.14294, section 4.2.2,
after Jabri et al., Space-Time Correspondence as a Contrastive Random Walk, arXiv 2006.14613.

A patch of a frame gets the labels of the context patches that are most like it: `top_k` of all patches of the
first frame and of the last few frames together, near its own place, weighted by exp(cosine / temperature).
The labels stay soft from frame to frame.

Memory: a strip of columns of the grid at a time is compared with the columns in reach of it. For 30 x 52
patches and eight context frames that is 5 MB at once, where the whole matrix has 78 MB, and of 60 x 104
patches 1.2 GB.

Shapes: R rows, C columns of the patch grid, D channels, L labels with the background, F context frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, normalize, one_hot

from vitpipe.contracts.errors import InputError

_ROUNDING = 1e-5
_STRIP = 6  # columns at a time: wider strips compare more patches in vain, narrower ones are too small


@dataclass(frozen=True)
class PropagationSettings:
    """Defaults are DINO's, which SelfPatch evaluates with.

    Attributes:
        num_context_frames: beside the first frame.
        neighbourhood: rows and columns by which a context patch may be away; 0 for any number.
        top_k: context patches that count; more where several are equally like the last of them.
    """

    num_context_frames: int = 7
    neighbourhood: int = 12
    top_k: int = 5
    temperature: float = 0.1


class Propagation:
    """The propagation through one video; call `step` frame by frame, from the second one on.

    Args:
        features_NC: of the first frame, row by row; need not be normalised, as all features.
        labels_RC: whole numbers, of its patches, from 0 for the background.
        settings: of the protocol.

    Raises:
        InputError: when features and labels have another number of patches.
    """

    def __init__(self, features_NC: Tensor, labels_RC: Tensor, settings: PropagationSettings) -> None:
        self.settings, self.grid = settings, (labels_RC.shape[0], labels_RC.shape[1])
        rows, columns = self.grid
        labels_RCL = one_hot(labels_RC.long()).to(features_NC.device, torch.float32)
        room = 1 + settings.num_context_frames
        # Column by column, so that the columns in reach of a strip lie together: nothing is copied to compare
        # with them.
        self._features = features_NC.new_zeros(columns, room, rows, features_NC.shape[1], dtype=torch.float32)
        self._labels = labels_RCL.new_zeros(columns, room, rows, labels_RCL.shape[2])
        self._num_kept, self._next = 1, 1
        self._features[:, 0] = self._by_column(features_NC)
        self._labels[:, 0] = labels_RCL.transpose(0, 1)

    def step(self, features_NC: Tensor) -> Tensor:
        """Features (N, D) of the next frame -> its soft labels (L, R, C)."""
        own_CRD = self._by_column(features_NC)
        strips = [
            self._strip(own_CRD[first : first + _STRIP], first) for first in range(0, self.grid[1], _STRIP)
        ]
        labels_CRL = torch.cat(strips)
        self._keep(own_CRD, labels_CRL)
        return labels_CRL.permute(2, 1, 0)

    def _by_column(self, features_NC: Tensor) -> Tensor:
        """(N, D) row by row -> unit vectors (C, R, D)."""
        rows, columns = self.grid
        if len(features_NC) != rows * columns:
            raise InputError(
                f"{len(features_NC)} patch features for a grid of {rows} x {columns} labels",
                where="propagation",
                fix="give features and labels of the same grid",
            )
        unit_NC = normalize(features_NC.float(), dim=1)
        return unit_NC.unflatten(0, self.grid).transpose(0, 1).contiguous()

    def _strip(self, own_WRD: Tensor, first: int) -> Tensor:
        """Soft labels (W, R, L) of W columns of the frame, the first of them given."""
        reach, (_, columns) = self.settings.neighbourhood, self.grid
        width = len(own_WRD)
        low, high = (max(0, first - reach), first + width + reach) if reach else (0, columns)
        context = self._features[low:high, : self._num_kept]
        labels_ML = self._labels[low:high, : self._num_kept].flatten(0, 2)
        cosine_PM = own_WRD.flatten(0, 1) @ context.flatten(0, 2).T
        if reach:
            far = self._far(first, width, low, len(context))
            cosine_PM.view(width, -1, len(context), self._num_kept, self.grid[0]).masked_fill_(
                far, -torch.inf
            )
        return self._weighted(cosine_PM, labels_ML).unflatten(0, (width, -1))

    def _far(self, first: int, width: int, low: int, num_columns: int) -> Tensor:
        """Which context patches are out of reach, (W, R, columns of the context, 1, R)."""
        device, reach = self._features.device, self.settings.neighbourhood
        row = torch.arange(self.grid[0], device=device)
        own = torch.arange(first, first + width, device=device)
        other = torch.arange(low, low + num_columns, device=device)
        far_RR = (row[:, None] - row).abs() > reach
        far_WC = (own[:, None] - other).abs() > reach
        return far_WC[:, None, :, None, None] | far_RR[None, :, None, None, :]

    def _weighted(self, cosine_PM: Tensor, labels_ML: Tensor) -> Tensor:
        """Labels (P, L) by the context patches that are most like each of P patches."""
        count, temperature = min(self.settings.top_k, cosine_PM.shape[1]), self.settings.temperature
        # One more: where it equals the last one, both count.
        best_PK, places_PK = cosine_PM.topk(min(count + 1, cosine_PM.shape[1]), dim=1)
        # Relative to the nearest: the same shares, and no overflow at low temperatures.
        shares_PK = ((best_PK[:, :count] - best_PK[:, :1]) / temperature).exp()
        shares_PK /= shares_PK.sum(dim=1, keepdim=True)
        found_PL = (shares_PK[:, :, None] * labels_ML[places_PK[:, :count]]).sum(dim=1)
        least_P1 = best_PK[:, count - 1 : count]
        tied_P = (best_PK[:, count:] == least_P1).any(dim=1) & least_P1[:, 0].isfinite()
        # Rare, but the rule in videos with a frame that occurs twice.
        if tied_P.any():
            cosine_TM = cosine_PM[tied_P]
            shares_TM = ((cosine_TM - best_PK[tied_P, :1]) / temperature).exp()
            shares_TM *= cosine_TM >= least_P1[tied_P]
            found_PL[tied_P] = (shares_TM / shares_TM.sum(dim=1, keepdim=True)) @ labels_ML
        return found_PL

    def _keep(self, own_CRD: Tensor, labels_CRL: Tensor) -> None:
        """Take a frame into the context, in the place of the oldest one but the first."""
        room = self._features.shape[1]
        if room == 1:
            return
        self._features[:, self._next], self._labels[:, self._next] = own_CRD, labels_CRL
        self._num_kept = max(self._num_kept, self._next + 1)
        self._next = self._next + 1 if self._next + 1 < room else 1


def hard_labels(soft_LRC: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Soft labels of patches -> a label map (H, W) of the network's input.

    Upsampled, every label in use spread to the range from 0 to 1, and the largest one taken.

    Args:
        size: height and width of the network's input.
    """
    dense_LHW = interpolate(soft_LRC[None], size=size, mode="bilinear", align_corners=False)[0]
    low_L11, high_L11 = dense_LHW.amin(dim=(1, 2), keepdim=True), dense_LHW.amax(dim=(1, 2), keepdim=True)
    # A label that is the same everywhere has no range but rounding's. The official code divides 0 by 0 and
    # then takes it, as NaN counts as the largest; left as it is, it wins where it is the only one.
    has_range = high_L11 - low_L11 > _ROUNDING * high_L11
    spread_LHW = (dense_LHW - low_L11) / torch.where(has_range, high_L11 - low_L11, 1.0)
    chosen_HW = torch.where(has_range, spread_LHW, dense_LHW).argmax(dim=0)
    labels: NDArray[np.uint8] = chosen_HW.to(torch.uint8).cpu().numpy()
    return labels
