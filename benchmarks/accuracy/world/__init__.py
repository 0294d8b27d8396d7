"""A world whose contents are known: scenes of emoji on photographs (`scenes`), captions that name some of them
(`captions`), and batches of both (`sampling`)."""
