"""Trials and front in MLflow."""
