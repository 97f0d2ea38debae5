"""Importance and load (Riquelme et al., V-MoE, arXiv 2106.05974, appendix A; used by SwinV2-MoE)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from flexpert.core.context import RoutingContext
from flexpert.core.errors import InputError
from flexpert.core.registry import LOSSES
from flexpert.core.routing import AnyRouting

from .common import BATCH_SCOPES, check_scope, logits_of, over_ranks, real, with_scopes


@LOSSES.register("importance_load")
@with_scopes(BATCH_SCOPES)
def importance_load(
    routing: AnyRouting, context: RoutingContext, *, mixed: bool = False, scope: str = "micro_batch"
) -> Tensor:
    """(CV^2(importance) + CV^2(load)) / 2, with CV^2 = variance / (mean^2 + 1e-10); 0 at perfect balance.

    importance_e = sum_t p_te from the logits without noise. load_e = sum_t Phi((z_te - tau_t) / std): the
    probability that expert e would be chosen again under fresh noise, z being the logits without noise, tau_t
    the lowest noisy logit chosen and std the standard deviation of the gate noise.

    Args:
        mixed: use p_te in place of z_te in the load, comparing a probability with a logit, as the released
            code of Tutel does; to reproduce models trained with it.
        scope: "micro_batch", or "global": importance and load are those of the batch that all ranks share.

    Raises:
        InputError: a router without gate noise.
    """
    check_scope(scope, BATCH_SCOPES)
    noisy_TE = logits_of(routing, "importance_load")
    if "noise_std" not in routing.aux:
        raise InputError("loss 'importance_load' needs a router with gate_noise > 0 or learned_noise=True")
    clean_TE, std = routing.aux["clean_logits_TE"], routing.aux["noise_std"]
    if noisy_TE.shape[1] == 1:
        return noisy_TE.sum() * 0.0
    ids_TK = routing.aux["ids_TK"]
    chosen_TK = noisy_TE.gather(1, ids_TK.clamp(max=noisy_TE.shape[1] - 1))
    tau_T1 = chosen_TK.masked_fill(ids_TK >= noisy_TE.shape[1], float("inf")).amin(-1, keepdim=True)
    tau_T1 = tau_T1.masked_fill(tau_T1.isinf(), 0.0)  # no expert chosen: a padding token, removed below
    probs_TE = clean_TE.softmax(-1)
    value_TE = probs_TE if mixed else clean_TE
    load_TE = torch.special.ndtr((value_TE - tau_T1) / std)
    parts = over_ranks(scope, context, *(real(part, context)[0].sum(0) for part in (probs_TE, load_TE)))
    return cast(Tensor, sum(_squared_cv(part_E) for part_E in parts)) / 2


def _squared_cv(values_E: Tensor) -> Tensor:
    return values_E.var() / (values_E.mean().square() + 1e-10)
