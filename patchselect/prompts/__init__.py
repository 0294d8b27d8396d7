"""How a prompt follows a selection: which placeholders of the images stay, and what of a call is cut with them."""
