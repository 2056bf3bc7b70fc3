"""Measures the Rust sources: sizes, circles, names, silence."""
