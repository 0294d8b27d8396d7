"""A world whose contents are known: scenes of emoji on photographs (`scenes`), captions that name some of them
(`captions`), wrong ones beside the right one (`candidates`), batches (`sampling`), and what can be answered without the
pictures (`text_alone`)."""
