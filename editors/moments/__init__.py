"""Second moments C = E[k k^T] of the keys, computed for many layers in one pass and kept on disk by model.

The keys are those of a corpus file. Without a corpus they are of two kinds with equal weight: keys of the shipped
facts as sentences, which resemble an edit's neighbours, and keys of text sampled from the model itself, which stands
for everything else. A few times d_in tokens are enough (Gupta et al., ACL 2025, arXiv 2506.04226).
"""

from editors.moments.moment import Conditioning, Moment, compute_moments, condition_of, own_moments
from editors.moments.statistics import Statistics, sample_name

__all__ = [
    "Conditioning",
    "Moment",
    "Statistics",
    "compute_moments",
    "condition_of",
    "own_moments",
    "sample_name",
]
