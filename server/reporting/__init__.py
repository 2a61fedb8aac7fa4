"""A report to hand over: what was corrected, with which evidence, what it cost, and the hashes that prove it."""
