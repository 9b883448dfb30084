"""Images and masks: found, paired, read, cut and turned."""
