"""`CrossEntropyLoss` under flash-attn's name and options."""

from torch import nn

from flash_attn.errors import ArgumentValueError
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss


class CrossEntropyLoss(nn.Module):
    """Cross entropy with label smoothing, logit scale, z-loss and a vocabulary split over `process_group`.

    forward(input (rows, classes), target (rows,)) -> loss, or (loss, z_loss) if return_z_loss; "mean" divides by
    the rows that are not `ignore_index`.
    """

    def __init__(
        self, ignore_index=-100, reduction="mean", label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0,
        inplace_backward=False, process_group=None, return_z_loss=False,
    ):  # fmt: skip
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise ArgumentValueError(f"reduction must be mean, none or sum, got {reduction!r}")
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.logit_scale, self.lse_square_scale = logit_scale, lse_square_scale
        self.inplace_backward, self.process_group = inplace_backward, process_group
        self.return_z_loss = return_z_loss

    def forward(self, input, target, precomputed_lse=None):
        losses = cross_entropy_loss(
            input, target, precomputed_lse, self.label_smoothing, self.logit_scale, self.lse_square_scale,
            self.ignore_index, self.inplace_backward, self.process_group,
        )  # fmt: skip
        if self.reduction == "mean":
            rows = (target != self.ignore_index).sum()
            losses = tuple(x.sum() / rows for x in losses)
        elif self.reduction == "sum":
            losses = tuple(x.sum() for x in losses)
        return losses if self.return_z_loss else losses[0]
