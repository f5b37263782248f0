"""Training objectives as pure functions of tensors, all in fp32 and all in nats."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def logit_laplace_nll(
    mapped: Float[Tensor, "b 3 h w"], parameters: Float[Tensor, "b 6 h w"], *, min_log_scale: float = -math.inf
) -> Float[Tensor, "b 3 h w"]:
    """Negative log-likelihood of each mapped pixel value under a logit-Laplace distribution (paper, app. A.3).

    |logit(x) - mu| / b + ln b + ln 2 + ln x + ln(1 - x), with mu = parameters[:, :3], ln b = parameters[:, 3:].
    `mapped` is in (0, 1). `min_log_scale` is a floor on ln b: without one, a flat background that is predicted
    exactly drives b to 0 and takes over the whole gradient.
    """
    mapped, parameters = mapped.float(), parameters.float()
    location, log_scale = parameters.chunk(2, dim=1)
    log_scale = log_scale.clamp(min=min_log_scale)
    error = (torch.logit(mapped) - location).abs() * torch.exp(-log_scale)
    return error + log_scale + math.log(2) + mapped.log() + (1 - mapped).log()


def negative_elbo(
    nll: Float[Tensor, "b 3 h w"], kl: Float[Tensor, "b gh gw"], *, kl_weight: float
) -> Float[Tensor, ""]:
    """Negative evidence bound in nats per pixel value: mean NLL + kl_weight * KL summed over positions / values.

    At 256x256 with 32x32 tokens the KL of a position thus counts kl_weight / 192 (paper, app. A.2). Independent
    of batch size and resolution.
    """
    values = nll[0].numel()
    return nll.mean() + kl_weight * kl.flatten(1).sum(1).mean() / values


def masked_mean(values: Float[Tensor, "b t"], keep: Bool[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Mean over the kept entries; 0 if none is kept."""
    return (values * keep).sum() / keep.sum().clamp(min=1)


def contrastive_loss(
    image_features: Float[Tensor, "b d"], text_features: Float[Tensor, "b d"], logit_scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy over the similarities of all pairs of a batch; the diagonal is right (CLIP, sec. 2.3).

    Features have unit length; `logit_scale` is the factor on their cosine (inverse temperature).
    """
    with torch.autocast(image_features.device.type, enabled=False):
        logits = logit_scale.float() * image_features.float() @ text_features.float().t()
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
