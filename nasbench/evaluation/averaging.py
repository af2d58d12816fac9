"""How much of a finalised hybrid's training to keep, by held-out text."""

from __future__ import annotations

import torch

from nasbench.evaluation.evaluator import SEARCH_TOKENS, Evaluator
from nasbench.evaluation.tasks import HeldOutLoss
from nasbench.runs import Run
from nasbench.spaces.placement import Placement
from nasbench.supernet.finalize import before_and_after, final_folder, mean_of

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the finalised weights in a mean: from the weights before to the weights behind."""


@torch.no_grad()
def losses_by_share(
    run: Run,
    placement: Placement,
    *,
    of: str = "",
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = SEARCH_TOKENS,
) -> dict[float, float]:
    """Held-out loss, nats a token, of every mean in SHARES. Finalising lowers the KL to the teacher, but it can raise
    the loss on text that is not its own; where it does, a smaller share wins.

    Args:
        of: the name of the training, where a placement has several.
        tokens: held-out tokens of the split "search"; the test split is left for the report.

    Raises UserError as `average_final`.
    """
    evaluator = Evaluator.open(run, device=device, dtype=dtype, search_tokens=tokens)
    net, context, task = evaluator.supernet, evaluator.context("search"), HeldOutLoss()
    parameters, after = before_and_after(net, final_folder(run, placement, of), placement)
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    found = {}
    for share in SHARES:
        for key, parameter in parameters.items():
            parameter.copy_(mean_of(before[key], after[key], share))
        with torch.inference_mode():
            found[share] = task.score(net.select(placement), context).value
    return found
