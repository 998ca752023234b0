"""The benchmarks of operators, one module for each family."""
