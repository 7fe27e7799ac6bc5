"""How far a study has come: what is done, runs, failed or is missing, and how long the rest will take."""
