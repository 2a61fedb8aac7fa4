"""The live model and its ledger: the one mechanism for every change of state."""
