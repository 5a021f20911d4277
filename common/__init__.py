"""What the scripts share: Gram matrices, data sets, evaluation and the machinery of a run."""
