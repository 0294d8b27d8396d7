"""What all benchmarks stand on: photographs, clocks, counted FLOPs, the rival (ToMe), tables, plots and reports."""
