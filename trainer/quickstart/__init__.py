"""`make quickstart`: both stages and an evaluation on a toy task, with a real model and a real engine, on a CPU."""
