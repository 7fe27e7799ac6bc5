"""Post-training of a compressed checkpoint (paper, Equation 9, or LoRA) and the exact merge of what was trained."""
