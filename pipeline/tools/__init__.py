"""Further commands: codebook, unit index, purity, distill, export, fetch and demo corpus."""
