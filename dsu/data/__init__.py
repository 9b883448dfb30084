"""Images and masks: find, pair, read, tile and augment them."""
