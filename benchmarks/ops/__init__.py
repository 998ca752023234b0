"""The benchmarks, one module a family of operators."""
