"""Measures the cost of a distillation step here, in a loop written by hand, and in the tools that people use."""
