"""Sweepers of `train.py -m`: all combinations, and a search by Optuna. Hydra imports this with every command."""
