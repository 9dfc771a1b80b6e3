"""GenZ's analyzer re-implemented from its documented behaviour, with seed 000's correction behind a switch."""
