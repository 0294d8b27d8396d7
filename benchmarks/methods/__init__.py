"""Methods side by side at equal FLOPs: `python -m benchmarks.methods`, or `./run accuracy methods`.

- `ways/` has one file a method: what ranks patches, what becomes of the others, and the knob that sets its cost.
- `method` says what such a file answers; `tasks` are the models and questions; `match` finds the knob.
- `study` asks, `report` makes the page docs/leaderboard.md of the figures in `leaderboard.json`.
"""
