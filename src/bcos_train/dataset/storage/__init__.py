"""Where the bytes of a data set are, separate from what the data set is."""
