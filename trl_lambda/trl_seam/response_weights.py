"""f of a generation batch's responses, and what it does to advantages in a loss that TRL reduces."""

from torch import Tensor

from ..lambda_grpo_config import LambdaGRPOConfig
from ..preference.lambda_parameter import LambdaParameter
from ..weights import LengthWeight, sequence_mean_weights, weigh_responses
from ..weights.length_weight import DAPO, GRPO
from .generation_batch import GenerationBatch


class ResponseWeights:
    """
    f of every response, with λ as it is now.

    Args:
        f ([`LengthWeight`], *optional*): `None` for TRL's own reduction.
        parameter ([`LambdaParameter`], *optional*): λ, if f has one.
        args ([`LambdaGRPOConfig`]): scope, `positive_weight` and `loss_type`.
        reduction (`str`, *optional*): how a subclass's loss is reduced, if it is not TRL's.
    """

    def __init__(
        self, f: LengthWeight | None, parameter: LambdaParameter | None, args: LambdaGRPOConfig, reduction: str | None
    ) -> None:
        self._replaces_reduction = f is not None
        # With TRL's own reduction, the member that it amounts to.
        self._member = f or (GRPO() if args.loss_type in ("grpo", "sapo") else DAPO())
        self._parameter = parameter
        self._scope = args.aggregation_scope
        self._positive_weight = args.positive_weight
        # TRL's `sapo` is a mean of sequence means, the other surrogates that f goes with are token means.
        own = "sequence_mean" if args.loss_type == "sapo" else "token_mean"
        self._is_token_mean = (reduction or own) == "token_mean"
        self._fixed: tuple[GenerationBatch, Tensor] | None = None  # f of the last batch where no λ moves

    @property
    def looks_at_sign(self) -> bool:
        """Whether responses with A > 0 and with A < 0 are weighed differently."""
        return getattr(self._member, "side", "both") != "both" or self._positive_weight != 1

    def of(self, batch: GenerationBatch) -> Tensor:
        """f, (P, G); with TRL's own reduction, the weight that it amounts to."""
        if self._fixed is not None and self._fixed[0] is batch:
            return self._fixed[1]
        weights = self._weigh(batch, self._positive_weight)
        if self._parameter is None or not self._parameter.learnable:
            self._fixed = (batch, weights)
        return weights

    def factor(self, f: Tensor, batch: GenerationBatch) -> Tensor | None:
        """What f is on top of the loss's own reduction, flat, (P·G,); `None` where it is that reduction."""
        if self._replaces_reduction:
            return (f if self._is_token_mean else sequence_mean_weights(f, batch.lengths)).flatten()
        if self._positive_weight == 1:
            return None
        plain = self._weigh(batch, 1.0)
        return (f / plain.masked_fill(plain == 0, 1)).flatten()

    def _weigh(self, batch: GenerationBatch, positive_weight: float) -> Tensor:
        return weigh_responses(
            self._member,
            batch.lengths,
            None if self._parameter is None else self._parameter.for_loss,
            scope=self._scope,
            advantages=batch.advantages,
            features=batch.features,
            positive_weight=positive_weight,
        )
