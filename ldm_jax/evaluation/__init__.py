"""Figures of merit: feature extractors, running statistics, Fréchet distance and its relatives, grids and reports."""
