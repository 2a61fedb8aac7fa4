"""Editors that are trained before they edit: MEND and SERAC, their data and their training."""
