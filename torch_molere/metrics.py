"""Numbers about a run, for any logger."""

from __future__ import annotations

from torch_molere.core import Core


def metrics_of(r: Core) -> dict[str, float]:
    """A flat dict: of the latest step, of the validation source, and of the meta-updates so far.

    - ``steps``, ``meta_updates``, ``meta_seconds`` (spent on meta-updates), ``shrinkage`` (λ at present);
    - ``weights/``: ``std``, ``effective`` (1 / (1 + std²), the effective sample size as a share), ``zero`` and
      ``at_bound`` (shares), of the latest batch;
    - ``validation/``: ``sent`` (share of the latest batch); of the latest meta-update ``loss``, ``accuracy`` and
      ``classes`` (the effective number of classes, the exponential of their entropy); and what the source tells, for a
      buffer ``instances``, ``fill`` (share of its capacity), ``age`` (steps since they were last sent, their mean) and,
      with a splitter that learns, ``splitter_loss``;
    - ``meta_gradient/``: ``norm``, ``signal_to_noise`` (|mean| / std over the batch), ``repeated`` (b of
      :class:`~torch_molere.shrinkage.Shrinkage`);
    - ``check/error``: of the last comparison with reverse mode, relative.
    """
    found: dict[str, float] = {
        "steps": float(r.steps),
        "meta_updates": float(r.meta_updates),
        "meta_seconds": r.tally.seconds,
    }
    if r.result is not None:
        weights = r.result.weights[~r.result.held_out].float()
        if len(weights):
            found["weights/std"] = float(weights.std(correction=0))
            found["weights/effective"] = float(
                weights.sum() ** 2 / (weights.square().sum() * len(weights)).clamp_min(1e-12)
            )
            found["weights/zero"] = float((weights == 0).float().mean())
            if r.max_weight is not None:
                found["weights/at_bound"] = float((weights >= r.max_weight * (1 - 1e-6)).float().mean())
        found["validation/sent"] = float(r.result.val_mask.float().mean())
    if r.tally.latest is not None:
        val_loss, gradient, correct, classes = r.tally.latest
        found["validation/loss"] = float(val_loss)
        if correct is not None:
            found["validation/accuracy"] = float(correct.float().mean())
        if classes is not None:
            shares = classes.unique(return_counts=True)[1] / len(classes)
            found["validation/classes"] = float((-(shares * shares.log()).sum()).exp())
        found["meta_gradient/norm"] = float(gradient.norm())
        spread = gradient.std(correction=0)
        found["meta_gradient/signal_to_noise"] = float(gradient.mean().abs() / spread.clamp_min(1e-30))
    if r.shrinkage.strength is not None:
        found["shrinkage"] = r.shrinkage.strength
        found["meta_gradient/repeated"] = r.shrinkage.repeated
    if r.engines.found is not None:
        found["check/error"] = r.engines.found.error
    return found | {f"validation/{name}": value for name, value in r.validation.metrics().items()}
