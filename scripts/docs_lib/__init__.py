"""Generates parts of the documentation from the sources, and checks the pages. Standard library only."""
