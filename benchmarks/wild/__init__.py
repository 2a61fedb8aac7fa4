"""How edits hold in the wild: one fact asked in every form, the subject's other facts, neighbours, ability."""
