"""Lists of right answers: read from files, kept on the ledger, checked, and put right in the model."""
