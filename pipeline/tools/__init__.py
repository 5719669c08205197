"""Commands beside extract, train and convert: codebook, unit index, purity, distill, demo."""
