"""MEMIT: many facts as one change of a few MLPs (Meng et al., ICLR 2023, arXiv 2210.07229)."""

from __future__ import annotations

from editors.closed_form.weighted import WeightedEditor


class Memit(WeightedEditor):
    """X = (lambda C + Kp Kp^T + K K^T)^-1 K (eq. 14)."""

    name = "memit"
    title = "Mass-editing memory in a transformer"
    description = (
        "Writes a batch of facts at once: finds a target value for each and solves one least-squares problem per "
        "layer that maps all their keys to them while typical keys, and those of earlier edits, move little."
    )
    source = "Meng et al., ICLR 2023, arXiv 2210.07229"
    when = "Several facts in one call, up to a thousand; each of them can still be reverted alone."
    cost = "A second or two of CPU per fact on a model of 135M parameters, less in larger batches."
