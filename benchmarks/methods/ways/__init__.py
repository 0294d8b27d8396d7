"""One file a method. Each lists its rows in `METHODS`; nothing else knows them."""
