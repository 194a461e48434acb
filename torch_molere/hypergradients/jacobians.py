r"""∂U/∂g in closed form for the optimizers most used: SGD, Adam and AdamW.

Each of them works on every element alone, so that its Jacobian is a diagonal. With :math:`s = -1` for ``maximize``,
else 1:

SGD, where the gradient enters the momentum buffer with :math:`c = 1 - τ` (1 at its first step):

.. math:: -s\,γ \cdot \{1, c, 1 + μc\} \quad \text{(plain, momentum, Nesterov)}

Adam and AdamW (Kingma and Ba, arXiv 1412.6980, algorithm 1), at moments m and v before step t,
:math:`r = \sqrt{v_t}`, :math:`b = \sqrt{1 - β_2^t}` and :math:`d = r / b + ε`:

.. math:: \frac{-s\,γ}{1 - β_1^t} \cdot
    \frac{(1 - β_1) β_2\,v - (1 - β_2) β_1\,m g + (1 - β_1)\,ε\,b\,r}{r\,b\,d^2}

The terms :math:`(1 - β_1)(1 - β_2) g^2` of both summands of the quotient rule have cancelled on paper: at a first step
nothing else is left but the term with ε, which rounding would bury.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

Diagonal = float | Tensor
"""Of the Jacobian for one parameter: the same for every element, or a tensor of the parameter's shape."""


def has_closed_form(optimizer: Optimizer) -> bool:
    """Whether :func:`diagonals` knows the update of this optimizer, with these options.

    Args:
        optimizer: if of a subclass, then of one that changes nothing in its step.
    """
    return isinstance(optimizer, (SGD, Adam, AdamW)) and not any(
        group.get("amsgrad", False)
        or any(isinstance(number, Tensor) for number in (group["lr"], *group.get("betas", ())))
        or any(parameter.is_complex() for parameter in group["params"])
        for group in optimizer.param_groups
    )


@torch.no_grad()
def diagonals(optimizer: Optimizer, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Diagonal]:
    """∂U/∂g of the optimizer's next step, for each parameter in ``gradients``.

    An element is 0 where the update has no finite derivative: for Adam at a gradient and a second moment of exactly 0.

    Args:
        optimizer: one that :func:`has_closed_form` accepts, in the state before the step. It is only read.
        gradients: of parameters that the optimizer holds.
    """
    found: dict[Tensor, Diagonal] = {}
    for group in optimizer.param_groups:
        parameters = [parameter for parameter in group["params"] if parameter in gradients]
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        if isinstance(optimizer, SGD):
            found |= zip(parameters, (_sgd(group, state) for state in states), strict=True)
        elif parameters:
            decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
            decay = 0.0 if decoupled else group["weight_decay"]
            diagonal = _adam(group, decay, parameters, [gradients[p] for p in parameters], states)
            found |= zip(parameters, diagonal, strict=True)
    return found


def _sgd(group: dict[str, Any], state: dict[str, Any]) -> float:
    rate: float = group["lr"] if group["maximize"] else -group["lr"]
    if not group["momentum"]:
        return rate
    entering = 1.0 if state.get("momentum_buffer") is None else 1.0 - group["dampening"]
    return rate * (1.0 + group["momentum"] * entering if group["nesterov"] else entering)


def _adam(
    group: dict[str, Any],
    weight_decay: float,
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Any]],
) -> list[Tensor]:
    (beta1, beta2), eps, rate = group["betas"], group["eps"], group["lr"] if group["maximize"] else -group["lr"]
    counts = [1.0 + taken for taken in _steps_taken(states)]
    b = [math.sqrt(1.0 - beta2**t) for t in counts]
    # As d = (r + εb) / b, the quotient is that of the three terms times this factor and r (r + εb)².
    factors = [rate * each / (1.0 - beta1**t) for t, each in zip(counts, b, strict=True)]
    m, v = (
        [state[name] if state else torch.zeros_like(p) for p, state in zip(parameters, states, strict=True)]
        for name in ("exp_avg", "exp_avg_sq")
    )
    g = list(torch._foreach_neg(gradients)) if group["maximize"] else gradients
    if weight_decay:
        g = list(torch._foreach_add(g, parameters, alpha=weight_decay))
    r = torch._foreach_mul(v, beta2)
    torch._foreach_addcmul_(r, g, g, 1.0 - beta2)
    torch._foreach_sqrt_(r)
    found = torch._foreach_mul(
        r, [factor * (1.0 - beta1) * eps * each for factor, each in zip(factors, b, strict=True)]
    )
    torch._foreach_addcmul_(found, m, g, [-factor * (1.0 - beta2) * beta1 for factor in factors])
    torch._foreach_add_(found, torch._foreach_mul(v, [factor * (1.0 - beta1) * beta2 for factor in factors]))
    torch._foreach_div_(found, r)
    torch._foreach_add_(r, [eps * each for each in b])
    torch._foreach_div_(found, r)
    torch._foreach_div_(found, r)
    return [each.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) for each in found]


def _steps_taken(states: Sequence[dict[str, Any]]) -> list[float]:
    """By parameter, 0 before its first step. Counts on a device (``capturable``, ``fused``) are read all at once."""
    counts = [state["step"] for state in states if state]
    if not counts:
        return [0.0] * len(states)
    read = iter(torch.stack([count.to(counts[0].device) for count in counts]).tolist())
    return [next(read) if state else 0.0 for state in states]
