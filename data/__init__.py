"""Training data by name: the tiny world, a folder of pictures, the data sets of the papers,
and mixtures of them."""
