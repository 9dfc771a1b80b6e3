"""Cross entropy with smoothing, z-loss and a vocabulary that may be split over processes; torch operators only."""

import torch
import torch.distributed as dist
from torch import Tensor


class _CrossEntropy(torch.autograd.Function):
    """losses = lse - (1 - e) * x[label] - e * mean(x) + z * lse^2, x = logit_scale * logits."""

    @staticmethod
    def forward(
        ctx, logits, labels, precomputed_lse, smoothing, logit_scale, lse_square_scale, ignore_index,
        inplace_backward, process_group,
    ):  # fmt: skip
        world = 1 if process_group is None else dist.get_world_size(process_group)
        first = 0 if process_group is None else dist.get_rank(process_group) * logits.shape[-1]
        classes = logits.shape[-1] * world
        x = logits.float() * logit_scale
        lse = torch.logsumexp(x, -1) if precomputed_lse is None else precomputed_lse.float()
        if world > 1 and precomputed_lse is None:
            parts = [torch.empty_like(lse) for _ in range(world)]
            dist.all_gather(parts, lse, group=process_group)
            lse = torch.logsumexp(torch.stack(parts), 0)
        ignored = labels == ignore_index
        local = labels.long() - first
        here = (local >= 0) & (local < logits.shape[-1]) & ~ignored
        local = torch.where(here, local, 0)
        target = torch.where(here, x.gather(-1, local[:, None])[:, 0], 0.0)
        if smoothing:
            target = (1.0 - smoothing) * target + smoothing / classes * x.sum(-1)
        if world > 1:
            dist.all_reduce(target, group=process_group)
        z_losses = torch.where(ignored, 0.0, lse_square_scale * lse.square())
        losses = torch.where(ignored, 0.0, lse - target) + z_losses
        ctx.save_for_backward(logits, lse, local, here, ignored)
        ctx.constants = smoothing, logit_scale, lse_square_scale, classes, inplace_backward
        ctx.mark_non_differentiable(z_losses)
        return losses, z_losses

    @staticmethod
    def backward(ctx, dlosses, _dz):
        logits, lse, local, here, ignored = ctx.saved_tensors
        smoothing, logit_scale, lse_square_scale, classes, inplace = ctx.constants
        row = torch.where(ignored, 0.0, dlosses.float() * logit_scale)[:, None]
        grad = torch.exp(logits.float() * logit_scale - lse[:, None])
        grad *= row * (1.0 + 2.0 * lse_square_scale * lse[:, None])
        if smoothing:
            grad -= row * (smoothing / classes)
        grad.scatter_add_(-1, local[:, None], -(1.0 - smoothing) * row * here[:, None])
        grad = logits.copy_(grad) if inplace else grad.to(logits.dtype)
        return grad, None, None, None, None, None, None, None, None


def cross_entropy_loss(
    logits: Tensor, labels: Tensor, precomputed_lse: Tensor | None = None, label_smoothing: float = 0.0,
    logit_scale: float = 1.0, lse_square_scale: float = 0.0, ignore_index: int = -100,
    inplace_backward: bool = False, process_group=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross entropy of every row.

    Args:
        logits: (rows, classes); with `process_group`, this rank's contiguous slice of the classes.
        labels: integers (rows,), over all classes; rows with `ignore_index` give 0.
        precomputed_lse: fp32 (rows,), logsumexp of logit_scale * logits over all classes.
        lse_square_scale: weight of the z-loss, lse^2, which is part of the losses.
        inplace_backward: let the gradient overwrite the logits.

    Returns:
        (losses, z_losses), fp32 (rows,); only the losses carry a gradient.
    """
    return _CrossEntropy.apply(
        logits, labels, precomputed_lse, label_smoothing, logit_scale, lse_square_scale, ignore_index,
        inplace_backward, process_group,
    )  # fmt: skip
