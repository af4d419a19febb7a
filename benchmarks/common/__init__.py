"""Code that several benchmarks share. Needs torch and numpy only; ``statistics`` needs scipy too."""
