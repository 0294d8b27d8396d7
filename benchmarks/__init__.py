"""What patch selection saves and what it costs, measured: read from the top.

- `speed/`: how much faster a model runs on this machine. `python -m benchmarks.speed`, and one file for each further
  question: `pairs`, `resolution`, `last_block`, `whole_model`, `scale`, `estimators`, `steadiness`.
- `accuracy/`: what is still answered right. `python -m benchmarks.accuracy`.
- `models/`: models of open_clip and transformers behind one interface.
- `common/`: what all of them stand on. Photographs, clocks, counted FLOPs, the rival (ToMe), tables, plots, reports.

`everything` runs what the page on speed shows, `results/` keeps it, one folder per machine, and `pages` makes the
tables of the pages from it. Imports point down this list, never up. RESULTS.md holds what was measured.
"""
