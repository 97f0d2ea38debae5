"""Weight rules: gate scores of the chosen experts to combine weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexpert.core.config import check_renormalize, require_bool, require_number


@dataclass(frozen=True, kw_only=True)
class WeightRule:
    """Combine weights from gate scores.

    Attributes:
        renormalize: divide by the sum over the token's experts: False; True, except for K = 1, where the
            weight would be constant and the gate would get no gradient; "always".
        scale: factor on every weight.
        straight_through: weight p / p.detach(): 1 in value, with the gate's gradient in relative form; for
            exact starts of converted models. Takes the place of renormalisation.
    """

    renormalize: bool | str = False
    scale: float = 1.0
    straight_through: bool = False

    def __post_init__(self) -> None:
        check_renormalize(self.renormalize)
        require_number("scale", self.scale)
        require_bool("straight_through", self.straight_through)

    def normalizes(self, top_k: int) -> bool:
        """Whether the weights of top_k choices are divided by their sum."""
        return self.renormalize == "always" or (bool(self.renormalize) and top_k > 1)

    def __call__(self, score_TK: Tensor) -> Tensor:
        """Weights (T, K); an absent expert has score 0 and keeps weight 0."""
        if self.straight_through:
            weight_TK = (score_TK / score_TK.detach().clamp(min=1e-20)).where(score_TK > 0, 0.0)
        elif self.normalizes(score_TK.shape[-1]):
            weight_TK = score_TK / score_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        else:
            weight_TK = score_TK
        return weight_TK if self.scale == 1.0 else weight_TK * self.scale
