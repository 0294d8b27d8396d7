"""N images against M texts: what does not depend on the text runs once per image, the rest once per pair."""
