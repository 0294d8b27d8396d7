"""Models of open_clip and transformers behind one interface: `host` is the interface, `loading.load` finds a model."""
