"""Figures of the study. They use matplotlib without a display."""
