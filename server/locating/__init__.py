"""Where a fact is stored, and which layer to edit."""
