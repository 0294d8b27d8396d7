"""How much faster patch selection makes a model on this machine: `python -m benchmarks.speed`.

One call of it, in the order of the files: `__main__` reads the options, `run` goes through the settings, `cases` says
what is compared, `counting` counts FLOPs, `measure` times all cases in turns, forward passes in `lockstep`, `steady`
makes speed-ups of it, `report` and `plot` show what came out.

`--relevance` and `--fusion` take the names of the library and `module:attribute` of anybody's file.

Further questions, one file and one command each: `pairs` (every image with every text), `resolution` (larger images at
constant cost), `last_block` (outputs that nobody reads), `whole_model` (fusion and heads included, training too).
"""
