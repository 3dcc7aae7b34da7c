"""
How well a weighted batch gradient points along the true policy gradient: tensors in, cosines out, no trainer.

Batch k gives the gradient of every weight w and an unbiased term of the policy gradient,

    g_k(w) = 1/Σ|o| · Σ_i A_i Σ_t w_it ∇log π_it               A: rewards standardised within the group, as in GRPO
    t_k    = 1/N · Σ_i (r_i - mean of the group's others) Σ_t ∇log π_it,    E[t_k] = ∇E[r]

the latter unweighted and unnormalised: a sum over tokens, no standard deviation and no length to divide by. What is
measured is cos(g_k(w), T_k) with T_k = Σ_{j≠k} t_j. The batch's own term is left out because g_k(w) and t_k have their
noise in common, which would pass for alignment: gradients of nothing but noise would reach a cosine of about 1/√K.

T_k has noise of its own, which shrinks the cosines of all weights by the same factor. So only ratios are read: the
mean cosine over batches divided by that of λ = 0. The K references share batches, so the cosines are not independent;
the standard error is that of a jackknife that deletes one batch from everything, references included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

ADVANTAGE_EPSILON = 1e-4  # TRL's, beside the group's standard deviation
ADAM_EPSILON = 1e-8
METRICS = ("raw", "adam")


@dataclass(frozen=True)
class Batch:
    """
    Completions of P prompts, G each, as B = P · G rows of up to T tokens.

    Args:
        inputs (`dict[str, torch.Tensor]`): what the policy needs to give the tokens' log-probabilities.
        mask (`torch.Tensor`): the policy's own tokens, the end token included, (B, T), bool; some in every row.
        rewards (`torch.Tensor`): (P, G).
    """

    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor
    rewards: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens per completion, (P, G)."""
        return self.mask.sum(dim=1).view_as(self.rewards)


@dataclass(frozen=True)
class Products:
    """
    The inner products, under one metric, from which every figure follows.

    Args:
        cross (`torch.Tensor`): ⟨g_k(w), t_j⟩, (W, K, K), float64.
        norms (`torch.Tensor`): |g_k(w)|, (W, K), float64.
        gram (`torch.Tensor`): ⟨t_j, t_l⟩, (K, K), float64.
    """

    cross: torch.Tensor
    norms: torch.Tensor
    gram: torch.Tensor

    def without(self, batch: int) -> "Products":
        """The same had this batch not been drawn, neither as a gradient nor in any reference."""
        kept = torch.arange(self.gram.size(0)) != batch
        return Products(self.cross[:, kept][:, :, kept], self.norms[:, kept], self.gram[kept][:, kept])


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """
    Standardise rewards within each group as TRL does: (r - mean) / (std + 1e-4), std unbiased.

    Args:
        rewards (`torch.Tensor`): (P, G).

    Returns:
        `torch.Tensor`: A, (P, G).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + ADVANTAGE_EPSILON)


def leave_one_out_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """
    Reward minus the mean of the group's other rewards.

    That baseline does not depend on the completion it is subtracted for, so the policy gradient stays unbiased.

    Args:
        rewards (`torch.Tensor`): (P, G), G >= 2.

    Returns:
        `torch.Tensor`: (P, G).
    """
    others = rewards.size(1) - 1
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / others


def flat_gradient(logps: torch.Tensor, coefficients: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Σ_it c_it ∇log π_it as one vector. The graph of `logps` is kept for the next coefficients.

    Args:
        logps (`torch.Tensor`): log π_it with their graph, (B, T).
        coefficients (`torch.Tensor`): c, constants, (B, T).
        parameters (`Sequence[torch.Tensor]`): what to differentiate by, D numbers in all.

    Returns:
        `torch.Tensor`: (D,), in the dtype of the parameters.
    """
    gradients = torch.autograd.grad((coefficients * logps).sum(), parameters, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def weighted_gradient(
    batch: Batch, logps: torch.Tensor, weights: torch.Tensor, parameters: Sequence[torch.Tensor]
) -> torch.Tensor:
    """
    g(w), the direction in which descent on the weighted loss moves the policy at ρ = 1.

    Every clip surrogate has the gradient A·∇log π there, so the weights are all that is left of a loss.

    Args:
        batch (`Batch`): the completions.
        logps (`torch.Tensor`): (B, T), with graph.
        weights (`torch.Tensor`): w, (B, T).
        parameters (`Sequence[torch.Tensor]`): D numbers in all.

    Returns:
        `torch.Tensor`: (D,).
    """
    advantages = group_advantages(batch.rewards).view(-1, 1)
    return flat_gradient(logps, advantages * weights * batch.mask / batch.mask.sum(), parameters)


def truth_term(batch: Batch, logps: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    t, whose expectation over prompts and completions is ∇E[r].

    Args:
        batch (`Batch`): the completions, sampled from the policy itself at temperature 1.
        logps (`torch.Tensor`): (B, T), with graph.
        parameters (`Sequence[torch.Tensor]`): D numbers in all.

    Returns:
        `torch.Tensor`: (D,).
    """
    advantages = leave_one_out_advantages(batch.rewards).view(-1, 1)
    return flat_gradient(logps, advantages * batch.mask / batch.mask.size(0), parameters)


def inner_products(
    batches: Sequence[Batch],
    logps_of: Callable[[Batch], torch.Tensor],
    weights_of: Callable[[Batch, torch.Tensor], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, Products]:
    """
    Differentiate every batch under every weight, and keep inner products only.

    Two passes, as ⟨g_k(w), t_j⟩ needs the terms of all batches: these K·D numbers fit in memory, all K·W·D do not. The
    metric `"raw"` is Euclid's. `"adam"` is ⟨x, y⟩ = Σ x·y / (√v + ε) with v the mean over batches of the squared
    gradient of λ = 0: what a step of Adam along g gains is, to first order, ⟨g, ∇E[r]⟩ in that sense. v is one for all
    weights, and held fixed in the jackknife.

    Args:
        batches (`Sequence[Batch]`): K independent batches.
        logps_of (`Callable`): batch → log π of its tokens, (B, T), with graph, finite also where the mask is off.
        weights_of (`Callable`): batch, log π (detached) → w, (W, B, T), that of λ = 0 first.
        parameters (`Sequence[torch.Tensor]`): D numbers in all.
        on_batch (`Callable`): called after each batch of each pass, 2 · K times.

    Returns:
        `dict[str, Products]`: by metric.
    """
    truths: list[torch.Tensor] = []
    second_moment = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        logps = logps_of(batch)
        truths.append(truth_term(batch, logps, parameters))
        base = weighted_gradient(batch, logps, weights_of(batch, logps.detach())[0], parameters)
        second_moment = second_moment + base.double().square() / len(batches)
        on_batch()
    truth = torch.stack(truths).double()
    scales = torch.stack([torch.ones_like(second_moment), 1 / (second_moment.sqrt() + ADAM_EPSILON)])  # as METRICS
    references = [(truth * scale).T for scale in scales]

    cross, norms = [], []
    for batch in batches:
        logps = logps_of(batch)
        weights = weights_of(batch, logps.detach())
        gradients = torch.stack([weighted_gradient(batch, logps, w, parameters) for w in weights]).double()
        cross.append(torch.stack([gradients @ reference for reference in references]))
        norms.append((scales @ gradients.square().T).sqrt())
        on_batch()
    each = zip(METRICS, torch.stack(cross, dim=2), torch.stack(norms, dim=2), references, strict=True)
    return {metric: Products(along, norm, truth @ reference) for metric, along, norm, reference in each}


def cosines(products: Products) -> torch.Tensor:
    """
    cos(g_k(w), Σ_{j≠k} t_j) of every weight and batch.

    Args:
        products (`Products`): of at least two batches.

    Returns:
        `torch.Tensor`: (W, K); 0 where a gradient is, as when no group's rewards differ: such a batch goes nowhere.
    """
    along = products.cross.sum(dim=2) - products.cross.diagonal(dim1=1, dim2=2)
    squared = products.gram.sum() - 2 * products.gram.sum(dim=1) + products.gram.diagonal()
    scale = products.norms * squared.clamp(min=0).sqrt()
    return torch.where(scale > 0, along / scale, 0.0)


def cosine_ratios(products: Products) -> torch.Tensor:
    """Mean cosine over batches, divided by that of the first weight; (W,)."""
    means = cosines(products).mean(dim=1)
    return means / means[0]


def without_each(products: Products, statistic: Callable[[Products], torch.Tensor]) -> torch.Tensor:
    """A statistic (W,) of all batches but one, for each one; (K, W)."""
    return torch.stack([statistic(products.without(batch)) for batch in range(products.gram.size(0))])


def jackknife_error(deleted: torch.Tensor) -> torch.Tensor:
    """
    Standard error √((K-1)/K · Σ_k (θ_k - mean θ)²) of a smooth statistic.

    Args:
        deleted (`torch.Tensor`): θ_k, the statistic without batch k, (K, ...).

    Returns:
        `torch.Tensor`: of the shape of one θ_k.
    """
    count = deleted.size(0)
    return ((count - 1) / count * (deleted - deleted.mean(dim=0)).square().sum(dim=0)).sqrt()
