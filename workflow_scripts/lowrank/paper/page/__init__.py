"""The parts of the report that no table or figure of the config has: what came out, the leader board, ranks, usage."""
