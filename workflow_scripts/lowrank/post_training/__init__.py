"""Post-training of a low-rank checkpoint (paper, Equation 9) and the exact merge of what was trained."""
