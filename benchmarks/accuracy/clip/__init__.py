"""Small CLIPs: `model`; `training` makes them; `questions` are one right caption of sixteen; `arms` are the ways to
spend fewer tokens; `study` compares them on frozen models, `align_study` after a short alignment; `report` shows it."""
