"""Histograms of durations, which `stats` exports."""
