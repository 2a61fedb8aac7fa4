"""The board: pages on which a person sees, decides and undoes. They call the same services as the tools."""
