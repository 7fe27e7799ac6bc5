"""Tests: `unit` has the rooms of the library, so that the tests of a module are found by its path."""
