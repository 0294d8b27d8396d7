"""How a model comes to behave differently: what was asked, which modules change, which text is meant."""
