"""The mini-ALBEF: `model`; `base` and `train` make it; `arms` are the ways to spend less; `evaluate` asks it;
`curves` goes over keep rates; `studies` and `contrast_studies` answer one question each; `report` shows it."""
