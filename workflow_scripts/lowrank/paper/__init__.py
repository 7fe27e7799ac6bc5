"""Tables, figures, the report and the provenance of a study. Nothing here imports torch."""
