"""Long work in the background: training, statistics."""
