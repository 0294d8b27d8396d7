"""A tiny language model that answers questions about scenes from the tokens that a tower has left: `study`."""
