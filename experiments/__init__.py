"""Studies: one file declares the runs; results, tables and pictures lie beside it."""
