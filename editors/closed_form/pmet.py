"""PMET: MEMIT whose values leave the attention's part to the attention (Li et al., AAAI 2024, arXiv 2308.08742)."""

from __future__ import annotations

from editors.closed_form.weighted import WeightedEditor


class Pmet(WeightedEditor):
    """As MEMIT; attention and MLP are optimised together, the residual is spread by 1/sqrt."""

    name = "pmet"
    title = "Precise model editing in a transformer"
    description = (
        "As memit, but the target values are sought for the attention and the MLP of the last layer together and only "
        "the MLP's part is written, so that the MLP does not take on what attention does; the change is spread over "
        "the layers by the square root of those left."
    )
    source = "Li et al., AAAI 2024, arXiv 2308.08742"
    when = "A batch of facts where memit disturbs neighbours; it is more careful and less thorough."
    cost = "A little more than memit: one more layer is run in every step."
    root = True
    attention = True
