"""Captures that come with the package."""
